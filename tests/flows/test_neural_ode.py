"""Laws of neural ODEs: where the map goes, what no map can do, gradients, and bad input."""

import math

import pytest
import torch
from laws import every_parameter_matters, gradients
from torch import nn
from zoo import NEURAL_ODES, PRECISE, UserNetwork, mlp, perturbed, rows_for

from cnf import ModuleField, NeuralODE, ODESolver, count_evaluations
from cnf.vector_fields import LinearField
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.layers import LAYERS

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

every_ode = pytest.mark.parametrize("make", NEURAL_ODES.values(), ids=NEURAL_ODES)
GRADIENT = pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
ENDS = torch.tensor([0.0, 1.0])


def precise(gradient):
    return ODESolver(rtol=1e-9, atol=1e-9, gradient=gradient)


def with_zeros(x, count):
    return torch.cat([x, x.new_zeros(*x.shape[:-1], count)], -1)


@pytest.mark.parametrize("augment", [0, 1, 3])
def test_a_linear_field_moves_the_state_by_its_matrix_exponential(augment):
    field = perturbed(LinearField(2 + augment), 0.5)
    nn.init.zeros_(field.bias)
    x = torch.randn(5, 2)
    expected = with_zeros(x, augment) @ torch.linalg.matrix_exp(field.weight).T
    found = NeuralODE(field, augment=augment, solver=PRECISE)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_every_state_is_that_of_the_linear_field():
    field = perturbed(LinearField(3, 2))
    x, context = torch.randn(4, 1), torch.randn(4, 2)
    times = torch.tensor([0.0, 0.1, 0.25, 0.9])
    states = NeuralODE(field, augment=2, solver=PRECISE).trajectory(x, times, context)
    for time, state in zip(times.tolist(), states, strict=True):
        expected, _ = field.solution(with_zeros(x, 2), context, start=0.0, end=time)
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-7)


