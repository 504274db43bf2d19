"""Laws of coupling layers: what is kept is kept, and what changes, changes by what is kept."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from training_runs import config
from zoo import couplings, perturbed

from cnf import Flow, fit, load, save
from cnf.data.toy import toy_density
from cnf.transforms import AdditiveCoupling, AffineCoupling, ConvConditioner, MLPConditioner

IMAGE = (2, 4, 2)
SPLITS = {
    "first features": (5, "first", [0, 1]),
    "last features": (5, "last", [2, 3, 4]),
    "first channels": ((3, 1, 2), "first", [0, 1]),
    "last channels": ((3, 1, 2), "last", [2, 3, 4, 5]),
    "even pixels": ((2, 2, 3), "even", [0, 2, 4, 6, 8, 10]),
    "odd pixels": ((2, 2, 3), "odd", [1, 3, 5, 7, 9, 11]),
}
every_split = pytest.mark.parametrize(("shape", "kept", "places"), SPLITS.values(), ids=SPLITS)
every_kind = pytest.mark.parametrize("kind", [AdditiveCoupling, AffineCoupling])


class Given(nn.Module):
    """A conditioner of a user's own: loc is 2 times the kept feature, and r a constant."""

    def __init__(self, raw=0.0):
        super().__init__()
        self.raw = raw

    def forward(self, x, context=None):
        return torch.cat([2 * x, torch.full_like(x, self.raw)], -1)


