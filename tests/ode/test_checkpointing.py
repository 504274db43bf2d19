"""Laws of gradients made step by step: those of backprop, from the steps that were taken."""

import pytest
import torch
from zoo import UserNetwork, mlp, perturbed

from cnf import CNF, ModuleField, ODESolver
from cnf.ode.torchdiffeq_door import is_multistep, methods
from cnf.transforms import ContinuousTransform

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

ADAPTIVE = [name for name, kind in methods().items() if kind == "adaptive"]
FIXED = [name for name, kind in methods().items() if kind == "fixed" and not is_multistep(name)]
TIMES = {
    "to data": (0.0, 1.0),
    "to base": (1.0, 0.0),
    "to data, with stops": (0.0, 0.31, 0.5, 1.0),
    "to base, with stops": (1.0, 0.77, 0.2, 0.0),
}
PATH = pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
STAGES = {"dopri5": 6, "dopri8": 13, "bosh3": 3, "adaptive_heun": 1, "fehlberg2": 2}
TOLERANCE = {"dopri5": 1e-4, "dopri8": 1e-5, "bosh3": 1e-3, "adaptive_heun": 0.1, "fehlberg2": 1e-3}
"""For a field that changes fast, so that the first step of 0.9 is too large."""
FIELDS = {
    "closed form": mlp,
    "forward mode": lambda: mlp(hidden_features=(8, 7, 6), activation="tanh"),
    "reverse mode": lambda: perturbed(ModuleField(UserNetwork(2), 2)),
}


def solver_for(method, gradient, **settings):
    """A loose solver: its steps are far from the solution, so that no other gradient would do."""
    if methods()[method] == "fixed":
        return ODESolver(method=method, steps=3, gradient=gradient)
    settings = {"rtol": 1e-2, "atol": 1e-2, **settings}
    return ODESolver(method=method, gradient=gradient, **settings)


def rhs_of(field, seen=None):
    """The right-hand side of x and ladj along a field; keeps the times and points in `seen`."""

    def rhs(t, state):
        if seen is not None:
            seen.append(torch.cat([t.detach().view(1), state[0].detach().flatten()]))
        return field.velocity_and_divergence(t, state[0])

    return rhs


def solve(solver, field, x, times, seen=None):
    """The states and ladjs at `times`."""
    return solver.solve(
        rhs_of(field, seen), (x, x.new_zeros(x.shape[:-1])), times, dependencies=field.dependencies
    )


