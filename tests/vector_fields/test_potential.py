"""Laws of the potential field: a gradient, its symmetric Jacobian, its rate in time."""

import pytest
import torch
from zoo import POTENTIAL_FIELDS, potential, rows_for

from cnf.vector_fields import PotentialField
from cnf.vector_fields.activations import ACTIVATIONS, ANTIDERIVATIVES


@pytest.mark.parametrize("make", POTENTIAL_FIELDS.values(), ids=POTENTIAL_FIELDS)
def test_velocity_is_minus_the_gradient_of_the_potential(make):
    field = make()
    x, context = rows_for(field, 4)
    x.requires_grad_()
    for t in (torch.rand(()), torch.rand(4)):
        (gradient,) = torch.autograd.grad(field.potential(t, x, context).sum(), x)
        torch.testing.assert_close(field(t, x, context), -gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", POTENTIAL_FIELDS.values(), ids=POTENTIAL_FIELDS)
def test_rate_is_the_derivative_of_the_potential_in_time(make):
    field = make()
    x, context = rows_for(field, 4)
    t = torch.rand(4, requires_grad=True)
    (expected,) = torch.autograd.grad(field.potential(t, x, context).sum(), t)
    found = field.potential_rate(t, x, context)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for i in range(4):
        one = field.potential_rate(t[i], x[i], None if context is None else context[i])
        torch.testing.assert_close(one, expected[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("features", [1, 5, 64])
def test_divergence_is_the_trace_in_any_dimension(features):
    field = potential(features)
    t, x = torch.tensor(0.3), torch.randn(3, features)
    _, divergence = field.velocity_and_divergence(t, x)
    for row, expected in zip(x, divergence, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda y: field(t, y), row)
        torch.testing.assert_close(jacobian, jacobian.T, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(jacobian.trace(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ANTIDERIVATIVES)
def test_antiderivatives_have_the_activations_as_slopes(name):
    a = torch.tensor([-800.0, -30.0, -1.3, 0.0, 0.2, 19.0, 21.0, 900.0], requires_grad=True)
    (slope,) = torch.autograd.grad(ANTIDERIVATIVES[name](a).sum(), a)
    torch.testing.assert_close(slope, ACTIVATIONS[name].value(a), rtol=0, atol=1e-12)


def test_a_new_field_is_at_rest_and_can_start_to_move():
    field = PotentialField(3, 2)
    x, context = rows_for(field, 5)
    velocity = field(torch.tensor(0.4), x, context)
    assert (velocity == 0).all()
    velocity.backward(torch.randn_like(velocity))
    assert all(part.grad.abs().max() > 0 for part in (field.quadratic, field.conditioner[-1].bias))


def test_time_moves_every_kind_of_potential():
    field = potential(layer="ignore")
    x = torch.randn(4, 2)
    assert not torch.allclose(field(torch.tensor(0.0), x), field(torch.tensor(1.0), x))


@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"activation must be one of sin, tanh; got 'silu'"):
        PotentialField(2, activation="silu")
    with pytest.raises(ValueError, match="layer must be one of"):
        PotentialField(2, layer="dense")
    with pytest.raises(TypeError, match=r"hidden_features must be an int; got \(8, 8\)"):
        PotentialField(2, hidden_features=(8, 8))
    with pytest.raises(ValueError, match="frequency must be None"):
        PotentialField(2, activation="tanh", frequency=1.0)
