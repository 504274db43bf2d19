"""Laws of regularizers: a cost is the integral of its definition along the path."""

import math

import numpy as np
import pytest
import torch
from zoo import FIELDS, PRECISE, cnf, mlp, perturbed, rows_for

from cnf import (
    CNF,
    ContinuousTransform,
    Exact,
    Flow,
    Hutchinson,
    LinearField,
    MaximumLikelihood,
    ODESolver,
    Standardize,
    count_evaluations,
)
from cnf.divergence import FieldEvaluation
from cnf.regularizers import jacobian_frobenius, kinetic_energy

BOTH = [kinetic_energy, jacobian_frobenius]


def costs(transform, x, context=None, **settings):
    return transform.to_base_with_costs(x, context, regularizers=BOTH, **settings)[2]


def test_cost_of_a_constant_field():
    field = LinearField(3)
    with torch.no_grad():
        field.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    kinetic, frobenius = costs(ContinuousTransform(field, solver=PRECISE), torch.randn(4, 3))
    torch.testing.assert_close(kinetic, torch.full((4,), 5.25))
    torch.testing.assert_close(frobenius, torch.zeros(4))


def test_frobenius_cost_of_a_linear_field_is_that_of_its_matrix():
    field = perturbed(LinearField(3))
    frobenius = costs(ContinuousTransform(field, solver=PRECISE), torch.randn(4, 3))[1]
    torch.testing.assert_close(frobenius, field.weight.square().sum().expand(4))


@pytest.mark.parametrize("name", ["sin then silu", "three hidden layers with context", "user"])
def test_costs_are_quadratures_of_their_definitions_along_the_path(name):
    field = FIELDS[name]()
    transform = ContinuousTransform(field, solver=PRECISE)
    x, context = rows_for(field, 2)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    times = torch.tensor([1.0, *(0.5 - 0.5 * nodes), 0.0])
    states = transform.trajectory(x, times, context)[1:-1]
    expected = torch.zeros(2, 2)
    for t, state, weight in zip(times[1:-1], states, 0.5 * weights, strict=True):
        for row in range(2):
            c = None if context is None else context[row]
            jacobian = torch.autograd.functional.jacobian(
                lambda y, t=t, c=c: field(t, y, c), state[row]
            )
            expected[0, row] += weight * field(t, state[row], c).square().sum()
            expected[1, row] += weight * jacobian.square().sum()
    torch.testing.assert_close(costs(transform, x, context), expected, rtol=0, atol=1e-6)


def test_kinetic_energy_bounds_the_distance_moved():
    """Cauchy-Schwarz: the energy of a path of duration 1 is at least its squared displacement."""
    transform = ContinuousTransform(mlp(3), solver=PRECISE)
    x = torch.randn(20, 3)
    z, _, (kinetic, _) = transform.to_base_with_costs(x, regularizers=BOTH)
    assert (kinetic >= (z - x).square().sum(-1) - 1e-6).all()


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", [1, 3])
def test_an_estimated_frobenius_cost_is_unbiased(noise, probes):
    transform = ContinuousTransform(mlp(3), solver=ODESolver(rtol=1e-5, atol=1e-5))
    x = torch.randn(3)
    exact = costs(transform, x)[1]
    divergence = Hutchinson(noise=noise, probes=probes)
    draws = costs(transform.using(divergence=divergence), x.expand(4000, 3))[1]
    assert (draws.mean() - exact).abs() < 4 * draws.std() / 4000**0.5


def test_costs_leave_the_map_and_the_steps_as_they_are():
    transform = ContinuousTransform(mlp(), solver=ODESolver(rtol=1e-6, atol=1e-6))
    x = torch.randn(5, 2)
    with count_evaluations(transform) as plain:
        z, ladj = transform.to_base_and_ladj(x)
    with count_evaluations(transform) as costly:
        z_too, ladj_too, _ = transform.to_base_with_costs(x, regularizers=BOTH)
    assert costly.value == plain.value
    torch.testing.assert_close((z_too, ladj_too), (z, ladj), rtol=0, atol=1e-12)