@every_ode
@pytest.mark.parametrize("batch", [(), (4,), (3, 2)], ids=str)
def test_a_path_starts_at_x_with_zeros_and_ends_where_the_map_does(make, batch):
    ode = make()
    x, context = rows_for(ode, *batch)
    states = ode.trajectory(x, torch.tensor([0.0, 0.3, 1.0]), context)
    assert torch.equal(states[0], with_zeros(x, ode.augment))
    torch.testing.assert_close(states[-1], ode(x, context), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_map_of_the_line_is_increasing(layer, activation):
    """Whatever the field: paths that start apart stay apart, and in order."""
    ode = NeuralODE(perturbed(mlp(1, layer=layer, activation=activation)), solver=PRECISE)
    x = torch.linspace(-3, 3, 101).unsqueeze(-1)
    assert (ode(x).diff(dim=0) > 0).all()


def test_one_zero_lets_minus_one_and_one_change_places():
    """Half a turn in the plane of x and the zero."""
    field = LinearField(2)
    with torch.no_grad():
        field.weight.copy_(math.pi * torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    x = torch.tensor([[-1.0], [1.0]])
    found = NeuralODE(field, augment=1, solver=PRECISE)(x)
    torch.testing.assert_close(found, with_zeros(-x, 1), rtol=0, atol=1e-7)


def reach(states, directions):
    """How far a set of states goes in each direction."""
    return (states @ directions.T).amax(0)


def circle(points):
    angle = 2 * math.pi * torch.arange(points) / points
    return torch.stack([angle.cos(), angle.sin()], -1)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_a_circle_surrounds_stays_surrounded(layer):
    """In no direction does the disc's image go further than the circle's: no line parts them."""
    ode = NeuralODE(mlp(layer=layer), solver=ODESolver(rtol=1e-6, atol=1e-6))
    disc = 0.9 * torch.rand(500, 1).sqrt() * circle(500)
    directions = circle(60)
    ahead = reach(ode(circle(2000)), directions) - reach(ode(disc), directions)
    assert ahead.min() > 0


def test_one_zero_lets_a_plane_part_a_disc_from_the_circle_around_it():
    """With x at rest, a zero that grows by its squared radius."""

    class Bowl(nn.Module):
        def forward(self, t, x):
            return torch.cat([0 * x[..., :2], x[..., :2].square().sum(-1, keepdim=True)], -1)

    ode = NeuralODE(ModuleField(Bowl(), 3), augment=1, solver=PRECISE)
    height = ode(torch.cat([0.5 * circle(50), circle(50)]))[:, 2]
    torch.testing.assert_close(height[:50], torch.full((50,), 0.25), rtol=0, atol=1e-9)
    torch.testing.assert_close(height[50:], torch.ones(50), rtol=0, atol=1e-9)


@every_ode
@GRADIENT
def test_gradients_reach_everything(make, gradient):
    ode = make()
    ode = NeuralODE(ode.vector_field, augment=ode.augment, solver=precise(gradient))
    inputs = [part.requires_grad_() for part in rows_for(ode, 3) if part is not None]
    every_parameter_matters(ode, ode(*inputs).sin())
    assert all(part.grad.abs().min() > 0 for part in inputs)


@every_ode
def test_adjoint_and_backprop_give_the_same_gradient(make):
    specimen = make()
    x, context = rows_for(specimen, 3)
    found = []
    for gradient in ("adjoint", "backprop"):
        ode = NeuralODE(specimen.vector_field, augment=specimen.augment, solver=precise(gradient))
        inputs = [part.clone().requires_grad_() for part in (x, context) if part is not None]
        states = ode.trajectory(inputs[0], torch.tensor([0.0, 0.4, 1.0]), *inputs[1:])
        found.append(gradients(ode, states.sin(), *inputs))
    for adjoint, backprop in zip(*found, strict=True):
        torch.testing.assert_close(adjoint, backprop, rtol=1e-5, atol=1e-6)


@GRADIENT
def test_gradients_are_those_of_the_closed_form(gradient):
    field = perturbed(LinearField(3), 0.5)
    ode = NeuralODE(field, augment=1, solver=precise(gradient))
    x = torch.randn(4, 2, requires_grad=True)
    expected, _ = field.solution(with_zeros(x, 1), start=0.0, end=1.0)
    torch.testing.assert_close(
        gradients(ode, ode(x).sin(), x), gradients(ode, expected.sin(), x), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("x_batch", "context_batch", "joint"),
    [((), (), ()), ((4,), (), (4,)), ((), (4,), (4,)), ((3, 1), (2,), (3, 2)), ((5,), (1,), (5,))],
    ids=str,
)
def test_rows_and_contexts_broadcast(x_batch, context_batch, joint):
    ode = NEURAL_ODES["augmented with context"]()
    x, context = torch.randn(*x_batch, 2), torch.randn(*context_batch, 3)

    found = ode(x, context)

    rows = x.expand(*joint, 2).reshape(-1, 2)
    contexts = context.expand(*joint, 3).reshape(-1, 3)
    expected = ode(rows, contexts).reshape(*joint, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert ode.trajectory(x, ENDS, context).shape == (2, *joint, 4)


@every_ode
@GRADIENT
def test_an_empty_batch_costs_nothing_and_keeps_its_graph(make, gradient):
    ode = make()
    ode = NeuralODE(ode.vector_field, augment=ode.augment, solver=precise(gradient))
    inputs = [part.requires_grad_() for part in rows_for(ode, 0) if part is not None]
    with count_evaluations(ode) as nfe:
        final = ode(*inputs)
        states = ode.trajectory(inputs[0], torch.tensor([0.0, 0.5, 1.0]), *inputs[1:])
    assert nfe.value == 0
    assert final.shape == (0, ode.vector_field.features)
    assert states.shape == (3, 0, ode.vector_field.features)
    assert all(part.abs().sum() == 0 for part in gradients(ode, final, *inputs))


def test_the_dtype_is_that_of_the_field():
    ode = NeuralODE(mlp(3).float(), augment=1)
    assert ode(torch.zeros(2, 2, dtype=torch.float32)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"the model's dtype torch\.float32; got torch\.float64"):
        ode(torch.zeros(2, 2))


def test_without_gradients_there_is_no_graph():
    ode = NeuralODE(mlp())
    with torch.no_grad():
        assert not ode(torch.ones(3, 2)).requires_grad


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("augment", "remedy"),
    [
        (0, r"a map without density.*Flow\(\[ContinuousTransform\(vector_field\)\]\), or a CNF"),
        (2, r"set of measure zero.*CNF\(features, augment=2\) for a lower bound.*a CNF without"),
    ],
)
def test_there_is_no_log_prob_and_the_message_says_what_to_use(augment, remedy):
    ode = NeuralODE(mlp(3), augment=augment)
    with pytest.raises(NotImplementedError, match=remedy):
        ode.log_prob(torch.zeros(1, ode.features))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NeuralODE(nn.Linear(2, 2)), TypeError, "VectorField; got Linear.*ModuleField"),
        (lambda: NeuralODE(mlp(), solver="rk4"), TypeError, r"got str.*ODESolver\(method"),
        (lambda: NeuralODE(mlp(), augment=1.0), TypeError, "augment must be an int; got 1.0"),
        (lambda: NeuralODE(mlp(), augment=-1), ValueError, "augment must be at least 0; got -1"),
        (
            lambda: NeuralODE(mlp(2), augment=2),
            ValueError,
            "augment must be less than the 2 features.*got 2.*2 features more than x has",
        ),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(4, 3),
            ValueError,
            r"x must have shape \(\*batch, 2\), because the 3 features of vector_field include",
        ),
        (torch.tensor([[0.0, 0.0], [0.0, torch.nan]]), ValueError, "x must be finite.*row 1"),
        (torch.zeros(4, 2, dtype=torch.int64), ValueError, "x must have a floating dtype"),
        ([[0.0, 0.0]], TypeError, "x must be a torch.Tensor; got list"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "trajectory"])
