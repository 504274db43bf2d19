"""Laws of uneven fixed steps: where they end, on the whole way and on parts of it."""

import copy
from dataclasses import replace

import pytest
import torch
from test_solver import DIRECTION, FIXED, MULTISTEP, PATH, Swinging, swinging
from zoo import mlp

from cnf import CNF, NeuralODE, ODEError, ODESolver, load, save
from cnf.transforms import ContinuousTransform

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

UNEVEN = (0.0, 0.1, 0.4, 1.0)
ONE_STEP = [method for method in FIXED if method not in MULTISTEP]


@PATH
@pytest.mark.parametrize("method", ONE_STEP)
def test_equal_times_are_equal_steps(method, times):
    system, x = swinging()
    times = torch.tensor(times)
    found, expected = (
        solver.solve(system, (x,), times, way=(float(times[0]), float(times[-1])))[0]
        for solver in (
            ODESolver(method=method, times=torch.linspace(0, 1, 101).tolist()),
            ODESolver(method=method, steps=100),
        )
    )
    # Stops at 0.31 and 0.77 are ends of both grids.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def starts_of(times, way):
    system = Swinging(torch.eye(1))
    solver = ODESolver(method="euler", times=UNEVEN)
    solver.solve(system, (torch.ones(1, 1),), torch.tensor(times), way=way)
    return system.seen


@pytest.mark.parametrize(
    ("times", "way", "expected"),
    [
        ((0.0, 1.0), (0.0, 1.0), [0.0, 0.1, 0.4]),
        ((1.0, 0.0), (1.0, 0.0), [1.0, 0.4, 0.1]),
        ((-2.0, 3.0), (0.0, 1.0), [-2.0, -1.5, 0.0]),
        ((0.3, 1.0), (0.3, 1.0), [0.3, 0.4]),
        ((0.9, 0.2), (0.9, 0.2), [0.9, 0.4]),
        ((0.0, 0.2, 1.0), (0.0, 1.0), [0.0, 0.1, 0.2, 0.4]),
        ((0.0, 0.05), (0.0, 0.05), [0.0]),
    ],
)
def test_steps_end_at_the_given_shares_of_the_way(times, way, expected):
    assert starts_of(times, way) == pytest.approx(expected)


@DIRECTION
def test_a_transform_walks_the_same_grid_whatever_its_times(times):
    """Values on the way, the end alone and the ladj are of one grid."""
    field, x = mlp(), torch.randn(3, 2)
    solver = ODESolver(method="rk4", times=UNEVEN)
    transform = ContinuousTransform(field, solver=solver, start_time=0.2, end_time=0.7)
    way = (transform.to_data_and_ladj, transform.to_data)
    if times[0] == 1.0:
        way = (transform.to_base_and_ladj, transform.to_base)
    expected, _ = way[0](x)
    torch.testing.assert_close(way[1](x), expected)
    states = transform.trajectory(x, torch.tensor(sorted([*times, 0.1], reverse=times[0] == 1.0)))
    torch.testing.assert_close(states[-1], expected)


@DIRECTION
def test_checkpoint_gives_the_gradient_of_backprop(times):
    gradients = []
    for gradient in ("backprop", "checkpoint"):
        field = copy.deepcopy(mlp())
        torch.manual_seed(0)
        for parameter in field.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        solver = ODESolver(method="rk4", times=UNEVEN, gradient=gradient)
        transform = ContinuousTransform(field, solver=solver, end_time=0.8, learn_end_time=True)
        x = torch.linspace(-1, 1, 6).view(3, 2).requires_grad_()
        move = transform.to_base_and_ladj if times[0] == 1.0 else transform.to_data_and_ladj
        z, ladj = move(x)
        value = z.square().sum() + ladj.sum()
        gradients.append(torch.autograd.grad(value, [x, *transform.parameters()]))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@DIRECTION
