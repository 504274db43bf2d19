"""Laws of the exact-Lipschitz flow: no slope beyond the limit, and that is all that is given up."""

import math

import pytest
import torch
from training_runs import config
from zoo import lipschitz, perturbed, rows_for

from cnf import Flow, fit
from cnf.transforms import ExactLipschitz, Permute
from cnf.transforms.exact_lipschitz import Ramps


def ramps(batch=50, units=5):
    return Ramps(
        torch.randn(batch),
        torch.randn(batch),
        3 * torch.randn(batch, units),
        2 * torch.randn(batch, units),
        0.05 + torch.rand(batch, units),
    )


def steep(features, context_features=0, **settings):
    """One whose functions would be much steeper than they may be."""
    return perturbed(lipschitz(features, context_features, **settings), 2.0)


def test_slopes_are_those_of_the_values():
    functions = ramps()
    t = torch.randn(50, requires_grad=True)
    value, slope = functions.value_and_slope(t)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), t)[0], slope)
    torch.testing.assert_close(functions.slope_at(t), slope)


def test_slopes_are_linear_between_the_ends_of_ramps():
    functions = ramps()
    ends = torch.cat([functions.places, functions.places + functions.widths], -1).sort().values
    at_ends = functions.slope_at(ends.mT).mT
    middles = (ends[:, 1:] + ends[:, :-1]) / 2
    expected = (at_ends[:, 1:] + at_ends[:, :-1]) / 2
    torch.testing.assert_close(functions.slope_at(middles.mT).mT, expected)


def test_the_steepest_slope_is_the_largest_on_a_fine_grid():
    functions = ramps()
    grid = torch.linspace(-12, 12, 20_001).unsqueeze(-1)
    largest = functions.slope_at(grid).abs().amax(0)
    assert (largest <= functions.lipschitz_constant() + 1e-12).all()
    torch.testing.assert_close(largest, functions.lipschitz_constant(), rtol=0.02, atol=0.05)


def test_only_functions_that_are_too_steep_are_scaled():
    functions = ramps()
    limit = float(functions.lipschitz_constant().median())
    scaled = functions.scaled_to(limit)
    expected = functions.lipschitz_constant().clamp(max=limit)
    torch.testing.assert_close(scaled.lipschitz_constant(), expected)
    grid = torch.linspace(-3, 3, 7).unsqueeze(-1)
    kept = (scaled.slope_at(grid) == functions.slope_at(grid)).all(0)
    assert torch.equal(kept, functions.lipschitz_constant() <= limit)


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("limit", [0.5, 0.97])
def test_the_ladj_stays_within_what_the_limit_allows(limit, context_features):
    part = steep(3, context_features, lipschitz=limit)
    x, context = rows_for(part, 5000)
    _, ladj = part.to_base_and_ladj(3 * x, context)
    assert (ladj >= 3 * math.log1p(-limit) - 1e-12).all()
    assert (ladj <= 3 * math.log1p(limit) + 1e-12).all()


def test_the_limit_is_reached_by_a_function_that_would_be_steeper():
    part = steep(1, lipschitz=0.9)
    _, ladj = part.to_base_and_ladj(torch.linspace(-15, 15, 30_001).unsqueeze(-1))
    assert ladj.expm1().abs().max().item() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("context_features", [0, 2])
def test_the_jacobian_is_triangular(context_features):
    part = steep(4, context_features)
    x, context = rows_for(part)
    jacobian = torch.autograd.functional.jacobian(lambda x: part.to_base(x, context), x)
    assert (jacobian.triu(1) == 0).all()
    assert (jacobian.diagonal() > 0).all()
    assert (jacobian.tril(-1) != 0).any()


def test_a_new_one_is_the_identity():
    part = ExactLipschitz(3, 2)
    x, context = rows_for(part, 20)
    z, ladj = part.to_base_and_ladj(x, context)
    assert torch.equal(z, x)
    assert torch.equal(ladj, torch.zeros(20))


