"""Laws of the lean arithmetic of adaptive methods: torchdiffeq's own is the oracle."""

import importlib.util
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torchdiffeq import odeint  # noqa: TID251 - the oracle
from torchdiffeq._impl.odeint import SOLVERS  # noqa: TID251 - the oracle's tableaus

from cnf import ODEError, ODESolver
from cnf.ode import methods
from cnf.ode.runge_kutta import constant, moved, tableau, take_step

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

ADAPTIVE = [name for name, kind in methods().items() if kind == "adaptive"]
METHOD = pytest.mark.parametrize("method", ADAPTIVE)
TIMES = pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0), (0.1, 0.2, 0.7, 0.9)], ids=str)
TOLERANCE = 1e-4


class System:
    """A state of two tensors whose rates depend on both and on t."""

    def __init__(self):
        self.weight = torch.randn(3, 3, requires_grad=True)
        self.evaluations = 0

    def __call__(self, t, state):
        self.evaluations += 1
        x, ladj = state
        return torch.cos(7 * t) * (x @ self.weight).tanh() - ladj[..., None], x.sum(-1) * t


def start():
    x = torch.randn(5, 3, requires_grad=True)
    return x, x.new_zeros(5)


def largest_rms(parts):
    return torch.stack([part.detach().square().mean().sqrt() for part in parts]).max()


def as_torchdiffeq(system, state, times, method, stops):
    options = {"step_t": stops.detach(), "norm": largest_rms}
    tolerances = {"rtol": TOLERANCE, "atol": TOLERANCE}
    return odeint(system, state, times, method=method, options=options, **tolerances)


def ours(system, state, times, method, gradient="backprop", tolerance=TOLERANCE):
    solver = ODESolver(
        method=method,
        rtol=tolerance,
        atol=tolerance,
        error_norm="points_and_ladj",
        gradient=gradient,
    )
    return solver.solve(system, state, times, dependencies=lambda: [system.weight])


@METHOD
@TIMES
@pytest.mark.parametrize("with_gradient", [False, True])
def test_steps_states_and_gradients_are_those_of_torchdiffeq(method, times, with_gradient):
    system, state = System(), start()
    times = torch.tensor(times)
    # Between its steps only dopri5 is asked, which is as precise there as at their ends.
    stops = times[-1:] if method == "dopri5" else times[1:]
    found = []
    with torch.set_grad_enabled(with_gradient):
        for solve, rest in ((ours, ()), (as_torchdiffeq, (stops,))):
            system.evaluations = 0
            solution = solve(system, state, times, method, *rest)
            found.append([system.evaluations, *solution])
            if with_gradient:
                mean = sum((part[1:] ** 2).sum() for part in solution)
                found[-1] += torch.autograd.grad(mean, [state[0], system.weight])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@METHOD
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_the_gradient_in_the_times_is_the_rate_there(method, gradient):
    system, state = System(), start()
    times = torch.tensor([0.0, 0.4, 1.0], requires_grad=True)
    states, _ = ours(system, state, times, method, gradient, tolerance=1e-5)
    (found,) = torch.autograd.grad(states[-1].sum(), times)
    with torch.no_grad():
        ends = ours(system, state, torch.tensor([0.0, 1.0]), method)
        at_end = system(torch.tensor(1.0), [part[-1] for part in ends])[0].sum()
    torch.testing.assert_close(found[-1], at_end, rtol=1e-2, atol=1e-2)


def test_a_first_step_that_is_the_whole_way_moves_with_the_end():
    times = torch.tensor([0.0, 1.0], requires_grad=True)
    solver = ODESolver(first_step=1.0, gradient="backprop")
    (states,) = solver.solve(lambda t, state: (2 * torch.ones_like(state[0]),), start()[:1], times)
    (found,) = torch.autograd.grad(states[-1].mean(), times)
    torch.testing.assert_close(found, torch.tensor([-2.0, 2.0]))


@METHOD
@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0)], ids=str)
def test_a_jump_at_the_end_is_not_seen(method, times):
    def rhs(t, state):
        return (torch.where(t == times[-1], 1e6, 1.0) * torch.ones_like(state[0]),)

    x = torch.zeros(2, 3)
    (states,) = ODESolver(method=method).solve(rhs, (x,), torch.tensor(times))
    torch.testing.assert_close(states[-1], x + times[-1] - times[0])


@METHOD
def test_a_step_is_differentiable_in_its_times_state_and_rate(method):
    system = System()

    def end(y0, f0, t0, t1):
        def rhs(t, y):
            return torch.cos(7 * t) * (y @ system.weight.detach()).tanh()

        y1, stages = take_step(rhs, y0, f0, t0, t1, tableau(SOLVERS[method]))
        return y1, stages[-1]

    y0, f0 = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    t0, t1 = (torch.tensor(t, requires_grad=True) for t in (0.2, 0.7))
    assert torch.autograd.gradcheck(end, (y0, f0, t0, t1))
    assert torch.autograd.gradgradcheck(end, (y0, f0, t0, t1))


@METHOD
@pytest.mark.parametrize("first_step", [None, 0.1])
def test_forward_mode_is_reverse_mode_for_steps_of_these_sizes(method, first_step):
    system = System()
    solver = ODESolver(
        method=method, rtol=1e-3, atol=1e-3, gradient="backprop", first_step=first_step
    )

    def end(x):
        states, ladj = solver.solve(system, (x, x.new_zeros(5)), torch.tensor([0.0, 1.0]))
        return states[-1].square().sum(-1) + ladj[-1]

    x, direction = start()[0], torch.randn(5, 3)
    _, forward = torch.func.jvp(end, (x.detach(),), (direction,))
    (reverse,) = torch.autograd.grad(end(x).sum(), x)
    torch.testing.assert_close(forward, (reverse * direction).sum(-1), rtol=1e-9, atol=1e-9)


def test_forward_mode_sees_the_size_of_a_step():
    def end(size):
        return moved(torch.ones(3), constant(size), [0.25, 0.0, 0.5], [torch.ones(3)] * 3)

    value, slope = torch.func.jvp(end, (torch.tensor(0.4),), (torch.ones(()),))
    torch.testing.assert_close(value, torch.full((3,), 1.3))
    torch.testing.assert_close(slope, torch.full((3,), 0.75))


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
@pytest.mark.parametrize("method", methods())
def test_torchdiffeq_keeps_its_own_table_of_methods(method, gradient):
    if (method, gradient) == ("scipy_solver", "backprop"):
        pytest.skip("refused already")
    steps = {"steps": 2} if methods()[method] == "fixed" else {"rtol": 1e-2, "atol": 1e-2}
    solver = ODESolver(method=method, gradient=gradient, **steps)

    def solve(weight):
        x = torch.ones(2, 2, requires_grad=True)
        (states,) = solver.solve(lambda t, s: (weight * s[0],), (x,), torch.tensor([0.0, 1.0]))
        states.sum().backward()

    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(solve, weight) for weight in (1.0, math.nan, 0.5)]
        failed = [isinstance(job.exception(), ODEError) for job in jobs]
    assert failed == [False, True, False]

    spec = importlib.util.find_spec("torchdiffeq._impl.odeint")
    pristine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pristine)
    assert pristine.SOLVERS == SOLVERS
    assert list(methods()) == list(SOLVERS)
    with pytest.raises(ValueError, match="Invalid method") as refused:
        odeint(lambda t, x: x, torch.ones(1), torch.ones(2), method="none")
    assert "cnf" not in str(refused.value)
