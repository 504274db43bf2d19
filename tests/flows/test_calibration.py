"""Calibrated flows: every row within the accuracy, whatever rows are beside it."""

from dataclasses import replace

import pytest
import torch
from zoo import mlp, perturbed

from cnf import (
    CNF,
    Flow,
    Hutchinson,
    ModuleField,
    ODEError,
    ODESolver,
    Standardize,
    count_evaluations,
    load,
    save,
)
from cnf.adapters.bases import TorchBase
from cnf.transforms import Affine, ContinuousTransform, Dequantize, FactorOut, Transform

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

FINE = ODESolver(method="rk4", steps=400)


class Inverse(Transform):
    """A transform of a user, whose ODE goes the other way."""

    def __init__(self, inner):
        super().__init__(inner.features)
        self.inner = inner

    def _to_base(self, x, context, generator):
        return self.inner.to_data_and_ladj(x)

    def _to_data(self, z, context, generator):
        return self.inner.to_base_and_ladj(z)


def rough(features=2, context_features=0, **settings):
    """A flow with much to solve, and rows that differ in it."""
    field = mlp(features, context_features, frequency=2.0)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return Flow([Standardize(features), ContinuousTransform(field, **settings)])


def rows(flow, number=80):
    x = 2 * torch.randn(number, flow.features)
    context = torch.randn(number, flow.context_features) if flow.context_features else None
    return x, context


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("accuracy", [1e-2, 1e-4])
def test_every_row_is_within_the_accuracy(accuracy, context_features):
    flow = rough(context_features=context_features)
    x, context = rows(flow)
    flow.calibrate(*rows(flow), accuracy=accuracy)
    assert flow.accuracy == accuracy
    error = flow.log_prob(x, context) - flow.using(solver=FINE).log_prob(x, context)
    assert error.abs().max() < accuracy


COARSE = ODESolver(method="rk4", times=(0.0, 0.25, 0.5, 0.75, 1.0), accuracy=1e-6)
"""A grid on which no row is done."""


@pytest.mark.parametrize("divergence", [None, Hutchinson(probes=2)], ids=["exact", "probes"])
def test_rows_that_go_on_keep_their_contexts_and_probes(divergence):
    flow = rough(3, context_features=2, divergence=divergence)
    x, context = rows(flow)
    easy = torch.arange(len(x)) % 3 == 0
    with torch.no_grad():
        x[easy] *= 1e-3
    found, expected = (
        flow.using(solver=solver).log_prob(x, context, generator=torch.Generator().manual_seed(0))
        for solver in (COARSE, FINE)
    )
    assert (found - expected).abs().max() < 1e-5