@pytest.mark.parametrize("features", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_steep_one_is_undone_near_and_far(features, scale):
    part = steep(features)
    x = scale * torch.randn(50, features)
    z, ladj = part.to_base_and_ladj(x)
    back, ladj_back = part.to_data_and_ladj(z)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ladj_back, -ladj, rtol=0, atol=1e-8)


def test_float32_is_undone_to_its_digits():
    part = lipschitz(3).float()
    x = torch.randn(100, 3).float()
    torch.testing.assert_close(part.to_data(part.to_base(x)), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_slopes_stay_within_the_limit_in_float32_and_far_from_the_data(scale):
    part = steep(3).float()
    _, ladj = part.to_base_and_ladj(scale * torch.randn(500, 3).float())
    assert (ladj > 3 * math.log1p(-0.98)).all()


def test_slopes_and_so_densities_are_continuous():
    functions = ramps()
    ends = torch.cat([functions.places, functions.places + functions.widths], -1).mT
    before, after = functions.slope_at(ends - 1e-9), functions.slope_at(ends + 1e-9)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


def test_a_narrow_ramp_far_away_is_not_overlooked_in_float32():
    part = ExactLipschitz(1, units=1, lipschitz=0.9).float()
    with torch.no_grad():  # shift, slope, height, place and width
        part.network.last.bias.copy_(torch.tensor([0.0, 0.0, -5.0, 1e6, -20.0]))
    _, ladj = part.to_base_and_ladj(torch.tensor([[0.0], [2e6]]).float())
    expected = torch.tensor([0.0, math.log(0.1)]).float()
    torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["to_base_and_ladj", "to_data_and_ladj"])
@pytest.mark.parametrize("make", [lipschitz, steep])
def test_gradcheck(make, call):
    part = make(2, 1, units=2, hidden_features=(3,))
    x, context = (tensor.requires_grad_() for tensor in rows_for(part, 2))

    def moved(x, context, *_):  # the parameters are perturbed in place
        return getattr(part, call)(x, context)

    inputs = (x, context, part.network.hidden[0].weight, part.network.last.bias)
    assert torch.autograd.gradcheck(moved, inputs)


def test_a_density_takes_one_call_of_the_network_and_a_draw_one_for_each_feature():
    part = lipschitz(4)
    calls = []
    part.network.register_forward_hook(lambda *_: calls.append(1))
    z, _ = part.to_base_and_ladj(torch.randn(3, 4))
    assert len(calls) == 1
    part.to_data(z)
    assert len(calls) == 1 + 4


@pytest.mark.slow
def test_fit_lowers_the_loss():
    angle = 3 * torch.rand(300)
    x = torch.stack([angle.cos(), angle.sin()], -1) + 0.2 * torch.randn(300, 2)
    parts = [ExactLipschitz(2, hidden_features=(16,)) for _ in range(2)]
    flow = Flow([parts[0], Permute([1, 0]), parts[1]])
    start = -flow.log_prob(x).mean()
    fit(flow, x, config(60, learning_rate=0.03))
    assert -flow.log_prob(x).mean() < start - 0.3


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"units": 0}, ValueError, r"units must be at least 1; got 0"),
        ({"lipschitz": 1.0}, ValueError, r"lipschitz must be between 0 and 1; got 1\.0"),
        ({"lipschitz": 0.0}, ValueError, r"lipschitz must be between 0 and 1; got 0\.0"),
        ({"lipschitz": math.nan}, ValueError, r"lipschitz must be between 0 and 1; got nan"),
        ({"hidden_features": 8}, TypeError, r"hidden_features must be widths .*; got 8"),
        ({"features": 0}, ValueError, r"features must be at least 1; got 0"),
    ],
)
def test_a_bad_argument_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        ExactLipschitz(**{"features": 2, **settings})
