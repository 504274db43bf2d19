"""Laws of the solver: accuracy, where it evaluates, gradients, and how it fails."""

import gc
import math
import re
import weakref
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torchdiffeq import odeint  # noqa: TID251 - the registry is compared with the library itself
from zoo import UserNetwork, mlp, perturbed

from cnf import ModuleField, ODEError, ODESolver
from cnf.ode import methods
from cnf.transforms import ContinuousTransform
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

KINDS = methods()
ADAPTIVE = [name for name, kind in KINDS.items() if kind == "adaptive"]
LOW_ORDER = ["fehlberg2", "adaptive_heun"]
FIXED = [name for name, kind in KINDS.items() if kind == "fixed"]
MULTISTEP = ["explicit_adams", "implicit_adams", "fixed_adams"]
DIRECTIONS = {"to data": (0.0, 1.0), "to base": (1.0, 0.0)}
PATHS = {
    **DIRECTIONS,
    "to data, with stops": (0.0, 0.31, 0.5, 1.0),
    "to base, with stops": (1.0, 0.77, 0.2, 0.0),
}
DIRECTION = pytest.mark.parametrize("times", DIRECTIONS.values(), ids=DIRECTIONS)
PATH = pytest.mark.parametrize("times", PATHS.values(), ids=PATHS)
GRADIENT = pytest.mark.parametrize("gradient", ["adjoint", "backprop", "checkpoint"])
ANEW = pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
"""Gradients whose backward pass evaluates anew."""


def solver_for(method, *, steps=100, tolerance=1e-7, **settings):
    """A solver with what its kind of method takes."""
    if KINDS[method] == "fixed":
        return ODESolver(method=method, steps=steps, **settings)
    if KINDS[method] == "external":
        settings["gradient"] = "adjoint"
    return ODESolver(method=method, rtol=tolerance, atol=tolerance, **settings)


class Swinging:
    """dx/dt = cos(3 t) A x and its closed-form solution; records when it is evaluated."""

    def __init__(self, weight):
        self.weight = weight
        self.seen = []

    def __call__(self, t, state):
        self.seen.append(t.detach().item())
        return (torch.cos(3 * t) * state[0] @ self.weight.T,)

    def solution(self, x, start, end):
        phase = (torch.sin(3 * end) - torch.sin(3 * start)) / 3
        return x @ torch.linalg.matrix_exp(phase * self.weight).T


def swinging():
    return Swinging(torch.randn(3, 3)), torch.randn(4, 3)


def error_at_the_end(solver, times):
    """Largest error of the last state."""
    torch.manual_seed(0)
    system, x = swinging()
    times = torch.tensor(times)
    (states,) = solver.solve(system, (x,), times)
    return (states[-1] - system.solution(x, times[0], times[-1])).abs().max().item()


def flow_of(field, context=None):
    """The right-hand side of x and ladj along a field."""

    def rhs(t, state):
        return field.velocity_and_divergence(t, state[0], context)

    return rhs


def start(x):
    return x, x.new_zeros(x.shape[:-1])


def test_methods_are_those_of_the_installed_torchdiffeq():
    with pytest.raises(ValueError, match="Must be one of") as refusal:
        odeint(lambda t, x: x, torch.ones(1), torch.tensor([0.0, 1.0]), method="nonsense")
    named = re.findall(r'"(\w+)"', str(refusal.value).partition("Must be one of")[2])
    ours = {f"cnf_{method}" for method in methods()}  # which it runs for us
    assert set(methods()) == set(named) - ours
    assert set(methods().values()) == {"adaptive", "fixed", "external"}


@PATH
@pytest.mark.parametrize("method", KINDS)
def test_every_method_solves_a_linear_system(method, times):
    solver = solver_for(method, tolerance=1e-6)
    field = perturbed(LinearField(2))
    x = torch.randn(4, 2)
    states, ladj = solver.solve(flow_of(field), start(x), torch.tensor(times))
    accuracy = 1e-2 if method == "euler" else 1e-3
    for i, time in enumerate(times):
        expected = field.solution(x, start=times[0], end=time)
        torch.testing.assert_close((states[i], ladj[i]), expected, rtol=0, atol=accuracy)