def gradients_by(solver, field, x, times, inputs):
    """Gradients of a loss that weighs every number of the solution differently."""
    solution = solve(solver, field, x, times)
    weights = [torch.linspace(-1, 2, part.numel()).view_as(part).to(part) for part in solution]
    loss = sum((w * part).sum() for w, part in zip(weights, solution, strict=True))
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
@PATH
@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
def test_the_gradient_is_that_of_backprop_to_rounding_errors(method, times, make):
    if method == "dopri5" and len(times) > 2:
        pytest.skip("backprop interpolates between the steps of dopri5")
    field, x = make(), torch.randn(4, 2, requires_grad=True)
    found, expected = (
        gradients_by(
            solver_for(method, gradient), field, x, torch.tensor(times), [x, *field.parameters()]
        )
        for gradient in ("checkpoint", "backprop")
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_rejected_steps_leave_no_trace(method):
    field, x = perturbed(mlp(), 1.0), torch.randn(4, 2, requires_grad=True)
    times, tolerance = torch.tensor([1.0, 0.0]), TOLERANCE[method]
    settings = {"rtol": tolerance, "atol": tolerance, "first_step": 0.9}
    found, expected = (
        gradients_by(solver_for(method, gradient, **settings), field, x, times, x)
        for gradient in ("checkpoint", "backprop")
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@PATH
@pytest.mark.parametrize("method", FIXED)
def test_the_gradient_of_the_times_is_that_of_backprop_for_fixed_steps(method, times):
    field, x = mlp(), torch.randn(4, 2)
    times = torch.tensor(times, requires_grad=True)
    found, expected = (
        gradients_by(solver_for(method, gradient), field, x, times, times)
        for gradient in ("checkpoint", "backprop")
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@PATH
@pytest.mark.parametrize("method", ["rk4", *ADAPTIVE])
def test_the_backward_pass_evaluates_where_the_accepted_steps_did(method, times, dtype):
    field, x = perturbed(mlp(), 1.0).to(dtype), torch.randn(4, 2, dtype=dtype)
    solver = solver_for(method, "checkpoint")
    if method in ADAPTIVE:
        tolerance = TOLERANCE[method]
        settings = {"rtol": tolerance, "atol": tolerance, "first_step": 0.9}
        solver = solver_for(method, "checkpoint", **settings)
    seen = []
    solution = solve(solver, field, x, torch.tensor(times, dtype=dtype), seen)
    forward = torch.stack(seen)
    seen.clear()
    solution[0][-1].sum().backward()
    backward = torch.stack(seen)

    distance = (backward.unsqueeze(1) - forward).abs().amax(-1).amin(-1).max()
    assert distance <= 1000 * torch.finfo(dtype).eps
    if method == "rk4":
        assert len(backward) == len(forward)
    else:
        assert len(backward) <= len(forward)
        assert len(backward) % STAGES[method] == 1 % STAGES[method]
    if method in ADAPTIVE and len(times) == 2:
        assert len(backward) < len(forward)  # the first step, for one, was too large


@pytest.mark.parametrize("times", [(0.0, 0.5, 1.0), (1.0, 0.5, 0.0)], ids=str)
@pytest.mark.parametrize("method", ["bosh3", "dopri8"])
def test_a_step_that_ends_where_the_velocity_jumps_does_not_see_the_jump(method, times):
    before, after = (torch.randn(2, 2, requires_grad=True) for _ in range(2))
    x = torch.randn(4, 2)

    def rhs(t, state):
        late = t >= 0.5 if times[0] == 0 else t <= 0.5
        return (state[0] @ (after if late else before),)

    found = []
    for gradient in ("checkpoint", "backprop"):
        (states,) = solver_for(method, gradient).solve(
            rhs, (x,), torch.tensor(times), dependencies=lambda: [before, after]
        )
        found.append(torch.autograd.grad(states.square().sum(), [before, after]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_a_backward_pass_can_be_repeated():
    field, x = mlp(), torch.randn(4, 2, requires_grad=True)
    z, _ = solve(solver_for("dopri5", "checkpoint"), field, x, torch.tensor([1.0, 0.0]))
    first, second = (torch.autograd.grad(z.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_a_constant_velocity_passes_gradients_to_x_alone(method):
    x = torch.randn(4, 2, requires_grad=True)
    solver = solver_for(method, "checkpoint")
    (states,) = solver.solve(lambda t, state: (torch.ones(4, 2),), (x,), torch.tensor([0.0, 1.0]))
    weights = torch.randn(4, 2)
    (found,) = torch.autograd.grad((weights * states[-1]).sum(), x)
    torch.testing.assert_close(found, weights)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_a_parameter_that_is_not_used_has_no_gradient(gradient):
    field = mlp()
    field.spare = torch.nn.Parameter(torch.ones(2))
    z = ContinuousTransform(field, solver=solver_for("rk4", gradient)).to_base(torch.randn(3, 2))
    (found,) = torch.autograd.grad(z.sum(), field.spare, allow_unused=True)
    assert found is None


def test_a_tensor_named_twice_counts_once():
    weight = torch.eye(2, requires_grad=True)
    x = torch.randn(3, 2)
    found = []
    for gradient in ("backprop", "checkpoint", "adjoint"):
        (states,) = ODESolver(method="rk4", steps=20, gradient=gradient).solve(
            lambda t, state: (state[0] @ weight,),
            (x,),
            torch.tensor([0.0, 1.0]),
            dependencies=lambda: [weight, weight],
        )
        found.append(torch.autograd.grad(states[-1].sum(), weight)[0])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=0)


def test_the_backward_pass_runs_under_the_autocast_of_the_solve():
    flow = perturbed(CNF(2, hidden_features=(16, 16))).float()
    x = torch.randn(20, 2, dtype=torch.float32)
    found = []
    for gradient in ("backprop", "checkpoint"):
        solver = ODESolver(method="rk4", steps=3, gradient=gradient)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = flow.using(solver=solver).log_prob(x).mean()
        gradients = torch.autograd.grad(loss, list(flow.parameters()))
        found.append(torch.cat([part.flatten() for part in gradients]))
    loss = flow.using(solver=ODESolver(method="rk4", steps=3, gradient="backprop")).log_prob(x)
    gradients = torch.autograd.grad(loss.mean(), list(flow.parameters()))
    precise = torch.cat([part.flatten() for part in gradients])
    assert (found[1] - found[0]).norm() < 0.05 * (found[0] - precise).norm()


def test_a_step_that_meets_a_time_by_chance_ends_there_and_so_does_the_next():
    weight = torch.zeros(2, 2, requires_grad=True)  # so that steps grow tenfold
    found = []
    for gradient in ("backprop", "checkpoint"):
        (states,) = ODESolver(gradient=gradient, first_step=0.05).solve(
            lambda t, state: (state[0] @ weight,),
            (torch.ones(3, 2),),
            torch.tensor([0.0, 0.05, 0.55, 0.8, 1.0]),
            dependencies=lambda: [weight],
        )
        found.append(torch.autograd.grad((states[3] ** 2).sum(), weight)[0])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[0], torch.full((2, 2), 2 * 3 * 0.8))