def test_costs_of_the_blocks_of_a_flow_add_up():
    flow = cnf(blocks=2, transforms=[Standardize.from_data(3 + 2 * torch.randn(50, 2))])
    x = torch.randn(4, 2)
    found = flow.to_base_with_costs(x, regularizers=BOTH)[2]
    scale, first, second = flow.chain
    y = scale.to_base(x)
    expected = costs(first, y) + costs(second, first.to_base(y))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["sin then silu", "three hidden layers", "user", "linear"])
def test_gradients_of_costs_by_adjoint_and_backprop_agree(name):
    field = FIELDS[name]()
    found = []
    for gradient in ("adjoint", "backprop"):
        solver = ODESolver(rtol=1e-9, atol=1e-9, gradient=gradient)
        x = torch.full((2, field.features), 0.3, requires_grad=True)
        value = costs(ContinuousTransform(field, solver=solver), x).sum()
        found.append(torch.autograd.grad(value, [x, *field.parameters()], allow_unused=True))
    for adjoint, backprop in zip(*found, strict=True):
        difference = (0 if adjoint is None else adjoint) - (0 if backprop is None else backprop)
        assert torch.as_tensor(difference).abs().max() < 1e-5


def test_the_loss_is_the_likelihood_plus_weighted_costs():
    flow = cnf()
    x = torch.randn(6, 2)
    loss = MaximumLikelihood(flow, {kinetic_energy: 0.3, jacobian_frobenius: 0.2}, solver=PRECISE)
    kinetic, frobenius = costs(flow.chain[0], x).mean(-1)
    expected = -flow.log_prob(x).mean() + 0.3 * kinetic + 0.2 * frobenius
    torch.testing.assert_close(loss(x), expected, rtol=0, atol=1e-7)


def test_a_weight_of_zero_leaves_loss_and_gradient():
    flow = cnf()
    x = torch.randn(6, 2)
    plain, zero = (
        MaximumLikelihood(flow, weights, solver=PRECISE)
        for weights in (None, dict.fromkeys(BOTH, 0.0))
    )
    torch.testing.assert_close(zero(x), plain(x), rtol=0, atol=1e-9)
    found = [torch.autograd.grad(part(x), list(flow.parameters())) for part in (plain, zero)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_a_plain_function_is_a_regularizer_and_sees_the_products():
    def trace_squared(evaluation):
        assert evaluation.products is not None
        return evaluation.divergence.square()

    field = perturbed(LinearField(2))
    transform = ContinuousTransform(field, solver=PRECISE)
    found = transform.to_base_with_costs(torch.randn(3, 2), regularizers=[trace_squared])[2]
    torch.testing.assert_close(found, field.weight.trace().square().expand(1, 3))


@pytest.mark.parametrize(
    ("features", "regularizers", "random"),
    [
        (9, {kinetic_energy: 1.0}, False),
        (9, {jacobian_frobenius: 1.0}, True),
        (8, {jacobian_frobenius: 1.0}, False),
    ],
)
def test_products_decide_between_exact_and_estimate(features, regularizers, random):
    flow = perturbed(CNF(features, hidden_features=(4, 4)))
    objective = MaximumLikelihood(flow, regularizers)
    x = torch.randn(3, features)
    first, second = (objective(x, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    assert (first != second) == random


def test_an_exact_divergence_gives_products_where_asked():
    field, x, t = mlp(3), torch.randn(4, 3), torch.tensor(0.4)
    plain, full = (Exact()(field, t, x, None, products=products) for products in (False, True))
    assert plain.products is None
    torch.testing.assert_close(full.divergence, plain.divergence, rtol=0, atol=1e-12)
    torch.testing.assert_close(full.velocity, plain.velocity, rtol=0, atol=1e-12)
    assert full.products.shape == (3, 4, 3)


@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_regularizers_are_refused():
    flow = Flow([ContinuousTransform(LinearField(2))])
    with pytest.raises(TypeError, match="regularizers must be callable; got 'kinetic'"):
        MaximumLikelihood(flow, {"kinetic": 1.0})
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite weights, at least 0"):
            MaximumLikelihood(flow, {kinetic_energy: weight})
    empty = FieldEvaluation(torch.tensor(0.0), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="products=True"):
        jacobian_frobenius(empty)