@DIRECTION
@pytest.mark.parametrize("method", ["dopri8", "dopri5", "bosh3", "adaptive_heun"])
def test_error_of_an_adaptive_method_falls_with_the_tolerance(method, times):
    loose, tight = (1e-2, 1e-6) if method in LOW_ORDER else (1e-4, 1e-8)
    error, small_error = (
        error_at_the_end(solver_for(method, tolerance=tolerance), times)
        for tolerance in (loose, tight)
    )
    assert error > 100 * small_error
    assert error < 100 * loose
    assert small_error < 100 * tight


@DIRECTION
@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)]
)
def test_error_of_a_fixed_method_falls_with_its_order(method, order, times):
    field = perturbed(LinearField(3))
    x = torch.randn(4, 3)
    expected, _ = field.solution(x, start=times[0], end=times[1])

    def error(steps):
        solver = ODESolver(method=method, steps=steps)
        states, _ = solver.solve(flow_of(field), start(x), torch.tensor(times))
        return (states[-1] - expected).norm().item()

    assert math.log2(error(20) / error(40)) == pytest.approx(order, abs=0.15)


@PATH
@pytest.mark.parametrize("method", KINDS)
def test_the_field_is_never_evaluated_outside_the_times(method, times):
    system, x = swinging()
    x.requires_grad_()
    solver = solver_for(method, steps=7, tolerance=1e-3, gradient="adjoint")
    (states,) = solver.solve(system, (x,), torch.tensor(times))
    forward = len(system.seen)
    states.square().sum().backward()
    assert len(system.seen) > forward > 0
    assert min(system.seen) >= 0
    assert max(system.seen) <= 1


@PATH
@pytest.mark.parametrize("method", ADAPTIVE)
def test_an_adaptive_adjoint_is_as_precise_as_its_tolerance(method, times):
    field = perturbed(LinearField(2))
    x = torch.randn(4, 2, requires_grad=True)
    weights = torch.randn(4, 2)
    tolerance = 1e-5 if method in LOW_ORDER else 1e-7
    moved, _ = solver_for(method, tolerance=tolerance, gradient="adjoint").solve(
        flow_of(field), start(x), torch.tensor(times), dependencies=lambda: list(field.parameters())
    )
    expected, _ = field.solution(x, start=times[0], end=times[-1])
    inputs = [x, *field.parameters()]
    # States between the ends are interpolated, to a lower order than the best methods have.
    factor = 1000 if len(times) > 2 or method in LOW_ORDER else 20
    torch.testing.assert_close(
        torch.autograd.grad((weights * moved[-1]).sum(), inputs),
        torch.autograd.grad((weights * expected).sum(), inputs),
        rtol=0,
        atol=factor * tolerance,
    )


@DIRECTION
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 49, 300])
def test_fixed_steps_are_equal_and_as_many_as_asked(steps, times):
    system, x = swinging()
    ODESolver(method="euler", steps=steps).solve(system, (x,), torch.tensor(times))
    expected = [times[0] + (times[1] - times[0]) * i / steps for i in range(steps)]
    assert system.seen == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("times", [torch.linspace(0, 1, 6), torch.linspace(1, 0, 11)], ids=len)
def test_stops_that_lie_on_the_steps_add_none(times, dtype):
    system = Swinging(torch.randn(3, 3, dtype=dtype))
    x = torch.randn(4, 3, dtype=dtype)
    ODESolver(method="euler", steps=20).solve(system, (x,), times.to(dtype))
    assert len(system.seen) == 20


@pytest.mark.parametrize(
    ("times", "steps", "taken"),
    [
        ((0.0, 0.31, 1.0), 10, 4 + 7),
        ((1.0, 0.69, 0.0), 10, 4 + 7),
        ((0.0, 0.1, 0.2, 1.0), 1, 3),
        ((0.2, 0.4), 5, 5),
        ((1.0, 0.0), 1, 1),
    ],
)
def test_each_stretch_between_stops_takes_its_share_of_steps_rounded_up(times, steps, taken):
    system, x = swinging()
    ODESolver(method="euler", steps=steps).solve(system, (x,), torch.tensor(times))
    assert len(system.seen) == taken
    assert set(times[:-1]) <= set(system.seen)


