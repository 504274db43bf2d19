"""Laws of what decides the steps of an adaptive method: the error it looks at, its first step."""

import math

import pytest
import torch
from zoo import cnf, perturbed

from cnf import CNF, ODEError, ODESolver, count_evaluations
from cnf.ode import methods
from cnf.transforms import ContinuousTransform
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

ADAPTIVE = [name for name, kind in methods().items() if kind == "adaptive"]
STAGES = {"dopri5": 6, "dopri8": 13, "bosh3": 3, "adaptive_heun": 1, "fehlberg2": 2}
DIRECTION = pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0)], ids=str)
METHOD = pytest.mark.parametrize("method", ADAPTIVE)
ACCURATE = pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun"])


class Known:
    """x' = A cos(3 t) x and a ladj with the rate of a wave of its own; both known at each time."""

    def __init__(self, wave):
        self.weight = 0.5 * torch.randn(2, 2)
        self.wave = wave
        self.seen = []

    def __call__(self, t, state):
        self.seen.append(t.detach().item())
        x, ladj = state
        return torch.cos(3 * t) * x @ self.weight.T, (5 * torch.cos(self.wave * t)).expand_as(ladj)

    def solution(self, x, start, end):
        def integral(wave):
            return (math.sin(wave * end) - math.sin(wave * start)) / wave

        ladj = torch.full(x.shape[:-1], 5 * integral(self.wave))
        return x @ torch.linalg.matrix_exp(integral(3) * self.weight).T, ladj


def solve(system, x, times, **settings):
    """Evaluations, and the largest error of the points and of the ladj."""
    system.seen.clear()
    states, ladj = ODESolver(**settings).solve(
        system, (x, x.new_zeros(x.shape[:-1])), torch.tensor(times)
    )
    expected = system.solution(x, times[0], times[-1])
    errors = (
        (found[-1] - part).abs().max().item()
        for found, part in zip((states, ladj), expected, strict=True)
    )
    return len(system.seen), *errors


@DIRECTION
@ACCURATE
def test_points_alone_take_fewer_evaluations_where_the_ladj_is_rougher(method, times):
    system, x = Known(wave=30), torch.randn(20, 2)
    tolerance = 1e-4
    settings = {"method": method, "rtol": tolerance, "atol": tolerance}
    both, error_of_both, ladj_error_of_both = solve(system, x, times, **settings)
    points, error, ladj_error = solve(system, x, times, error_norm="points", **settings)
    assert points < 0.8 * both
    assert max(error, error_of_both) < 100 * tolerance
    assert ladj_error_of_both < 100 * tolerance
    assert ladj_error > 2 * ladj_error_of_both


@DIRECTION
@ACCURATE
def test_points_alone_do_where_the_ladj_is_as_smooth(method, times):
    system, x = Known(wave=3), torch.randn(20, 2)
    tolerance = 1e-3 if method == "adaptive_heun" else 1e-5
    settings = {"method": method, "rtol": tolerance, "atol": tolerance}
    both, *_ = solve(system, x, times, **settings)
    points, error, ladj_error = solve(system, x, times, error_norm="points", **settings)
    assert points <= both
    assert error < 100 * tolerance
    assert ladj_error < 100 * tolerance


@DIRECTION
@pytest.mark.parametrize("rough", ["points", "ladj"])
def test_a_rough_row_among_many_keeps_the_tolerance_by_the_largest_error_only(rough, times):
    rows, tolerance = 10_000, 1e-4
    waves = torch.zeros(rows, 1)
    waves[7] = 30

    def rhs(t, state):
        wave = 5 * torch.cos(waves * t)
        return (wave, 0 * wave[:, 0]) if rough == "points" else (0 * wave, wave[:, 0])

    def error(error_norm):
        solver = ODESolver(rtol=tolerance, atol=tolerance, error_norm=error_norm)
        states = solver.solve(rhs, (torch.zeros(rows, 1), torch.zeros(rows)), torch.tensor(times))
        moved = states[rough == "ladj"][-1].reshape(-1)[7]
        return abs(float(moved) - (times[1] - times[0]) * 5 * math.sin(30) / 30)

    assert error("largest") < 10 * tolerance
    assert error("points_and_ladj") > 10 * tolerance


def test_the_likelihood_of_a_flow_by_its_points_stays_close():
    flow = cnf()
    x = torch.randn(50, 2)
    exact = flow.using(solver=ODESolver(rtol=1e-10, atol=1e-10)).log_prob(x)
    points = flow.using(solver=ODESolver(rtol=1e-5, atol=1e-5, error_norm="points")).log_prob(x)
    torch.testing.assert_close(points, exact, rtol=0, atol=1e-3)


def test_where_there_are_points_alone_the_control_changes_nothing():
    flow = cnf()
    x = torch.randn(5, 2)
    found = [
        flow.using(solver=ODESolver(error_norm=error_norm)).to_base(x)
        for error_norm in ("points", "points_and_ladj")
    ]
    assert torch.equal(*found)


@DIRECTION
def test_a_field_at_rest_takes_one_step_if_the_first_is_long_enough(times):
    transform = ContinuousTransform(LinearField(2))
    x = torch.randn(7, 2)
    evaluations = {}
    for first_step in (None, 0.1, 1.0, 50.0):
        part = transform.using(solver=ODESolver(first_step=first_step))
        move = part.to_data_and_ladj if times[0] == 0 else part.to_base_and_ladj
        with count_evaluations(part) as nfe:
            moved, ladj = move(x)
        torch.testing.assert_close(moved, x, rtol=1e-14, atol=0)
        assert torch.equal(ladj, torch.zeros(7))
        evaluations[first_step] = nfe.value
    # One for the rates at the start, one to choose the first step of 1e-6, and 6 for each step.
    assert evaluations == {None: 2 + 6 * 7, 0.1: 1 + 6 * 2, 1.0: 1 + 6, 50.0: 1 + 6}


