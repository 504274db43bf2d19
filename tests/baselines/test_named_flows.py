"""Laws of every named flow of vectors, and of parts whose own tests ask only part of them."""

import pytest
import torch
from laws import every_parameter_matters, ladj_is_slogdet_of_the_jacobian
from zoo import perturbed, rows_for, seeded

from cnf import Flow, TrainingConfig, certify, fit
from cnf.baselines import build, names
from cnf.transforms import (
    ActNorm,
    Conv1x1,
    EmergingConv,
    ExactLogDet,
    PeriodicConv,
    ResidualFlow,
    WoodburyConv,
)

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

KINDS = {baseline.name: baseline for baseline in names() if not baseline.images_alone}
NAMES = list(KINDS)
EXACT = [name for name in NAMES if build(name, 2).likelihood == "exact"]
INVERTIBLE = [name for name in NAMES if name != "gmm"]
START_FROM_DATA = {"acf", "elf", "gmm", "iresnet", "residual"}
BY_BISECTION = ("gf", "naf")
# A new one spreads over thousands with kinks at every scale: trained, `certify` integrates it.
FINER_THAN_A_GRID = ("naf",)
every_name = pytest.mark.parametrize("name", NAMES)
every_exact_name = pytest.mark.parametrize("name", EXACT)


def data(rows=512):
    """Correlated normal rows, of an entropy of 2.14 nats."""
    return torch.randn(rows, 2, generator=seeded()) @ torch.tensor([[1.0, 0.6], [0.0, 0.5]]) + 0.3


def started(name, *, context_features=0):
    """A small one away from its start, with what it takes from data."""
    flow = perturbed(build(name, 2, context_features, size=6), 0.1)
    context = torch.randn(512, context_features) if context_features else None
    flow.initialize(data(), context, generator=seeded())
    return flow


def nll(flow, x):
    """Mean negative log-density, in nats."""
    return float(-flow.log_prob(x, generator=seeded()).detach().mean())


@torch.no_grad()
def mass(flow, context=None):
    """Integral of the density over a box that is twice as wide as samples reach."""
    samples = flow.sample(1000, context, generator=seeded())
    low, high = samples.amin(0), samples.amax(0)
    steps = torch.linspace(-0.5, 1.5, 101).unsqueeze(-1)
    first, second = (low + steps * (high - low)).unbind(-1)
    density = flow.log_prob(torch.cartesian_prod(first, second), context).exp().view(101, 101)
    return float(torch.trapezoid(torch.trapezoid(density, second), first))


@pytest.mark.parametrize("name", INVERTIBLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [1, 5])
def test_both_round_trips_end_where_they_began(name, dtype, spread):
    flow = started(name).to(dtype)
    x = spread * torch.randn(30, 2, dtype=dtype)
    atol = spread * (1e-4 if name in BY_BISECTION else 3e-5 if dtype == torch.float32 else 1e-6)
    z = flow.to_base(x)
    torch.testing.assert_close(flow.to_data(z), x, rtol=0, atol=atol)
    torch.testing.assert_close(flow.to_base(flow.to_data(x)), x, rtol=0, atol=atol)


@pytest.mark.parametrize("name", [name for name in EXACT if name != "gmm"])
@pytest.mark.parametrize("context_features", [0, 3])
def test_ladj_is_slogdet_of_the_jacobian(name, context_features):
    if context_features and not KINDS[name].conditional:
        pytest.skip("takes no context")
    flow = started(name, context_features=context_features)
    ladj_is_slogdet_of_the_jacobian(flow, *rows_for(flow, 4), atol=1e-9)


@pytest.mark.parametrize("name", [name for name in EXACT if name not in FINER_THAN_A_GRID])
def test_the_density_integrates_to_one(name):
    assert mass(started(name)) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(
    "name", [name for name in EXACT if KINDS[name].conditional and name not in FINER_THAN_A_GRID]
)
def test_the_density_given_a_context_integrates_to_one(name):
    flow = started(name, context_features=2)
    assert mass(flow, torch.tensor([1.0, -1.0])) == pytest.approx(1, abs=1e-2)