@PATH
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_adjoint_takes_the_same_fixed_steps_back(stages, times):
    system, x = swinging()
    method = {1: "euler", 2: "midpoint", 4: "rk4"}[stages]
    solver = ODESolver(method=method, steps=9, gradient="adjoint")
    (states,) = solver.solve(system, (x.requires_grad_(),), torch.tensor(times))
    forward = len(system.seen)
    states[-1].sum().backward()
    assert len(system.seen) == 2 * forward
    assert set(times[1:-1]) <= set(system.seen[forward:])


@PATH
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_each_stop_meets_the_closed_form(method, times):
    system, x = swinging()
    times = torch.tensor(times)
    (states,) = solver_for(method, steps=200, tolerance=1e-10).solve(system, (x,), times)
    expected = torch.stack([system.solution(x, times[0], time) for time in times])
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-7)
    assert torch.equal(states[0], x)


def test_a_row_does_not_feel_its_batch_beyond_the_tolerance():
    system, x = swinging()
    solver = ODESolver(rtol=1e-10, atol=1e-10)
    times = torch.tensor([0.0, 1.0])
    (together,) = solver.solve(system, (torch.cat([x, 100 * x]),), times)
    (alone,) = solver.solve(system, (x[:1],), times)
    torch.testing.assert_close(together[:, :1], alone, rtol=0, atol=1e-7)


def test_a_solve_leaves_nothing_behind():
    system, x = swinging()
    solver = ODESolver()
    times = torch.tensor([0.0, 1.0])
    before = dict(vars(solver))
    (first,) = solver.solve(system, (x,), times)
    (second,) = solver.solve(system, (x,), times)
    assert torch.equal(first, second)
    assert vars(solver) == before


@GRADIENT
@PATH
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_are_those_of_the_closed_form(method, times, gradient):
    field = perturbed(LinearField(3, 2))
    x = torch.randn(4, 3, requires_grad=True)
    context = torch.randn(4, 2, requires_grad=True)
    inputs = [x, context, *field.parameters()]
    solver = solver_for(method, steps=50, tolerance=1e-10, gradient=gradient)
    solved = solver.solve(
        flow_of(field, context), start(x), torch.tensor(times), dependencies=lambda: inputs[1:]
    )
    closed = [field.solution(x, context, start=times[0], end=time) for time in times]
    expected = [torch.stack(parts) for parts in zip(*closed, strict=True)]
    weights = [torch.randn_like(part) for part in solved]

    def gradients(parts):
        loss = sum((w * part).sum() for w, part in zip(weights, parts, strict=True))
        return torch.autograd.grad(loss, inputs)

    torch.testing.assert_close(gradients(solved), gradients(expected), rtol=0, atol=1e-6)


@GRADIENT
@PATH
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_of_the_times_are_those_of_the_closed_form(method, times, gradient):
    system, x = swinging()
    times = torch.tensor(times, requires_grad=True)
    solver = solver_for(method, steps=100, tolerance=1e-10, gradient=gradient)
    (states,) = solver.solve(system, (x,), times)
    expected = torch.stack([system.solution(x, times[0], time) for time in times])
    weights = torch.randn_like(states)
    torch.testing.assert_close(
        torch.autograd.grad((weights * states).sum(), times),
        torch.autograd.grad((weights * expected).sum(), times),
        rtol=0,
        atol=1e-6,
    )


@GRADIENT
@pytest.mark.parametrize("direction", ["to_base_and_ladj", "to_data_and_ladj"])
def test_a_context_made_by_a_network_passes_its_gradient_on(direction, gradient):
    field = perturbed(LinearField(2, 3))
    encoder = torch.nn.Linear(5, 3)
    solver = ODESolver(rtol=1e-10, atol=1e-10, gradient=gradient)
    transform = ContinuousTransform(field, solver=solver)
    x, context = torch.randn(4, 2), encoder(torch.randn(4, 5))
    moved, _ = getattr(transform, direction)(x, context)
    times = (1.0, 0.0) if direction == "to_base_and_ladj" else (0.0, 1.0)
    expected, _ = field.solution(x, context, start=times[0], end=times[1])
    weights = torch.randn_like(x)
    inputs = [context, *encoder.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((weights * moved).sum(), inputs, retain_graph=True),
        torch.autograd.grad((weights * expected).sum(), inputs),
        rtol=0,
        atol=1e-6,
    )