def test_far_rows_end_at_the_rounding_of_their_numbers():
    """Whose log-density a float32 cannot hold to the accuracy."""
    flow = rough().float()
    x = torch.randn(20, 2, dtype=torch.float32)
    flow.calibrate(x, accuracy=1e-3)
    x[3] = 500.0
    found, expected = flow.log_prob(x), flow.using(solver=FINE).log_prob(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_row_too_wild_for_the_coarse_grid_is_solved_on_a_finer_one():
    class Cubic(torch.nn.Module):
        def forward(self, t, x, context=None):
            return x**3

    flow = Flow([ContinuousTransform(ModuleField(Cubic(), 1))])
    x = torch.randn(50, 1)
    flow.calibrate(x)
    x[3] = 20.0
    found, expected = (
        flow.log_prob(x),
        flow.using(solver=ODESolver(steps=2400, method="rk4")).log_prob(x),
    )
    assert (found - expected).abs().max() < 1e-3


def test_it_costs_more_where_more_is_asked_for():
    flow = rough()
    x, _ = rows(flow)
    costs = []
    for accuracy in (1e-2, 1e-9):
        flow.calibrate(x, accuracy=accuracy)
        with count_evaluations(flow) as evaluations:
            flow.log_prob(x)
        costs.append(evaluations.value)
    assert costs[0] < costs[1] / 2


def test_a_row_does_not_depend_on_the_others():
    flow = rough()
    x, _ = rows(flow)
    flow.calibrate(x)
    alone = torch.stack([flow.log_prob(row) for row in x[:20]])
    torch.testing.assert_close(flow.log_prob(x)[:20], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        flow.log_prob(torch.cat([x[:20], 10 + x]))[:20], alone, rtol=0, atol=1e-12
    )


def test_any_batch_shape():
    flow = rough(context_features=1)
    x, context = rows(flow, 24)
    flow.calibrate(x, context)
    expected = flow.log_prob(x, context)
    shaped = flow.log_prob(x.view(2, 3, 4, 2), context.view(2, 3, 4, 1))
    torch.testing.assert_close(shaped, expected.view(2, 3, 4))
    one = flow.log_prob(x.view(6, 4, 2), context[0])
    torch.testing.assert_close(one, flow.log_prob(x, context[:1].expand(24, 1)).view(6, 4))
    assert flow.log_prob(x[:0], context[:0]).shape == (0,)
    assert flow.log_prob(x[0], context[0]).shape == ()


def test_uneven_steps_are_where_the_field_is_rough():
    """A pulse at t = 0.8 of width 0.02 gets most of the steps."""

    class Pulse(torch.nn.Module):
        def forward(self, t, x, context=None):
            return 40 * torch.exp(-0.5 * ((t.unsqueeze(-1) - 0.8) / 0.02) ** 2) * torch.tanh(x)

    flow = Flow([ContinuousTransform(ModuleField(Pulse(), 1))])
    x = torch.randn(100, 1)
    flow.calibrate(x, accuracy=1e-3)
    times = torch.tensor(flow.only_ode.solver.times)
    assert ((times - 0.8).abs() < 0.1).double().mean() > 0.5
    error = flow.log_prob(x) - flow.using(solver=ODESolver(method="rk4", steps=2400)).log_prob(x)
    assert error.abs().max() < 1e-3


class Narrowing(torch.nn.Module):
    """Moves a standard normal to one of a given width, along straight lines."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, t, x, context=None):
        return x * (self.width - 1) / (1 + t.unsqueeze(-1) * (self.width - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_narrow_density_takes_few_steps(dtype):
    """Which are a thousand times smaller near the data, where the density is narrow."""
    width = 1e-3
    flow = Flow([ContinuousTransform(ModuleField(Narrowing(width), 2))]).to(dtype)
    x = width * torch.randn(400, 2, dtype=dtype)
    flow.calibrate(x[:200], accuracy=1e-3)
    times = torch.tensor(flow.only_ode.solver.times, dtype=torch.float64)
    assert times.diff().max() > 100 * times.diff().min()
    normal = torch.distributions.Normal(0.0, width)
    with count_evaluations(flow) as evaluations:
        error = flow.log_prob(x[200:]).double() - normal.log_prob(x[200:].double()).sum(-1)
    assert error.abs().max() < 1e-3
    assert evaluations.value < 300


class Drift(torch.nn.Module):
    def forward(self, t, x, context=None):
        return torch.ones_like(x)


def test_small_steps_add_up():
    """Though each is 26.2 times the distance of numbers of float32 near 100."""
    solver = ODESolver(method="rk4", steps=5000, max_evaluations=20_000)
    flow = Flow([ContinuousTransform(ModuleField(Drift(), 2), solver=solver)]).float()
    found = flow.to_data(torch.full((3, 2), 100.0, dtype=torch.float32))
    torch.testing.assert_close(found, torch.full_like(found, 101.0), rtol=0, atol=2e-5)


def test_results_are_extrapolated_to_the_order_of_five():
    flow = rough()
    x, _ = rows(flow)
    expected = flow.using(solver=FINE).log_prob(x)

    def error(steps, *, by_levels):
        times = [step / steps for step in range(steps + 1)]
        accuracy = 1e9 if by_levels else None
        solver = ODESolver(method="rk4", times=times, accuracy=accuracy)
        with torch.no_grad():
            return (flow.using(solver=solver).log_prob(x) - expected).abs().mean()

    assert error(64, by_levels=True) < error(64, by_levels=False) / 4
    order = torch.log2(error(64, by_levels=True) / error(128, by_levels=True))
    assert float(order) == pytest.approx(5, abs=0.5)


def test_the_gain_is_what_errors_are_smaller_by_than_changes():
    """Rows other than those that it was learnt from are as accurate."""
    accuracy = 1e-6
    flow = rough()
    x, _ = rows(flow, 500)
    flow.calibrate(x, accuracy=accuracy)
    solver = flow.only_ode.solver
    assert solver.gain > 1
    x, _ = rows(flow, 500)
    error = (flow.log_prob(x) - flow.using(solver=FINE).log_prob(x)).abs()
    assert error.quantile(0.99) < accuracy
    assert error.max() < 10 * accuracy
    looser = replace(solver, accuracy=solver.gain * solver.accuracy, gain=1.0)
    torch.testing.assert_close(flow.using(solver=looser).log_prob(x), flow.log_prob(x))
    for gain in (0.5, float("inf")):
        with pytest.raises(ValueError, match="gain must be at least 1 and finite"):
            replace(solver, gain=gain)


def test_a_large_gain_is_right_for_all_rows():
    """Where a few rows meet a rougher field, rows like them may be accepted by chance."""

    class RoughFarOut(torch.nn.Module):
        def forward(self, t, x, context=None):
            rough = torch.sin(30 * (x - 5)) * torch.sigmoid(8 * (x - 4))
            return torch.sin(4 * x + 3 * t) + rough

    flow = Flow([ContinuousTransform(ModuleField(RoughFarOut(), 1))])
    x, far = torch.randn(490, 1).clamp(-2.5, 2.5), 5 + torch.rand(22, 1) - 0.5
    gains = []
    for some in (x, torch.cat([x, far])):
        flow.only_ode.solver = ODESolver()
        flow.calibrate(some, accuracy=1e-4)
        gains.append(flow.only_ode.solver.gain)
    assert gains[0] > 8
    assert gains[1] <= 4


@pytest.mark.parametrize("number", [1, 2, 5])
def test_few_rows_are_too_few_to_learn_a_gain(number):
    flow = rough()
    x, _ = rows(flow, 200)
    flow.calibrate(x[:number], accuracy=1e-3)
    assert flow.only_ode.solver.gain == 1
    error = (flow.log_prob(x) - flow.using(solver=FINE).log_prob(x)).abs()
    assert error.quantile(0.99) < 1e-3


@pytest.mark.parametrize("start_time", [0.9, 0.999])
def test_a_short_span_of_late_times_is_calibrated(start_time):
    """Whose shares float32 rounds more coarsely."""
    flow = rough(start_time=start_time).float()
    x = torch.randn(100, 2, dtype=torch.float32)
    flow.calibrate(x)
    error = flow.log_prob(x) - flow.using(solver=ODESolver(method="rk4", steps=50)).log_prob(x)
    assert error.abs().max() < 1e-3


@pytest.mark.parametrize("times", [None, (0.0, 0.5, 1.0)])
def test_what_overflows_its_dtype_is_refused(times):
    accuracy = None if times is None else 0.1
    steps = 4 if times is None else None
    solver = ODESolver(method="rk4", steps=steps, times=times, accuracy=accuracy)

    class Away(torch.nn.Module):
        def forward(self, t, x, context=None):
            return torch.full_like(x, -3e38)

    flow = Flow([ContinuousTransform(ModuleField(Away(), 1), solver=solver)]).float()
    with pytest.raises(ODEError, match="reached NaN or inf"):
        flow.log_prob(torch.full((3, 1), 1e38, dtype=torch.float32))


def test_samples_have_their_density_and_come_back():
    flow = rough()
    x, _ = rows(flow, 500)
    flow.calibrate(x, accuracy=1e-3)
    x, log_prob = flow.sample_and_log_prob(500)
    assert (flow.log_prob(x) - log_prob).abs().max() < 5e-3
    torch.testing.assert_close(flow.to_data(flow.to_base(x)), x, rtol=0, atol=1e-3)
    alone = torch.stack([flow.to_data(flow.to_base(row)) for row in x[:10]])
    together = flow.to_data(flow.to_base(torch.cat([x[:10], 10 + x])))[:10]
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [1.0, 1e-9], ids=["anywhere", "near 0"])
def test_points_are_within_the_accuracy_too(size):
    """Also near 0 at the base, where their distance hardly changes the log-density."""
    flow = rough()
    flow, fine = flow.using(solver=COARSE), flow.using(solver=FINE)
    z = size * torch.randn(50, 2)
    x = fine.to_data(z)
    torch.testing.assert_close(flow.to_base(x), z, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.to_data(z), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.to_data_and_ladj(z)[0], x, rtol=0, atol=1e-6)


def test_a_change_that_is_small_by_chance_is_not_believed():
    """Of many points on a coarse grid, some change little though they are not right yet."""

    class Wave(torch.nn.Module):
        def forward(self, t, x, context=None):
            return 2 * torch.sin(20 * t + 3 * x)

    times = torch.linspace(0, 1, 13).tolist()
    solver = ODESolver(method="rk4", times=times, accuracy=1e-3)
    plain, coarser = replace(solver, accuracy=None), solver.coarser()
    flow = Flow([ContinuousTransform(ModuleField(Wave(), 1), solver=solver)])
    z = torch.linspace(-1, 1, 4000).unsqueeze(-1)
    x, before = (flow.using(solver=each).to_data(z) for each in (plain, coarser))
    true = flow.using(solver=FINE).to_data(z)
    is_by_chance = ((x - before).abs() < 5e-4) & ((x - true).abs() > 1e-3)
    assert is_by_chance.sum() > 3
    assert (flow.to_data(z) - true).abs().max() < 1e-3


def test_points_that_settle_once_within_the_budget_are_returned():
    solver = ODESolver(
        method="rk4", times=(0, 0.25, 0.5, 0.75, 1), accuracy=1e-2, max_evaluations=16
    )
    flow = CNF(2).using(solver=solver)
    z = torch.randn(20, 2)
    torch.testing.assert_close(flow.to_data(flow.to_base(z)), z, rtol=0, atol=1e-2)
    with pytest.raises(ODEError, match=r"the point does not settle .* in row"):
        rough().using(solver=replace(solver, accuracy=1e-9)).to_base(z)


@pytest.mark.parametrize("steps", [4, 12])
def test_points_come_back_through_a_map_that_stretches(steps):
    """Also if all settle at once."""

    class Away(torch.nn.Module):
        def forward(self, t, x, context=None):
            return 6 * x  # errors at the base grow by exp(6) on the way back

    times = torch.linspace(0, 1, steps + 1).tolist()
    solver = ODESolver(method="rk4", times=times, accuracy=1e-3)
    flow = Flow([ContinuousTransform(ModuleField(Away(), 2), solver=solver)])
    x = torch.linspace(-1, 1, 100).unsqueeze(-1).expand(-1, 2)
    torch.testing.assert_close(flow.to_data(flow.to_base(x)), x, rtol=0, atol=1e-3)


def test_gradients_are_those_of_a_fine_solve():
    flow = rough(solver=ODESolver(gradient="backprop"))
    x, _ = rows(flow, 50)
    flow.calibrate(x, accuracy=1e-6)
    found, expected = (
        torch.autograd.grad(each.log_prob(x).sum(), list(flow.parameters()))
        for each in (flow, flow.using(solver=replace(FINE, gradient="backprop")))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_who_asks_for_gradients_does_not_matter():
    flow = rough()
    x, _ = rows(flow, 50)
    flow.calibrate(x)
    with torch.no_grad():
        expected = flow.log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-12)


def test_probes_stay_with_their_rows():
    """An estimate is as near to the same estimate on a fine grid as an exact one."""
    flow = rough(3, divergence=Hutchinson(probes=2))
    x, _ = rows(flow)
    flow.calibrate(x, accuracy=1e-3, generator=torch.Generator().manual_seed(1))
    found, expected = (
        each.log_prob(x, generator=torch.Generator().manual_seed(0))
        for each in (flow, flow.using(solver=FINE))
    )
    assert (found - expected).abs().max() < 1e-3


def test_what_is_drawn_before_the_solve_is_drawn_once():
    flow = Flow([Dequantize(2, levels=8), ContinuousTransform(mlp())])
    x = torch.randint(8, (60, 2)).double()
    flow.calibrate(x, accuracy=1e-4)
    found, expected = (
        each.log_prob(x, generator=torch.Generator().manual_seed(0))
        for each in (flow, flow.using(solver=FINE))
    )
    assert (found - expected).abs().max() < 1e-4


def test_nested_and_several_transforms_are_calibrated():
    inner = FactorOut([ContinuousTransform(mlp(1))], features=2)
    flow = Flow([perturbed(Affine(2)), ContinuousTransform(mlp()), inner])
    assert flow.accuracy is None
    x, _ = rows(flow)
    flow.calibrate(x, accuracy=1e-3)
    assert flow.accuracy == pytest.approx(2e-3)  # each solve adds its error
    error = flow.log_prob(x) - flow.using(solver=FINE).log_prob(x)
    assert error.abs().max() < 2e-3


def test_a_file_and_a_copy_keep_the_calibration(tmp_path):
    flow = CNF(2)
    x, _ = rows(flow)
    flow.initialize(x)
    flow.calibrate(x)
    save(flow, tmp_path / "flow.safetensors")
    loaded = load(tmp_path / "flow.safetensors")
    assert loaded.accuracy == flow.accuracy
    assert loaded.only_ode.solver == flow.only_ode.solver
    torch.testing.assert_close(loaded.log_prob(x), flow.log_prob(x))


def test_a_row_that_does_not_settle_is_named():
    flow = rough()
    x, _ = rows(flow)
    flow.calibrate(x, accuracy=1e-3)
    solver = flow.only_ode.solver
    first = 4 * (len(solver.times) - 1)
    stiff = flow.using(solver=replace(solver, accuracy=1e-9, max_evaluations=first))
    with pytest.raises(ODEError, match=r"does not settle within accuracy=1e-09 in rows 0, 1"):
        stiff.log_prob(x[:4])
    with pytest.raises(ODEError, match=r"in rows \(0, 0\), \(0, 1\)"):
        stiff.log_prob(x[:4].view(2, 2, 2))


def test_vmap_takes_the_grid_as_it_is():
    flow = rough(solver=ODESolver(gradient="backprop"))
    x, _ = rows(flow, 10)
    flow.calibrate(x, accuracy=1e-4)
    with torch.no_grad():
        found = torch.vmap(flow.log_prob)(x)
        assert (found - flow.log_prob(x)).abs().max() < 1e-3


def test_what_cannot_be_calibrated_is_refused():
    flow = Flow([Affine(2)])
    with pytest.raises(ValueError, match="must have a ContinuousTransform"):
        flow.calibrate(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="behind it there is Affine"):
        Flow([ContinuousTransform(mlp()), Affine(2)]).calibrate(torch.zeros(3, 2))
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="StandardNormal or UniformOnManifold base; got"):
        Flow([ContinuousTransform(mlp())], TorchBase(normal)).calibrate(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="solved the other way"):
        Flow([Inverse(ContinuousTransform(mlp()))]).calibrate(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="max_evaluations must be at least 256"):
        rough(solver=ODESolver(max_evaluations=100)).calibrate(torch.randn(3, 2))
    flow = rough()
    x, _ = rows(flow)
    with pytest.raises(ValueError, match="accuracy must be positive"):
        flow.calibrate(x, accuracy=0)
    with pytest.raises(ValueError, match="at least one row"):
        flow.calibrate(x[:0])
    with pytest.raises(ODEError, match="does not reach accuracy"):
        flow.using(solver=ODESolver(max_evaluations=520)).calibrate(x, accuracy=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "rk4", "steps": 4},
        {"method": "rk4", "times": (0, 1)},
        {"method": "rk4", "times": (0, 0.1, 0.5, 1)},
        {"method": "euler", "times": (0, 0.5, 1)},
    ],
)
def test_an_accuracy_that_the_grid_cannot_show_is_refused(settings):
    with pytest.raises(ValueError, match="accuracy is for method='rk4' with times of an even"):
        ODESolver(accuracy=1e-3, **settings)