@DIRECTION
@pytest.mark.parametrize("first_step", [1e-3, 0.1, 1.0, 10.0])
@ACCURATE
def test_the_first_step_changes_no_more_than_the_tolerance(method, first_step, times):
    system, x = Known(wave=3), torch.randn(20, 2)
    tolerance = 1e-3 if method == "adaptive_heun" else 1e-6
    settings = {"method": method, "rtol": tolerance, "atol": tolerance, "first_step": first_step}
    _, error, ladj_error = solve(system, x, times, **settings)
    assert max(error, ladj_error) < 100 * tolerance


@DIRECTION
def test_the_first_step_is_that_size(times):
    system, x = Known(wave=3), torch.randn(5, 2)
    solve(system, x, times, method="adaptive_heun", rtol=0.1, atol=0.1, first_step=0.125)
    first, second = system.seen[:2]
    assert abs(second - first) == pytest.approx(0.125)


@METHOD
def test_a_given_first_step_saves_the_evaluation_that_would_choose_it(method):
    x = torch.ones(3, 2)
    seen = []

    def rhs(t, state):
        seen.append(t.item())
        return (state[0] * 0 + 1,)

    for first_step in (None, 1.0):
        solver = ODESolver(method=method, rtol=1e-2, atol=1e-2, first_step=first_step)
        seen.clear()
        solver.solve(rhs, (x,), torch.tensor([0.0, 1.0]))
        if first_step is None:
            assert (len(seen) - 2) % STAGES[method] == 0
        else:
            assert len(seen) == 1 + STAGES[method]


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("times", [(0.0, 0.25, 0.5, 1.0), (1.0, 0.75, 0.5, 0.0)], ids=str)
def test_a_first_step_as_long_as_the_way_to_a_stop_misses_none(times, method, gradient):
    system, x = Known(wave=3), torch.randn(4, 2, requires_grad=True)
    solver = ODESolver(method=method, rtol=1e-2, atol=1e-2, first_step=0.25, gradient=gradient)
    states, _ = solver.solve(system, (x, torch.zeros(4)), torch.tensor(times))
    states.sum().backward()
    assert min(system.seen) >= 0
    assert max(system.seen) <= 1


def test_the_adjoint_takes_the_first_step_too():
    flow = perturbed(CNF(2, hidden_features=(8, 8), skip=False), 0.1)
    x = torch.randn(10, 2)

    def backward_evaluations(first_step):
        solver = ODESolver(rtol=1e-3, atol=1e-3, first_step=first_step, gradient="adjoint")
        tried = flow.using(solver=solver)
        loss = tried.log_prob(x).mean()
        with count_evaluations(tried) as nfe:
            loss.backward()
        return nfe.value

    assert backward_evaluations(1e-5) > backward_evaluations(0.2)


ROUGH = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]).unsqueeze(-1)
FAST = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]).unsqueeze(-1)
EMBEDDED = pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])


@EMBEDDED
def test_the_row_that_took_most_steps_is_named_not_the_one_that_moves_fast_at_the_end(method):
    seen = []

    def rhs(t, state):
        seen.append(float(t))
        swing = 300 * torch.cos(1000 * t) * torch.sigmoid(100 * (0.6 - t))
        burst = 1000 * torch.exp(-(((t - 0.8) / 0.02) ** 2))
        return (swing * ROUGH.to(t) + (20 + burst) * FAST.to(t) + 0 * state[0],)

    def solve(**settings):
        solver = ODESolver(method=method, rtol=1e-3, atol=1e-3, **settings)
        return solver.solve(rhs, (torch.ones(5, 2),), torch.tensor([0.0, 1.0]))

    solve()
    budget = next(i for i, t in enumerate(seen) if t > 0.8)
    with pytest.raises(ODEError, match=r"\d% of the error that sets the steps is in row 2\."):
        solve(max_evaluations=budget)


@EMBEDDED
def test_the_row_that_makes_the_adjoint_take_small_steps_is_named(method):
    def rhs(t, state):  # one row is rough once it is differentiated
        (x,) = state
        wave = 3e-3 * torch.sin(1e4 * x)
        return (x + wave * ROUGH.to(t) + 500 * t**3 * FAST.to(t),)

    x = torch.ones(5, 2).requires_grad_()
    solver = ODESolver(method=method, rtol=1e-2, atol=1e-2, gradient="adjoint", max_evaluations=150)
    (states,) = solver.solve(rhs, (x,), torch.tensor([0.0, 1.0]))
    with pytest.raises(ODEError, match=r"backward .* error that sets the steps is in row 2\."):
        states[-1].sum().backward()


@pytest.mark.parametrize(("method", "budget"), [("dopri5", 5), ("scipy_solver", 50)])
def test_no_row_is_blamed_where_no_errors_are_known(method, budget):
    def rhs(t, state):
        return (1000 * torch.cos(1000 * t) * ROUGH.to(t) + 1e4 * FAST.to(t) + 0 * state[0],)

    with pytest.raises(ODEError, match="not known which rows limit the steps"):
        ODESolver(method=method, gradient="adjoint", max_evaluations=budget).solve(
            rhs, (torch.ones(5, 2),), torch.tensor([0.0, 1.0])
        )
