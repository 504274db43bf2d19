"""Laws of regularizers: a cost is the integral of its definition along the path."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from zoo import FIELDS, POTENTIAL_FIELDS, PRECISE, cnf, mlp, perturbed, rows_for

from cnf import (
    CNF,
    Exact,
    Flow,
    Hutchinson,
    MaximumLikelihood,
    ModuleField,
    ODESolver,
    Standardize,
    count_evaluations,
)
from cnf.regularizers import (
    directional_derivative,
    hjb_residual,
    jacobian_frobenius,
    kinetic_energy,
    total_derivative,
)
from cnf.transforms import ContinuousTransform
from cnf.vector_fields import LinearField, PotentialField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

BOTH = [kinetic_energy, jacobian_frobenius]
ALL = [*BOTH, directional_derivative, total_derivative]


def costs(transform, x, context=None, regularizers=BOTH, **settings):
    return transform.to_base_with_costs(x, context, regularizers=regularizers, **settings)[2]


def rates_by_definition(field, t, x, context):
    """The rates of ALL, and of `hjb_residual` for a potential, at one point by autograd."""
    velocity = field(t, x, context)
    jacobian = torch.autograd.functional.jacobian(lambda y: field(t, y, context), x)
    in_time = torch.autograd.functional.jacobian(lambda s: field(s, x, context), t)
    rates = [
        velocity.square().sum(),
        jacobian.square().sum(),
        (jacobian @ velocity).square().sum(),
        (in_time + jacobian @ velocity).square().sum(),
    ]
    if isinstance(field, PotentialField):
        rate = torch.autograd.functional.jacobian(lambda s: field.potential(s, x, context), t)
        rates.append((rate - 0.5 * velocity.square().sum()).abs())
    return torch.stack(rates)


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


@pytest.mark.parametrize(
    "name", ["sin then silu", "three hidden layers with context", "user", "potential tanh"]
)
def test_costs_are_quadratures_of_their_definitions_along_the_path(name):
    field = FIELDS[name]()
    regularizers = [*ALL, hjb_residual] if name in POTENTIAL_FIELDS else ALL
    solver = ODESolver(rtol=1e-7, atol=1e-7)
    transform = ContinuousTransform(field, solver=solver, start_time=0.1).requires_grad_(False)
    x, context = rows_for(field, 2)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    shares = torch.tensor([1.0, *(0.5 - 0.5 * nodes), 0.0])
    states = transform.trajectory(x, shares, context)
    expected = torch.zeros(len(regularizers), 2)
    for t, state, weight in zip(
        0.1 + 0.9 * shares[1:-1], states[1:-1], 0.45 * weights, strict=True
    ):
        for row in range(2):
            c = None if context is None else context[row]
            expected[:, row] += weight * rates_by_definition(field, t, state[row], c)
    found = costs(transform, x, context, regularizers)
    torch.testing.assert_close(found[:4], expected[:4], rtol=1e-5, atol=1e-5)
    # An absolute value has kinks, which no quadrature likes.
    torch.testing.assert_close(found[4:], expected[4:], rtol=1e-2, atol=0)


def test_costs_of_a_linear_field_are_known():
    field = perturbed(LinearField(3))
    evaluation = Exact()(field, torch.tensor(0.2), torch.randn(5, 3), products=True)
    expected = (evaluation.velocity @ field.weight.T).square().sum(-1)
    for regularizer in (directional_derivative, total_derivative):
        torch.testing.assert_close(regularizer(evaluation), expected)


def test_straight_paths_of_constant_speed_have_no_acceleration():
    """The field x (s - 1) / (1 + (s - 1) t) takes z to s z along straight lines."""

    class Straight(torch.nn.Module):
        def forward(self, t, x):
            return x * (1.5 / (1 + 1.5 * t)).unsqueeze(-1)

    transform = ContinuousTransform(ModuleField(Straight(), 2), solver=PRECISE)
    x = torch.randn(4, 2)
    kinetic, directional, total = costs(
        transform, x, regularizers=[kinetic_energy, directional_derivative, total_derivative]
    )
    torch.testing.assert_close(kinetic, (0.6 * x).square().sum(-1), rtol=0, atol=1e-7)
    assert (directional > 1e-3).all()
    torch.testing.assert_close(total, torch.zeros(4), rtol=0, atol=1e-12)


def test_hjb_residual_of_a_constant_slope():
    field = PotentialField(2)
    with torch.no_grad():
        field.conditioner[-1].bias[-3:-1] = torch.tensor([3.0, 4.0])
    transform = ContinuousTransform(field, solver=PRECISE)
    found = costs(transform, torch.randn(5, 2), regularizers=[hjb_residual])
    torch.testing.assert_close(found, torch.full((1, 5), 12.5))


def test_hjb_residual_is_for_potentials_only():
    with pytest.raises(ValueError, match="hjb_residual needs a PotentialField; got MLPField"):
        costs(ContinuousTransform(mlp()), torch.randn(5, 2), regularizers=[hjb_residual])


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


@pytest.mark.parametrize(
    "name", ["sin then silu", "three hidden layers", "user", "linear", "potential"]
)
def test_gradients_of_costs_by_adjoint_and_backprop_agree(name):
    if name == "potential":
        regularizers = [*ALL, hjb_residual]
        field = perturbed(PotentialField(2, hidden_features=8, frequency=1.0), 0.1)
        with torch.no_grad():  # a steep slope: the residual is nowhere zero, where it has a kink
            field.conditioner[-1].bias[-3:-1] = 1.0
    else:
        field, regularizers = FIELDS[name](), ALL
    found = []
    for gradient in ("adjoint", "backprop"):
        solver = ODESolver(rtol=1e-6, atol=1e-6, gradient=gradient)
        x = torch.full((2, field.features), 0.3, requires_grad=True)
        transform = ContinuousTransform(field, solver=solver)
        value = costs(transform, x, regularizers=regularizers).sum()
        inputs = [x, *field.parameters()]
        found.append(torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


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


def test_bad_regularizers_are_refused():
    flow = Flow([ContinuousTransform(LinearField(2))])
    with pytest.raises(TypeError, match="regularizers must be callable; got 'kinetic'"):
        MaximumLikelihood(flow, {"kinetic": 1.0})
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be finite and at least 0"):
            MaximumLikelihood(flow, {kinetic_energy: weight})
    empty = Exact()(LinearField(2), torch.tensor(0.0), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="products=True"):
        jacobian_frobenius(empty)


def test_a_random_end_time_is_that_of_the_solve():
    flow = Flow([ContinuousTransform(mlp(), solver=PRECISE)])
    x = torch.randn(6, 2)
    objective = MaximumLikelihood(flow, {kinetic_energy: 0.3}, solver=PRECISE, random_end_time=0.4)
    for seed in range(3):
        draw = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
        other = Flow([flow.chain[0].using(start_time=0.4 * (2 * draw - 1))])
        plain = MaximumLikelihood(other, {kinetic_energy: 0.3}, solver=PRECISE)
        loss = objective(x, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(loss, plain(x), rtol=0, atol=1e-9)


def test_random_end_times_are_uniform_and_leave_the_flow_alone():
    """A constant field of 1 moves x = 3 to 2 + s: the loss tells the end time s of each solve."""
    field = LinearField(1)
    with torch.no_grad():
        field.bias.fill_(1.0)
    one_step = ODESolver(method="euler", steps=1)
    flow = Flow([ContinuousTransform(field, solver=one_step)])
    x = torch.tensor([[3.0]])
    before = flow.log_prob(x)
    objective = MaximumLikelihood(flow, random_end_time=0.5, solver=one_step)
    generator = torch.Generator().manual_seed(0)
    losses = torch.stack([objective(x, generator=generator) for _ in range(250)]).detach()
    times = (2 * losses - math.log(2 * math.pi)).sqrt() - 2
    assert kstest(times.numpy(), "uniform", (-0.5, 1.0)).pvalue > 1e-3
    assert (flow.log_prob(x) == before).all()


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("end_time", [0.2, 3.0])
def test_random_end_times_are_shares_of_the_end_time(end_time, learn):
    """Whatever the end time, costs stay positive: it is never passed."""
    transform = ContinuousTransform(
        mlp(), solver=PRECISE, end_time=2.0 if learn else end_time, learn_end_time=learn
    )
    if learn:
        with torch.no_grad():
            transform.log_end_time.fill_(math.log(end_time))
    x = torch.randn(4, 2)
    for start in (-0.9, 0.9):
        found = costs(transform.using(start_time=start), x)
        fixed = ContinuousTransform(
            transform.vector_field, solver=PRECISE, end_time=end_time, start_time=start
        )
        assert (found > 0).all()
        torch.testing.assert_close(found, costs(fixed, x), rtol=0, atol=1e-7)
    objective = MaximumLikelihood(Flow([transform]), random_end_time=0.95)
    assert all(objective(x).isfinite() for _ in range(5))


@pytest.mark.parametrize("width", [-0.1, 1.0, math.nan])
def test_bad_random_end_times_are_refused(width):
    with pytest.raises(ValueError, match=r"random_end_time must be in \[0, 1\)"):
        MaximumLikelihood(cnf(), random_end_time=width)


@pytest.mark.parametrize("time", [1.0, 2.0, math.nan, -math.inf])
def test_bad_start_times_are_refused(time):
    with pytest.raises(ValueError, match=r"start_time must be .* a fraction of the end time"):
        ContinuousTransform(LinearField(2), start_time=time)


def test_regularizers_come_with_weights():
    with pytest.raises(TypeError, match="regularizers must be weights by regularizer, such as"):
        MaximumLikelihood(cnf(), [kinetic_energy])