@GRADIENT
def test_frozen_parameters_take_no_gradient_and_spoil_none(gradient):
    field = perturbed(LinearField(3, 2))
    field.weight.requires_grad_(False)
    x, context = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    solver = ODESolver(rtol=1e-10, atol=1e-10, gradient=gradient)
    moved, _ = ContinuousTransform(field, solver=solver).to_base_and_ladj(x, context)
    expected, _ = field.solution(x, context, start=1.0, end=0.0)
    inputs = [x, field.bias, field.context_weight]
    torch.testing.assert_close(
        torch.autograd.grad(moved.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        rtol=0,
        atol=1e-6,
    )
    assert field.weight.grad is None


@GRADIENT
@pytest.mark.parametrize(
    "make", [mlp, lambda: ModuleField(UserNetwork(2), 2)], ids=["forward mode", "reverse mode"]
)
def test_where_nothing_requires_a_gradient_there_is_no_graph(make, gradient):
    transform = ContinuousTransform(make(), solver=ODESolver(gradient=gradient))
    x = torch.randn(3, 2)
    with torch.no_grad():
        expected = transform.to_base_and_ladj(x)
    frozen = transform.requires_grad_(False).to_base_and_ladj(x)
    torch.testing.assert_close(frozen, expected, rtol=0, atol=1e-12)
    assert not any(part.requires_grad for part in (*expected, *frozen))


@GRADIENT
def test_a_field_with_nothing_to_learn_still_passes_gradients_to_x(gradient):
    field = ModuleField(UserNetwork(2), 2).requires_grad_(False)
    solver = ODESolver(method="rk4", steps=5, gradient=gradient)
    x = torch.randn(1, 2, requires_grad=True)
    _, ladj = ContinuousTransform(field, solver=solver).to_base_and_ladj(x)
    (gradient,) = torch.autograd.grad(ladj.sum(), x)

    def ladj_at(point):
        with torch.no_grad():
            return ContinuousTransform(field, solver=solver).to_base_and_ladj(point)[1].item()

    for i, shift in enumerate(1e-4 * torch.eye(2)):
        slope = (ladj_at(x + shift) - ladj_at(x - shift)) / 2e-4
        assert gradient[0, i].item() == pytest.approx(slope, abs=1e-5)


FAILING = ["dopri5", "dopri8", "bosh3", "euler", "rk4", "explicit_adams", "scipy_solver"]


def message(what, where):
    """Pattern of a whole message: method, what, time, evaluations, rows, remedy."""
    return rf"^the solve with \w+ {what}, at t = [\d.e+-]+ after \d+ evaluations; .*{where}"


NOT_FINITE = "reached NaN or inf"
BOUND = r" The field may be undefined there or grow without bound: bound its output, .*\.$"
STIFF = (
    r" The field may be stiff, rough or random: loosen rtol and atol, raise max_evaluations, .*\.$"
)


def beyond_half(times):
    """A time threshold that a solve reaches after half its way, as a predicate of t."""
    return (lambda t: t > 0.5) if times[0] < times[-1] else (lambda t: t < 0.5)


@DIRECTION
@pytest.mark.parametrize(
    ("method", "value"),
    # scipy steps back from inf until its budget is spent: another law.
    [(m, v) for m in FAILING for v in (math.nan, math.inf) if (m, v) != ("scipy_solver", math.inf)],
)
def test_a_bad_velocity_is_an_error_that_names_the_row(method, value, times):
    beyond = beyond_half(times)

    def rhs(t, state):
        rate = state[0].clone()
        if beyond(t):
            rate[3] = value
        return (rate,)

    solver = solver_for(method, steps=10)
    with pytest.raises(ODEError, match=message(NOT_FINITE, rf"is not finite in row 3\.{BOUND}")):
        solver.solve(rhs, (torch.randn(6, 2),), torch.tensor(times))


@DIRECTION
@pytest.mark.parametrize("method", FAILING)
def test_a_bad_divergence_is_an_error_that_names_the_row(method, times):
    beyond = beyond_half(times)

    def rhs(t, state):
        divergence = torch.ones(6)
        if beyond(t):
            divergence[4] = math.nan
        return state[0], divergence

    solver = solver_for(method, steps=10)
    with pytest.raises(ODEError, match=message(NOT_FINITE, rf"is not finite in row 4\.{BOUND}")):
        solver.solve(rhs, start(torch.randn(6, 2)), torch.tensor(times))


@DIRECTION
@pytest.mark.parametrize("method", FAILING)
def test_a_velocity_that_is_nan_from_the_start_is_an_error_at_once(method, times):
    calls = []

    def rhs(t, state):
        calls.append(t)
        return (math.nan * state[0],)

    rows = r"is not finite in rows 0, 1, 2, 3, 4, … \(8 of 8\)\."
    with pytest.raises(ODEError, match=message(NOT_FINITE, rows)):
        solver_for(method, steps=50).solve(rhs, (torch.randn(8, 2),), torch.tensor(times))
    assert len(calls) <= 8


@pytest.mark.parametrize(
    ("batch", "bad", "rows"),
    [
        ((), (), "the only row"),
        ((4,), (2,), "row 2"),
        ((3, 4), (1, 2), r"row \(1, 2\)"),
        ((5,), slice(1, 4), "rows 1, 2, 3"),
        ((9,), slice(2, 9), r"rows 2, 3, 4, 5, 6, … \(7 of 9\)"),
    ],
    ids=str,
)
def test_rows_are_named_in_any_batch_shape(batch, bad, rows):
    def rhs(t, state):
        rate = state[0].clone()
        rate[bad] = math.nan
        return rate, state[1]

    with pytest.raises(ODEError, match=rf"is not finite in {rows}\."):
        ODESolver().solve(rhs, start(torch.randn(*batch, 2)), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_blow_up_stops_when_it_happens_and_names_its_row(method):
    def rhs(t, state):
        return (state[0] ** 2,)

    x = torch.full((4, 2), 0.1)
    x[1] = 4.0  # 1 / (1/4 - t) is infinite at t = 1/4, the other rows much later
    solver = solver_for(method, tolerance=1e-3, max_evaluations=1500)
    what = "(needs steps too small for the time to advance|spent its budget .*|reached NaN or inf)"
    with pytest.raises(ODEError, match=message(what, r"in row 1\..*")) as failure:
        solver.solve(rhs, (x,), torch.tensor([0.0, 1.0]))
    reached = float(re.search(r"at t = (\S+) after", str(failure.value))[1])
    assert reached == pytest.approx(0.25, rel=0.15)


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_a_fixed_method_that_overflows_is_an_error(method):
    def rhs(t, state):
        return (state[0] ** 3,)

    x = torch.full((4, 2), 0.1)
    x[2] = 20.0
    with pytest.raises(ODEError, match=message("reached NaN or inf", rf"in row 2\.{BOUND}")):
        ODESolver(method=method, steps=30).solve(rhs, (x,), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("method", ["euler", "rk4", "scipy_solver"])
def test_nan_in_the_very_last_step_is_an_error(method):
    def rhs(t, state):
        return (state[0] if t < 0.95 else math.nan * state[0],)

    solver = solver_for(method, steps=20)
    with pytest.raises(ODEError, match=message("reached NaN or inf", "is not finite in rows")):
        solver.solve(rhs, (torch.randn(3, 2),), torch.tensor([0.0, 1.0]))


@DIRECTION
@pytest.mark.parametrize("method", [name for name in KINDS if methods()[name] != "fixed"])
def test_a_spent_budget_is_an_error_before_the_next_evaluation(method, times):
    system, x = swinging()
    solver = solver_for(method, tolerance=1e-9, max_evaluations=30)
    what = r"spent its budget of max_evaluations=30, at t = [\d.e+-]+ after 30 evaluations; "
    rows = r"\d+% of the error that sets the steps is in rows? \d"
    remedy = f"({rows}|it is not known which rows limit the steps).*{STIFF}"
    with pytest.raises(ODEError, match=rf"the solve with {method} {what}{remedy}"):
        solver.solve(system, (x,), torch.tensor(times))
    assert len(system.seen) == 30


@PATH
def test_exactly_the_budget_is_enough(times):
    system, x = swinging()
    steps = ODESolver(method="rk4", steps=10)
    steps.solve(system, (x,), torch.tensor(times))
    needed = len(system.seen)
    ODESolver(method="rk4", steps=10, max_evaluations=needed).solve(
        system, (x,), torch.tensor(times)
    )
    system.seen.clear()
    with pytest.raises(ODEError, match=r"(spent its budget|needs at least)"):
        ODESolver(method="rk4", steps=10, max_evaluations=needed - 1).solve(
            system, (x,), torch.tensor(times)
        )
    assert len(system.seen) < needed


def test_a_method_that_steps_back_from_inf_stops_at_its_budget():
    def rhs(t, state):
        return (state[0] if t < 0.5 else math.inf * state[0],)

    solver = ODESolver(method="scipy_solver", gradient="adjoint", max_evaluations=500)
    with pytest.raises(ODEError, match=r"spent its budget of max_evaluations=500, at t = 0\.\d+ "):
        solver.solve(rhs, (torch.randn(3, 2),), torch.tensor([0.0, 1.0]))


@DIRECTION
@pytest.mark.parametrize(
    ("method", "gradient"),
    [
        ("rk4", "adjoint"),
        ("dopri5", "adjoint"),
        ("scipy_solver", "adjoint"),
        ("rk4", "checkpoint"),
        ("dopri5", "checkpoint"),
    ],
)
def test_each_backward_pass_has_the_budget_anew(method, gradient, times):
    system, x = swinging()
    solver = solver_for(method, steps=10, gradient=gradient)
    (states,) = solver.solve(system, (x.requires_grad_(),), torch.tensor(times))
    forward = len(system.seen)
    loss = states[-1].sum()
    loss.backward(retain_graph=True)
    backward = len(system.seen) - forward

    tight = replace(solver, max_evaluations=max(forward, backward))
    (states,) = tight.solve(system, (x,), torch.tensor(times))
    for _ in range(3):
        states[-1].sum().backward(retain_graph=True)


@DIRECTION
def test_the_budget_holds_for_the_adjoint_too(times):
    def rhs(t, state):  # rough once it is differentiated
        return (state[0] + 1e-3 * torch.sin(3e3 * state[0]),)

    x = torch.randn(3, 2, requires_grad=True)
    solver = ODESolver(rtol=1e-2, atol=1e-2, gradient="adjoint", max_evaluations=60)
    (states,) = solver.solve(rhs, (x,), torch.tensor(times))
    what = "the backward solve with dopri5 spent its budget of max_evaluations=60, at t = "
    with pytest.raises(ODEError, match=what):
        states[-1].sum().backward()


@DIRECTION
@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize(
    ("method", "gradient"),
    [
        *((method, "adjoint") for method in ("rk4", "euler", "dopri5", "scipy_solver")),
        *((method, "checkpoint") for method in ("rk4", "euler", "dopri5")),
    ],
)
def test_nan_that_only_the_backward_pass_meets_is_an_error_that_names_the_row(
    method, gradient, steps, times
):
    def rhs(t, state):
        return (state[0].square().sum(-1, keepdim=True).sqrt() + 0 * state[0],)  # no slope at 0

    x = torch.ones(3, 2)
    x[1] = 0
    solver = solver_for(method, steps=steps, gradient=gradient)
    (states,) = solver.solve(rhs, (x.requires_grad_(),), torch.tensor(times))
    what = rf"the backward solve with {method} reached .*the gradient of the field .* in row 1: "
    with pytest.raises(ODEError, match=what):
        states[-1].sum().backward()


@ANEW
def test_exchanged_parameters_are_an_error_not_a_wrong_gradient(gradient):
    field = LinearField(2)
    x = torch.randn(3, 2)
    weight = torch.eye(2, requires_grad=True)

    def gradient_by(solver):
        transform = ContinuousTransform(field, solver=solver)
        call = torch.func.functional_call
        z = call(_ToBase(transform), {"transform.vector_field.weight": weight}, (x,))
        return torch.autograd.grad(z.sum(), weight)[0]

    with pytest.raises(RuntimeError, match=r"were replaced .* use gradient='backprop'"):
        gradient_by(ODESolver(gradient=gradient))

    expected = torch.autograd.grad((x @ torch.linalg.matrix_exp(-weight).T).sum(), weight)[0]
    found = gradient_by(ODESolver(rtol=1e-5, atol=1e-5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class _ToBase(torch.nn.Module):
    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, x):
        return self.transform.to_base(x)


class _Odd(torch.nn.Module):
    """Keeps a tensor in a plain attribute and another in a buffer."""

    def __init__(self):
        super().__init__()
        self.plain = torch.randn(2, requires_grad=True)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, t, x):
        return torch.sin(x * self.plain) * self.scale


def test_each_gradient_reaches_a_plain_attribute_of_a_network():
    network, x = _Odd(), torch.randn(3, 2)
    found = []
    for gradient in ("adjoint", "backprop", "checkpoint"):
        solver = ODESolver(rtol=1e-9, atol=1e-9, gradient=gradient)
        transform = ContinuousTransform(ModuleField(network, 2), solver=solver)
        found.append(torch.autograd.grad(transform.to_base(x).sum(), network.plain)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-7)


@ANEW
def test_a_buffer_changed_before_the_backward_pass_is_an_error(gradient):
    network = _Odd()
    solver = ODESolver(gradient=gradient)
    z = ContinuousTransform(ModuleField(network, 2), solver=solver).to_base(torch.randn(3, 2))
    network.scale.mul_(3)
    with pytest.raises(RuntimeError, match="replaced or changed between a solve and its backward"):
        z.sum().backward()


@GRADIENT
def test_a_solve_is_freed_without_the_garbage_collector(gradient):
    field = perturbed(LinearField(2, 3))
    transform = ContinuousTransform(field, solver=ODESolver(gradient=gradient))
    gc.collect()
    gc.disable()
    try:
        context = torch.randn(4, 3) + 0
        alive = weakref.ref(context)
        transform.to_base(torch.randn(4, 2), context).sum().backward()
        del context
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("dtype", "fits"), [("bfloat16", 1e-2), ("float32", 1e-6)])
def test_tolerances_finer_than_the_dtype_are_refused(dtype, fits):
    dtype = getattr(torch, dtype)
    state, times = (torch.ones(1, 1, dtype=dtype),), torch.tensor([0.0, 1.0], dtype=dtype)
    too_fine = ODESolver(rtol=fits / 100, atol=fits / 100)
    with pytest.raises(ValueError, match=f"below the rounding of {dtype}"):
        too_fine.solve(lambda _, state: state, state, times)
    ODESolver(rtol=fits, atol=fits).solve(lambda _, state: state, state, times)


def test_a_row_outside_the_domain_of_a_field_is_named_through_the_transform():
    class Undefined(torch.nn.Module):
        def forward(self, t, x):
            return torch.log(x)

    transform = ContinuousTransform(ModuleField(Undefined(), 2))
    x = torch.ones(5, 2)
    x[3, 1] = -1.0
    with pytest.raises(ODEError, match=rf"is not finite in row 3\.{BOUND}"):
        transform.to_base_and_ladj(x)


@pytest.mark.parametrize("method", KINDS)
def test_an_exception_of_the_field_passes_unchanged(method):
    def rhs(t, state):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        solver_for(method).solve(rhs, (torch.ones(2, 2),), torch.tensor([0.0, 1.0]))


VALUE, TYPE = ValueError, TypeError
POSITIVE = r"must be positive and finite; got"


@pytest.mark.parametrize(
    ("settings", "error", "expected"),
    [
        ({"method": "rk5"}, VALUE, r"method must be one of .*dopri5, .*rk4, .*; got 'rk5'\."),
        ({"method": ""}, VALUE, r"method must be one of .*; got ''\."),
        *(
            ({name: value}, VALUE, rf"^{name} {POSITIVE} {value}\.")
            for name in ("rtol", "atol", "first_step")
            for value in (0.0, -1e-5, math.inf, math.nan)
        ),
        (
            {"gradient": "autograd"},
            VALUE,
            r"gradient must be one of adjoint, backprop, checkpoint; got 'autograd'\.",
        ),
        (
            {"error_norm": "ladj"},
            VALUE,
            r"error_norm must be one of largest, points_and_ladj, points; got 'ladj'\.",
        ),
        ({"max_evaluations": 0}, VALUE, r"max_evaluations must be at least 1; got 0\."),
        ({"max_evaluations": 1e4}, TYPE, r"max_evaluations must be an int; got 10000\.0\."),
        ({"max_evaluations": None}, TYPE, r"max_evaluations must be an int; got None\."),
        *(
            (
                {"method": method},
                VALUE,
                rf"method '{method}' takes fixed steps; give steps= or times=\.",
            )
            for method in FIXED
        ),
        ({"method": "rk4", "steps": 0}, VALUE, r"steps must be at least 1; got 0\."),
        ({"method": "rk4", "steps": -5}, VALUE, r"steps must be at least 1; got -5\."),
        ({"method": "rk4", "steps": 2.5}, TYPE, r"steps must be an int; got 2\.5\."),
        ({"method": "rk4", "steps": True}, TYPE, r"steps must be an int; got True\."),
        *(
            (
                {"method": method, "steps": 10},
                VALUE,
                rf"method '{method}' chooses its own steps; got steps=10\. Leave steps out, or",
            )
            for method in [*ADAPTIVE, "scipy_solver"]
        ),
        (
            {"method": "scipy_solver", "gradient": "backprop"},
            VALUE,
            r"'scipy_solver' leaves torch, which backprop cannot follow; use gradient='adjoint'\.",
        ),
        (
            {"method": "scipy_solver", "gradient": "checkpoint"},
            VALUE,
            r"'scipy_solver' leaves torch, which checkpoint cannot follow; use gradient=",
        ),
        *(
            (
                {"method": method, "steps": 9, "gradient": "checkpoint"},
                VALUE,
                rf"'{method}' remembers earlier steps, .* use gradient='adjoint' or 'backprop'",
            )
            for method in MULTISTEP
        ),
        *(
            (
                {"method": method, "first_step": 0.1, **settings},
                VALUE,
                rf"first_step is for adaptive methods .*'{method}' is none; got 0\.1\. Leave it",
            )
            for method, settings in (("rk4", {"steps": 9}), ("scipy_solver", {}))
        ),
    ],
)
def test_a_bad_setting_is_refused(settings, error, expected, shapes_unchecked):
    with pytest.raises(error, match=expected):
        ODESolver(**settings)


@pytest.mark.parametrize(
    "solver",
    [
        ODESolver(),
        ODESolver(gradient="checkpoint", error_norm="points", first_step=0.1),
        *(solver_for(method, steps=7, max_evaluations=99) for method in KINDS),
    ],
    ids=lambda solver: solver.method,
)
def test_settings_are_values(solver):
    again = eval(repr(solver))  # noqa: S307 - that repr can be read back is the law
    assert again == solver
    assert hash(again) == hash(solver)
    assert solver != ODESolver(rtol=0.123)
    with pytest.raises(FrozenInstanceError):
        solver.rtol = 1.0


@ANEW
def test_a_gradient_made_anew_refuses_a_second_derivative(gradient):
    field = perturbed(LinearField(2))
    x = torch.randn(3, 2, requires_grad=True)
    transform = ContinuousTransform(field, solver=ODESolver(gradient=gradient))
    z = transform.to_base(x)
    with pytest.raises(
        RuntimeError, match=rf"gradient=.{gradient}. gives first derivatives only.*'backprop'"
    ):
        torch.autograd.grad(z.square().sum(), x, create_graph=True)

    z = transform.using(solver=ODESolver(gradient="backprop")).to_base(x)
    (slope,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    second = torch.autograd.grad(slope.sum(), field.weight)[0]
    assert second.abs().max() > 0.1


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_states_between_the_ends_are_as_accurate_as_the_last(method):
    field = perturbed(LinearField(2))
    solver = ODESolver(method=method, rtol=1e-7, atol=1e-7)
    x = torch.randn(3, 2)
    times = torch.tensor([0.0, 0.17, 0.5, 0.61, 1.0])
    states = ContinuousTransform(field, solver=solver).trajectory(x, times)
    for t, state in zip(times.tolist(), states, strict=True):
        expected, _ = field.solution(x, start=0.0, end=t)
        torch.testing.assert_close(state, expected, rtol=0, atol=2e-6)
