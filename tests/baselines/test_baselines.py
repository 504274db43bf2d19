"""Named discrete flows: what they are, their size, and that files keep them."""

import sys

import pytest
import torch
import zuko
from zoo import perturbed, rows_for, seeded

from cnf import Flow, TrainingConfig, fit, load, save
from cnf.baselines import NamedMixture, NamedTransform, build, names
from cnf.transforms import Affine

NAMES = [baseline.name for baseline in names() if not baseline.images_alone]
CONDITIONAL = [name for name in NAMES if name not in ("gmm", "planar", "radial")]
INVERTIBLE = [name for name in NAMES if name != "gmm"]
FROM_ZUKO = ["gf", "gmm", "iaf", "maf", "naf", "nice", "nsf", "nsf_coupling", "realnvp"]
every_name = pytest.mark.parametrize("name", NAMES)


def parameters(flow):
    """How many there are."""
    return sum(parameter.numel() for parameter in flow.parameters())


def small(name, features=2, context_features=0):
    """A small one, away from its start."""
    return perturbed(build(name, features, context_features, size=6), 0.1)


def test_names_are_sorted_and_say_what_each_is():
    assert sorted(NAMES) == NAMES
    for baseline in names():
        features = (1, 2, 2) if baseline.images_alone else 9
        assert build(baseline.name, features, size=3).likelihood == baseline.likelihood
        conditional = baseline.images_alone or baseline.name in CONDITIONAL
        assert baseline.conditional == conditional


@pytest.mark.parametrize("name", ["acf", "residual"])
def test_residual_flows_are_exact_for_few_features(name):
    kinds = [build(name, features, size=3).likelihood for features in (8, 9)]
    assert kinds == ["exact", "estimate"]


@pytest.mark.parametrize("name", ["glow", "maf", "gmm", "elf"])
def test_images_are_taken_by_their_shape(name):
    flow = build(name, (2, 4, 4), size=3)
    x = torch.randn(3, 2, 4, 4)
    assert flow.event_shape == x.shape[1:]
    assert flow.log_prob(x).shape == (3,)


@pytest.mark.parametrize("name", ["acf", "elf", "iresnet", "residual", "planar", "radial"])
def test_ours_come_near_to_a_number_of_parameters(name):
    target = 300 if name in ("planar", "radial") else 3000
    assert abs(parameters(build(name, 4, parameters=target)) - target) <= 0.1 * target