def test_bad_rows_are_refused(x, error, message, call):
    ode = NeuralODE(mlp(3), augment=1).float()
    with pytest.raises(error, match=message):
        getattr(ode, call)(x, *([ENDS] if call == "trajectory" else []))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("size", "context", "message"),
    [
        (0, torch.zeros(3, 1), "context must be None, because the model has context_features=0"),
        (1, None, r"context must have shape \(\*batch, 1\), because the model is conditional"),
        (1, torch.zeros(4, 1), r"must broadcast; got x \(3, 2\) and context \(4, 1\)"),
    ],
)
def test_bad_contexts_are_refused(size, context, message):
    ode = NeuralODE(ModuleField(UserNetwork(3, size), 3, size), augment=1).float()
    with pytest.raises(ValueError, match=message):
        ode(torch.zeros(3, 2).float(), context)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("times", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "times must be a Tensor; got list"),
        (torch.tensor(1.0), ValueError, r"1-D with at least 2 times; got \(\)"),
        (torch.tensor([0.0]), ValueError, "at least 2 times"),
        (torch.tensor([1.0, 0.0]), ValueError, r"start at 0 \(x\).*from 1.0 to 0.0"),
        (torch.tensor([0.0, torch.nan]), ValueError, "strictly increasing"),
        (torch.tensor([0.25, 1.0]), ValueError, r"start at 0 \(x\).*from 0.25 to 1.0"),
        (torch.tensor([0.0, 1.5]), ValueError, r"within \[0, 1\]; they go from 0.0 to 1.5"),
    ],
)
def test_bad_times_are_refused(times, error, message):
    with pytest.raises(error, match=message):
        NeuralODE(mlp()).trajectory(torch.zeros(1, 2), times)