@every_exact_name
def test_a_far_row_harms_no_other(name):
    flow = started(name)
    near = torch.zeros(1, 2)
    both = flow.log_prob(torch.cat([near, torch.full((1, 2), 300.0)]))
    torch.testing.assert_close(both[:1], flow.log_prob(near))
    assert both[1] < both[0]


@every_name
def test_the_gradient_reaches_every_parameter(name):
    flow = started(name)
    x, _ = rows_for(flow, 20)
    every_parameter_matters(flow, flow.log_prob(x, generator=seeded()))


@every_name
@pytest.mark.parametrize("batch", [(), (3, 2)], ids=str)
def test_rows_are_evaluated_alike_in_any_batch(name, batch):
    flow = started(name)
    x = torch.randn(*batch, 2)
    value = flow.log_prob(x, generator=seeded())
    assert value.shape == batch
    assert flow.sample(batch, generator=seeded()).shape == x.shape
    if name in EXACT:
        torch.testing.assert_close(value.flatten(), flow.log_prob(x.view(-1, 2)))


@every_name
def test_a_start_from_data_fits_them_better_and_comes_once(name):
    far = 7 + 3 * data()
    flow = build(name, 2, size=6)
    before = nll(flow, far)
    awaits = any(part.needs_initialization for part in [*flow.chain, flow.base])
    assert awaits == (name in START_FROM_DATA)
    flow.initialize(far, generator=seeded())
    assert nll(flow, far) < before if awaits else nll(flow, far) == before
    assert not any(part.needs_initialization for part in [*flow.chain, flow.base])
    state = {key: tensor.clone() for key, tensor in flow.state_dict().items()}
    flow.initialize(data(), generator=seeded())
    assert all(torch.equal(tensor, state[key]) for key, tensor in flow.state_dict().items())


@pytest.mark.slow
@every_name
def test_training_fits_it(name, request):
    """Better on new rows than at the start; then the law of the density and the checks hold."""
    if name not in FINER_THAN_A_GRID:
        request.getfixturevalue("coarse_integral")
    flow, x = build(name, 2, size=8), data()
    flow.initialize(x, generator=seeded())
    new = data(1512)[512:]
    before = nll(flow, new)
    plan = TrainingConfig(steps=15, batch_size=64, learning_rate=2e-2, progress=False)
    fit(flow, x, plan)
    assert nll(flow, new) < before - 0.05
    assert nll(flow, new) > 1.9  # less than the entropy would be no density
    report = certify(flow, x[:10])
    assert report.passed, report
    assert report["integral"].verdict == ("pass" if name in EXACT else "skip")


LINEAR = {
    "conv1x1": lambda: Conv1x1(2),
    "dense conv1x1": lambda: Conv1x1(2, lu=False),
    "emerging": lambda: EmergingConv((1, 1, 2), 3),
    "emerging, two channels": lambda: EmergingConv((2, 1, 1), 1),
    "periodic": lambda: PeriodicConv((2, 1, 1), 1),
    "woodbury": lambda: WoodburyConv((2, 1, 1), 1, 1),
}


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_a_linear_map_alone_has_a_density_that_integrates_to_one(make):
    flow = Flow([perturbed(make())])
    assert flow.to_base_and_ladj(torch.zeros(2))[1].abs() > 1e-3
    assert mass(flow) == pytest.approx(1, abs=1e-4)


def test_an_i_resnet_by_its_whole_jacobian_has_a_density_that_integrates_to_one():
    chain = [
        part if isinstance(part, ActNorm) else ResidualFlow(part.network, log_det=ExactLogDet())
        for part in started("iresnet").chain
    ]
    assert mass(Flow(chain)) == pytest.approx(1, abs=1e-3)