class Slope(nn.Module):
    """A linear conditioner of one number."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x, context=None):
        return self.slope * x


class Raw(nn.Module):
    """A conditioner whose loc is 0, and r the kept feature."""

    def forward(self, x, context=None):
        return torch.cat([torch.zeros_like(x), x], -1)


class Constant(nn.Module):
    """A conditioner that gives the same numbers for every row."""

    def __init__(self, *numbers):
        super().__init__()
        self.register_buffer("numbers", torch.tensor(numbers))

    def forward(self, x, context=None):
        return self.numbers.expand(*x.shape[:-1], -1)


@every_kind
@every_split
def test_what_is_kept_is_bit_identical_and_all_else_changes(kind, shape, kept, places):
    transform = perturbed(kind(shape, mask=kept))
    x = torch.randn(4, transform.features)
    changed = torch.ones(transform.features, dtype=torch.bool)
    changed[places] = False
    for result in (transform.to_base(x), transform.to_data(x)):
        assert torch.equal(result[:, places], x[:, places])
        assert (result[:, changed] != x[:, changed]).all()


@every_kind
@every_split
def test_a_changed_feature_depends_on_itself_and_on_what_is_kept_alone(kind, shape, kept, places):
    transform = perturbed(kind(shape, mask=kept))
    changed = [i for i in range(transform.features) if i not in places]
    jacobian = torch.autograd.functional.jacobian(
        transform.to_base, torch.randn(transform.features)
    )
    among_changed = jacobian[changed][:, changed]
    assert torch.equal(among_changed, among_changed.diagonal().diag())
    assert (among_changed.diagonal() > 0).all()
    assert (jacobian[changed][:, places] != 0).any()


@every_kind
@pytest.mark.parametrize(
    ("shape", "kept"),
    [(5, ("first", "last")), (IMAGE, ("first", "last")), (IMAGE, ("even", "odd"))],
    ids=str,
)
def test_two_layers_with_opposite_halves_change_every_feature(kind, shape, kept):
    first, second = (perturbed(kind(shape, mask=half)) for half in kept)
    x = torch.randn(3, first.features)
    z = second.to_base(first.to_base(x))
    assert (z != x).all()
    torch.testing.assert_close(first.to_data(second.to_data(z)), x, rtol=0, atol=1e-10)


@every_kind
@every_split
@pytest.mark.parametrize("context_features", [0, 2])
def test_a_new_coupling_is_the_identity(kind, shape, kept, places, context_features):
    transform = kind(shape, context_features, mask=kept)
    x = torch.randn(3, transform.features)
    context = torch.randn(3, context_features) if context_features else None
    z, ladj = transform.to_base_and_ladj(x, context)
    assert torch.equal(z, x)
    assert (ladj == 0).all()


@every_split
def test_an_additive_coupling_keeps_volumes_whatever_its_weights(shape, kept, places):
    transform = perturbed(AdditiveCoupling(shape, mask=kept), 2.0)
    x = torch.randn(3, transform.features)
    assert (transform.to_base_and_ladj(x)[1] == 0).all()
    assert (transform.to_data_and_ladj(x)[1] == 0).all()


def test_an_affine_coupling_without_scale_is_additive():
    additive = perturbed(AdditiveCoupling(3, conditioner=MLPConditioner(1, 2)))
    affine = AffineCoupling(3, conditioner=MLPConditioner(1, 4))
    with torch.no_grad():
        for target, source in zip(
            affine.conditioner.parameters(), additive.conditioner.parameters(), strict=True
        ):
            target[: len(source)] = source  # the last layer keeps its zeros for r
    x = torch.randn(5, 3)
    torch.testing.assert_close(affine.to_base(x), additive.to_base(x), rtol=0, atol=1e-14)
    assert (affine.to_base_and_ladj(x)[1] == 0).all()


def test_the_numbers_are_loc_of_all_changed_features_then_the_bounded_scale():
    transform = AffineCoupling(3, conditioner=Constant(10.0, 20.0, 0.5, 1e9), bound=2.0)
    z, ladj = transform.to_base_and_ladj(torch.tensor([7.0, 13.0, 25.0]))
    small, large = 2 * math.tanh(0.25), 2.0
    expected = torch.tensor([7.0, 3 * math.exp(-small), 5 * math.exp(-large)])
    torch.testing.assert_close(z, expected)
    assert ladj.item() == pytest.approx(-small - large, abs=1e-12)


def test_a_linear_conditioner_gives_its_gaussian():
    log_scale = 0.4
    conditioner = Given(3 * math.atanh(log_scale / 3))
    flow = Flow([AffineCoupling(2, conditioner=conditioner)])
    scale = torch.tensor([[1.0, 0.0], [2.0, math.exp(log_scale)]])
    x = 2 * torch.randn(6, 2)
    expected = MultivariateNormal(torch.zeros(2), scale @ scale.T).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("direction", ["to_base", "to_data"])
@pytest.mark.parametrize("far", [1.0, 1e4])
def test_an_additive_coupling_stretches_alike_everywhere(direction, far):
    """With slope m, by (m + sqrt(m^2 + 4)) / 2 in both directions."""
    transform, slope = AdditiveCoupling(2, conditioner=Slope(-1.7)), 1.7
    move = getattr(transform, direction)
    jacobian = torch.autograd.functional.jacobian(move, far * torch.randn(2))
    expected = (slope + math.sqrt(slope**2 + 4)) / 2
    assert torch.linalg.matrix_norm(jacobian, 2).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bound", [math.log(2) / 2, 3.0])
def test_the_bound_is_on_the_slope_of_a_changed_feature_not_by_a_kept_one(bound):
    transform = AffineCoupling(2, conditioner=Raw(), bound=bound)
    kept = torch.linspace(-10, 10, 41)
    near, far = (
        torch.func.vmap(torch.func.jacrev(transform.to_base))(
            torch.stack([kept, torch.full_like(kept, changed)], -1)
        )
        for changed in (1.0, 1e4)
    )
    own = near[:, 1, 1].log().abs()
    assert 0.99 * bound < own.max() <= bound
    torch.testing.assert_close(far[:, 1, 1], near[:, 1, 1])
    torch.testing.assert_close(far[:, 1, 0], 1e4 * near[:, 1, 0])


@pytest.mark.parametrize("kept", ["last", "odd"])
def test_one_context_serves_all_rows_and_each_its_own(kept):
    shape = (2, 2, 1)
    transform = perturbed(AffineCoupling(shape, 3, mask=kept))
    x, context = torch.randn(5, 2, 4), torch.randn(2, 3)
    z, ladj = transform.to_base_and_ladj(x, context)
    for row in range(2):
        expected = transform.to_base_and_ladj(x[:, row], context[row])
        torch.testing.assert_close((z[:, row], ladj[:, row]), expected, rtol=0, atol=1e-12)
    assert not torch.equal(z, transform.to_base(x, context.flip(0)))


def test_couplings_alone_have_a_density_that_integrates_to_one():
    flow = perturbed(Flow(couplings()))
    axis = torch.linspace(-14, 14, 281)
    centre = flow.to_data(torch.zeros(2)).detach()
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(axis, axis) + centre).exp().reshape(281, 281)
    mass = torch.trapezoid(torch.trapezoid(density, axis), axis)
    assert abs(float(mass) - 1) < 1e-3


def test_under_autocast_points_keep_their_precision():
    transform = perturbed(AffineCoupling(4).float())
    x = torch.randn(5, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z, ladj = transform.to_base_and_ladj(x)
        back = transform.to_data(z)
    assert z.dtype == ladj.dtype == torch.float32
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@every_kind
def test_fit_lowers_the_negative_log_likelihood(kind):
    x = toy_density("moons").sample(500, generator=torch.Generator().manual_seed(1)).double()
    x = (x - x.mean(0)) / x.std(0)
    flow = Flow([kind(2, mask=mask) for mask in ("first", "last") * 2])
    before = -flow.log_prob(x).mean().item()
    fit(flow, x, config(60, learning_rate=1e-2))
    assert -flow.log_prob(x).mean().item() < before - 0.2


def test_a_flow_with_a_network_of_the_users_own_is_loaded_given_its_class(tmp_path):
    flow = Flow([AffineCoupling(2, conditioner=Given())])
    save(flow, tmp_path / "flow.safetensors")
    with pytest.raises(ValueError, match=r"the class 'Given'.*classes=\[Given\]"):
        load(tmp_path / "flow.safetensors")
    same = load(tmp_path / "flow.safetensors", classes=[Given])
    assert isinstance(same.chain[0].conditioner, Given)


def test_a_conditioner_that_gives_too_few_numbers_is_refused():
    transform = AffineCoupling(5, conditioner=Constant(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"6 numbers for each row, 2 for each of 3 .* \(4, 3\)"):
        transform.to_base(torch.zeros(4, 5))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AdditiveCoupling(1), ValueError, "mask='first', 0 of the 1 features of 1"),
        (lambda: AdditiveCoupling(0), ValueError, "shape must be at least 1; got 0"),
        (lambda: AdditiveCoupling(2.0), TypeError, "shape must be an int; got 2.0"),
        (lambda: AdditiveCoupling((2, 2)), ValueError, r"\(channels, height, width\); got \(2, 2"),
        (lambda: AdditiveCoupling((1, 4, 4)), ValueError, r"0 of the 16 features of \(1, 4, 4\)"),
        (lambda: AdditiveCoupling(4, mask="even"), ValueError, "4 of the 4 features of 4 are kept"),
        (
            lambda: AdditiveCoupling(4, mask="left"),
            ValueError,
            "first, last, even, odd; got 'left'",
        ),
        (
            lambda: AdditiveCoupling(2, conditioner=lambda x, c: x),
            TypeError,
            "conditioner must be a Module; got function",
        ),
        (
            lambda: AffineCoupling(5, conditioner=MLPConditioner(3, 6)),
            ValueError,
            "conditioner must take features=2, with mask='first' of 5 features",
        ),
        (
            lambda: AffineCoupling(IMAGE, mask="even", conditioner=ConvConditioner((1, 4, 2), 4)),
            ValueError,
            "conditioner must take features=16, .*; it takes features=8",
        ),
        (
            lambda: AffineCoupling(4, 3, conditioner=MLPConditioner(2, 4)),
            ValueError,
            "conditioner must take context_features=3, .*; it takes context_features=0",
        ),
        (lambda: AffineCoupling(4, bound=0.0), ValueError, "positive and finite; got 0.0"),
        (lambda: AffineCoupling(4, bound=math.inf), ValueError, "bound must be .* got inf"),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()