def test_the_adjoint_walks_the_grid_backwards(times):
    """Its gradient has the error of the grid, not of one step."""
    field, x = mlp(), torch.randn(3, 2)
    uneven = torch.linspace(0, 1, 60).square().tolist()

    def gradients(gradient):
        solver = ODESolver(method="rk4", times=uneven, gradient=gradient)
        transform = ContinuousTransform(field, solver=solver)
        move = transform.to_base_and_ladj if times[0] == 1.0 else transform.to_data_and_ladj
        return torch.autograd.grad(move(x)[1].sum(), list(field.parameters()))

    for one, other in zip(gradients("adjoint"), gradients("backprop"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_vmap_sees_the_grid():
    transform = ContinuousTransform(
        mlp(), solver=ODESolver(method="rk4", times=UNEVEN, gradient="backprop")
    )
    x = torch.randn(4, 2)
    with torch.no_grad():
        expected = transform.to_base_and_ladj(x)
        found = torch.vmap(transform.to_base_and_ladj)(x)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ODEError, match="no uneven grid"):
        torch.vmap(transform.trajectory)(x, torch.tensor([0.0, 1.0]).expand(4, 2))


def test_halved_steps():
    assert ODESolver(method="rk4", times=UNEVEN).halved().times == pytest.approx(
        (0.0, 0.05, 0.1, 0.25, 0.4, 0.7, 1.0)
    )
    assert ODESolver(method="rk4", steps=3).halved().steps == 6
    with pytest.raises(ValueError, match="chooses its own steps"):
        ODESolver().halved()


def test_a_file_keeps_the_grid(tmp_path):
    flow = CNF(2, solver=ODESolver(method="rk4", times=UNEVEN))
    save(flow, tmp_path / "flow.safetensors")
    loaded = load(tmp_path / "flow.safetensors")
    assert loaded.only_ode.solver == flow.only_ode.solver
    assert loaded.only_ode.solver.times == UNEVEN


def test_the_budget_counts_the_steps_of_the_grid():
    solver = ODESolver(method="rk4", times=UNEVEN, max_evaluations=11)
    with pytest.raises(ODEError, match="at least 12 evaluations"):
        ContinuousTransform(mlp(), solver=solver).to_base(torch.zeros(1, 2))
    ContinuousTransform(mlp(), solver=replace(solver, max_evaluations=12)).to_base(
        torch.zeros(1, 2)
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "rk4"}, ValueError, "give steps= or times="),
        ({"method": "rk4", "steps": 2, "times": (0, 1)}, ValueError, "give steps= or times="),
        ({"times": (0, 1)}, ValueError, "chooses its own steps; got times"),
        ({"method": "rk4", "times": (0, 0.5, 0.5, 1)}, ValueError, "must increase from 0 to 1"),
        ({"method": "rk4", "times": (0.1, 1)}, ValueError, "must increase from 0 to 1"),
        ({"method": "rk4", "times": ()}, ValueError, "must increase from 0 to 1"),
        ({"method": "rk4", "times": (0, 2)}, ValueError, "each of times must be from 0 to 1"),
        ({"method": "rk4", "times": (0, "1")}, TypeError, "each of times must be a number"),
        ({"method": "rk4", "times": 4}, TypeError, "times must be numbers"),
    ],
)
def test_a_bad_grid_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ODESolver(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start_time", [0.0, 0.9])
def test_stops_beside_ends_of_steps_make_no_steps_of_no_size(dtype, start_time):
    transform = ContinuousTransform(
        mlp(), solver=ODESolver(method="rk4", times=UNEVEN), start_time=start_time
    ).to(dtype)
    times = torch.linspace(0, 1, 101, dtype=dtype)
    states = transform.trajectory(torch.randn(3, 2, dtype=dtype), times)
    assert states.isfinite().all()
    transform.trajectory(states[-1], torch.tensor(UNEVEN[::-1], dtype=dtype))


def test_a_neural_ode_walks_its_grid_as_far_as_it_is_asked():
    network = NeuralODE(mlp(), solver=ODESolver(method="rk4", times=UNEVEN))
    x = torch.randn(3, 2)
    part = network.trajectory(x, torch.tensor([0.0, 0.4]))
    whole = network.trajectory(x, torch.tensor([0.0, 0.4, 1.0]))
    torch.testing.assert_close(part[1], whole[1])


@pytest.mark.parametrize("method", MULTISTEP)
def test_a_method_of_equal_steps_takes_no_uneven_ones(method):
    with pytest.raises(ValueError, match="is for equal steps"):
        ODESolver(method=method, times=UNEVEN)


def test_an_array_of_times_is_refused_with_a_remedy():
    with pytest.raises(TypeError, match=r"got Tensor\. Try times.tolist\(\)"):
        ODESolver(method="rk4", times=torch.tensor(UNEVEN))