@pytest.mark.parametrize("name", FROM_ZUKO)
@pytest.mark.parametrize("target", [1_000, 20_000])
def test_the_number_of_parameters_is_the_nearest_that_a_size_gives(name, target):
    flow = build(name, 4, parameters=target)
    part = flow.base if name == "gmm" else flow.chain[0]
    distance = abs(parameters(flow) - target)
    for size in (part.size - 1, part.size + 1):
        if size:
            assert abs(parameters(build(name, 4, size=size)) - target) >= distance
    assert distance <= 0.1 * target or part.size <= 2


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_context_matters(name):
    flow = small(name, 3, 2)
    x, context = rows_for(flow, 4)
    value = flow.log_prob(x, context.requires_grad_(), generator=seeded())
    assert (torch.autograd.grad(value.sum(), context)[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", INVERTIBLE)
def test_to_data_undoes_to_base(name):
    """To the tolerance of bisection or iteration, where there is one."""
    flow = small(name)
    atol = {"gf": 1e-4, "naf": 1e-4, "acf": 1e-4, "iresnet": 1e-4, "residual": 1e-4}.get(name, 1e-9)
    x = torch.randn(20, 2, generator=seeded())
    z, ladj = flow.to_base_and_ladj(x)
    back, ladj_back = flow.to_data_and_ladj(z)
    torch.testing.assert_close(back, x, rtol=0, atol=atol)
    if flow.likelihood == "exact":
        torch.testing.assert_close(ladj_back, -ladj, rtol=0, atol=atol)


@every_name
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_file_keeps_it(name, dtype, tmp_path):
    flow = small(name).to(dtype)
    save(flow, tmp_path / "flow")
    loaded = load(tmp_path / "flow")
    x = torch.randn(4, 2, dtype=dtype)
    expected = flow.log_prob(x, generator=seeded())
    assert torch.equal(loaded.log_prob(x, generator=seeded()), expected)


def test_nice_is_additive_up_to_its_last_scaling():
    flow = small("nice", 4)
    couplings, scaling = flow.chain
    assert isinstance(scaling, Affine)
    x = torch.randn(5, 4)
    z, ladj = couplings.to_base_and_ladj(x)
    assert torch.equal(ladj, torch.zeros(5))
    assert (z - x).abs().max() > 0.01
    assert small("realnvp", 4).to_base_and_ladj(x)[1].abs().min() > 0


def test_iaf_is_maf_the_other_way_round():
    torch.manual_seed(1)
    maf = build("maf", 3, size=8)
    torch.manual_seed(1)
    iaf = build("iaf", 3, size=8)
    x = torch.randn(5, 3)
    torch.testing.assert_close(iaf.to_data(x), maf.to_base(x), rtol=0, atol=1e-12)


def test_the_mixture_is_zukos():
    base = perturbed(NamedMixture(3, 4))
    theirs = base.mixture.source
    assert isinstance(theirs, zuko.mixtures.GMM)
    x = torch.randn(5, 3)
    torch.testing.assert_close(Flow([], base).log_prob(x), theirs().log_prob(x))
    drawn = base.distribution((2,)).sample((7,))
    assert drawn.shape == (7, 2, 3)


def test_a_mixture_starts_on_rows_of_data(tmp_path):
    x = torch.randn(500, 2) @ torch.tensor([[3.0, 1.0], [0.0, 0.2]]) + 5
    flow = build("gmm", 2, size=4)
    assert flow.base.needs_initialization
    flow.initialize(x, generator=torch.Generator().manual_seed(0))
    assert not flow.base.needs_initialization
    theirs = flow.base.mixture.source()
    assert all((x == loc).all(1).any() for loc in theirs.base.loc)
    assert len(theirs.base.loc.unique(dim=0)) == 4
    narrowed = x.T.cov() * 4 ** (-2 / 6)
    torch.testing.assert_close(theirs.base.covariance_matrix[2], narrowed, atol=1e-4, rtol=1e-4)
    before = flow.log_prob(x)
    flow.initialize(x - 5)  # once only
    save(flow, tmp_path / "mixture.safetensors")
    loaded = load(tmp_path / "mixture.safetensors")
    assert not loaded.base.needs_initialization
    assert loaded.log_prob(x).equal(before)


def test_fit_starts_a_mixture_from_the_data():
    x = torch.randn(300, 2) + 10
    flow = build("gmm", 2, size=4)
    fit(flow, x, TrainingConfig(steps=1, learning_rate=1e-9, progress=False))
    assert flow.log_prob(x).mean() > -4


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (lambda: torch.randn(3, 2), "a row for each of the 4 components; got 3"),
        (lambda: torch.ones(9, 2), "vary in every direction"),
    ],
)
def test_a_mixture_refuses_data_to_start_from(x, message):
    with pytest.raises(ValueError, match=message):
        build("gmm", 2, size=4).initialize(x())


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: build("mog", 2), ValueError, "name must be one of acf, elf.*; got 'mog'"),
        (lambda: build("glow", 2), ValueError, "the shape of images for 'glow'; got 2"),
        (lambda: build("glow", (1, 2, 3)), ValueError, "multiples of 2"),
        (lambda: build("gmm", 2, 1), ValueError, "context_features must be 0 for 'gmm'; got 1"),
        (lambda: build("maf", 2, size=3, parameters=9), ValueError, "size or parameters, not both"),
        (lambda: build("maf", 2, size=0), ValueError, "size must be at least 1"),
        (lambda: build("maf", 2, parameters=1.5), TypeError, "parameters must be an int"),
        (lambda: build("maf", 0), ValueError, "features must be at least 1"),
        (lambda: build("nice", 1, parameters=10**6), ValueError, "so many parameters"),
        (lambda: NamedTransform("gmm", 2, size=3), ValueError, "one of gf, iaf.*; got 'gmm'"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_missing_zuko_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match="zuko is not installed; try pip install zuko"):
        build("maf", 2)
