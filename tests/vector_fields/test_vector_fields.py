"""Laws of the vector fields: derivatives, batching, closed forms, counting, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn
from zoo import FIELDS, UserNetwork, cnf, in_turn, mlp, perturbed, rows_for

from cnf import (
    CNF,
    Flow,
    Hutchinson,
    MLPField,
    ModuleField,
    ODESolver,
    VectorField,
    count_evaluations,
)
from cnf.transforms import ContinuousTransform
from cnf.vector_fields import LinearField
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.layers import LAYERS

BATCHES = [(), (4,), (3, 4)]
REVERSE_MODE = VectorField._velocity_and_products
FORWARD_MODE = {name: make for name, make in FIELDS.items() if not name.startswith("user")}


def jacobians(field, t, x, context=None):
    """dv/dx of each row, one row at a time, by reverse mode through `forward` alone."""
    rows = [
        torch.autograd.functional.jacobian(
            lambda x_row, i=i: field(
                t[i] if t.ndim else t,
                x_row,
                context if context is None or context.ndim == 1 else context[i],
            ),
            x[i],
            create_graph=True,
        )
        for i in np.ndindex(x.shape[:-1])
    ]
    return torch.stack(rows).view(*x.shape, x.shape[-1])


def trace(matrices):
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def gradients(values, weights, inputs):
    """Gradients of the weighted sum of `values`."""
    scalar = (weights * values).sum()
    return torch.autograd.grad(scalar, inputs, allow_unused=True, materialize_grads=True)


def leaves(field, *tensors):
    """The tensors, as leaves that require a gradient, and then with the parameters."""
    tensors = [None if part is None else part.detach().requires_grad_() for part in tensors]
    return tensors, [*(part for part in tensors if part is not None), *field.parameters()]


def assert_divergence_is_the_trace(field, t, x, context=None):
    (t, x, context), inputs = leaves(field, t, x, context)
    _, divergence = field.velocity_and_divergence(t, x, context)
    brute_force = trace(jacobians(field, t, x, context))
    torch.testing.assert_close(divergence, brute_force, rtol=1e-12, atol=1e-12)

    weights = torch.randn_like(divergence)
    torch.testing.assert_close(
        gradients(divergence, weights, inputs),
        gradients(brute_force, weights, inputs),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize(
    ("layer_and_activation", "hidden", "context_features"),
    in_turn(itertools.product(LAYERS, ACTIVATIONS), [(8,), (8,), (8, 7), (8, 7)], [0, 3, 3, 0]),
    ids=str,
)
def test_divergence_and_its_gradients_are_those_of_the_trace(
    layer_and_activation, hidden, context_features
):
    layer, activation = layer_and_activation
    field = mlp(3, context_features, layer=layer, activation=activation, hidden_features=hidden)
    x, context = rows_for(field, 4)
    assert_divergence_is_the_trace(field, torch.rand(()), x, context)


@pytest.mark.parametrize(
    ("layer_and_features", "hidden"),
    in_turn(itertools.product(LAYERS, [1, 2, 5, 64]), [(8,), (8, 7), (6, 5, 4)]),
    ids=str,
)
def test_divergence_is_the_trace_in_any_dimension(layer_and_features, hidden):
    layer, features = layer_and_features
    field = mlp(features, layer=layer, activation="silu", hidden_features=hidden)
    x, _ = rows_for(field, 2)
    assert_divergence_is_the_trace(field, torch.rand(()), x)


@pytest.mark.parametrize("pair", list(itertools.permutations(ACTIVATIONS, 2)), ids=" then ".join)
def test_divergence_is_the_trace_with_one_activation_for_each_layer(pair):
    field = mlp(activation=pair)
    x, _ = rows_for(field, 3)
    assert_divergence_is_the_trace(field, torch.rand(()), x)


SHARING = {name: make for name, make in FIELDS.items() if make().shares_times}


def test_no_field_of_a_user_needs_to_know_of_shared_times():
    assert {name for name in FIELDS if name.startswith("user")}.isdisjoint(SHARING)
    assert {"default layers", "time features", "residual with context"} <= SHARING.keys()


@pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)
def test_rows_may_share_times(make):
    field = make()
    x, context = rows_for(field, 3, 4)
    t = torch.rand(3, 1)
    shared = field(t, x, context), field.velocity_and_divergence(t, x, context)
    each = t.expand(3, 4)
    alone = field(each, x, context), field.velocity_and_divergence(each, x, context)
    torch.testing.assert_close(shared, alone, rtol=1e-12, atol=1e-12)


SHARED = [
    (times, contexts)
    for times in ("one for all", "one for each row")
    for contexts in ("none", "one for all", "one for each row")
]


@pytest.mark.parametrize(("times", "contexts"), SHARED)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize(("layer", "hidden"), in_turn(LAYERS, [(8,), (8, 7)]), ids=str)
def test_divergence_is_the_trace_for_any_batch_of_times_and_contexts(
    layer, hidden, batch, times, contexts
):
    size = 0 if contexts == "none" else 3
    field = mlp(2, size, layer=layer, activation="gelu", hidden_features=hidden)
    x, context = rows_for(field, *batch)
    if contexts == "one for all":
        context = torch.randn(3)
    t = torch.rand(batch if times == "one for each row" else ())
    assert_divergence_is_the_trace(field, t, x, context)


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_divergence_is_the_trace_for_every_field(make):
    field = make()
    x, context = rows_for(field, 3)
    assert_divergence_is_the_trace(field, torch.rand(3), x, context)


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_velocity_is_the_same_by_every_way(make):
    field = make()
    x, context = rows_for(field, 3, 4)
    t = torch.rand(3, 4)
    velocity = field(t, x, context)
    by_products, _ = field.velocity_and_products(t, x, torch.randn(2, *x.shape), context)
    by_divergence, _ = field.velocity_and_divergence(t, x, context)
    torch.testing.assert_close(by_products, velocity, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(by_divergence, velocity, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("make", FORWARD_MODE.values(), ids=FORWARD_MODE)
def test_forward_and_reverse_products_give_the_same_quadratic_forms(make):
    field = make()
    x, context = rows_for(field, 3, 4)
    probes = torch.randn(5, *x.shape)
    for t in (torch.rand(()), torch.rand(3, 4)):
        _, forward = field.velocity_and_products(t, x, probes, context)
        _, reverse = REVERSE_MODE(field, t, x, probes, context)
        torch.testing.assert_close(
            (probes * forward).sum(-1), (probes * reverse).sum(-1), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("make", FORWARD_MODE.values(), ids=FORWARD_MODE)
def test_products_with_the_basis_are_the_jacobian_and_its_transpose(make):
    field = make()
    x, context = rows_for(field, 4)
    t = torch.rand(4)
    basis = torch.eye(field.features).unsqueeze(1).expand(-1, *x.shape)
    _, forward = field.velocity_and_products(t, x, basis, context)
    _, reverse = REVERSE_MODE(field, t, x, basis, context)
    jacobian = jacobians(field, t, x, context)
    torch.testing.assert_close(forward.permute(1, 2, 0), jacobian, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reverse.permute(1, 0, 2), jacobian, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", FORWARD_MODE.values(), ids=FORWARD_MODE)
def test_forward_and_reverse_products_have_the_same_gradients(make):
    field = make()
    rows, row_contexts = rows_for(field, 4)
    (t, x, context), inputs = leaves(field, torch.rand(4), rows, row_contexts)
    probes = torch.randn(2, *x.shape)
    _, forward = field.velocity_and_products(t, x, probes, context)
    _, reverse = REVERSE_MODE(field, t, x, probes, context)
    torch.testing.assert_close(
        gradients(forward, probes, inputs),
        gradients(reverse, probes, inputs),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_rows_with_their_own_times_equal_calls_with_one_time(make):
    field = make()
    x, context = rows_for(field, 4)
    t = torch.rand(4)
    probes = torch.randn(2, *x.shape)
    velocity, divergence = field.velocity_and_divergence(t, x, context)
    _, products = field.velocity_and_products(t, x, probes, context)
    for i in range(4):
        row_context = None if context is None else context[i]
        row_velocity, row_divergence = field.velocity_and_divergence(t[i], x[i], row_context)
        _, row_products = field.velocity_and_products(t[i], x[i], probes[:, i], row_context)
        torch.testing.assert_close(velocity[i], row_velocity, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(divergence[i], row_divergence, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(products[:, i], row_products, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_a_row_does_not_depend_on_the_rest_of_its_batch(make):
    field = make()
    x, context = rows_for(field, 4)
    t = torch.rand(())
    spoilt = x.clone()
    spoilt[[0, 1, 3]] = math.nan
    velocity, divergence = field.velocity_and_divergence(t, x, context)
    spoilt_velocity, spoilt_divergence = field.velocity_and_divergence(t, spoilt, context)
    torch.testing.assert_close(spoilt_velocity[2], velocity[2], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(spoilt_divergence[2], divergence[2], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_first_and_second_derivatives_pass_gradcheck(layer, batched):
    field = mlp(2, 1, layer=layer, hidden_features=(3, 3), activation="tanh")
    rows, row_contexts = rows_for(field, 2)
    times = torch.rand(2) if batched else torch.rand(())
    (t, x, context), _ = leaves(field, times, rows, row_contexts)
    assert torch.autograd.gradcheck(field.velocity_and_divergence, (t, x, context))
    assert torch.autograd.gradgradcheck(field.velocity_and_divergence, (t, x, context))


NEAR = torch.linspace(-8, 8, 400, dtype=torch.float64)  # an even number of points: not 0
FAR = torch.tensor([-1e4, -1000, -60, -25, 25, 60, 1000, 1e4], dtype=torch.float64)
TAILS = {
    "tanh": (0, 0),
    "sigmoid": (0, 0),
    "softplus": (0, 1),
    "silu": (0, 1),
    "gelu": (0, 1),
    "elu": (0, 1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slope_is_the_derivative_of_the_value(name):
    activation = ACTIVATIONS[name]
    a = torch.cat([NEAR, FAR]).requires_grad_()
    value, slope = activation.value_and_slope(a)
    plain = activation.value(a)
    (expected,) = torch.autograd.grad(plain.sum(), a)
    torch.testing.assert_close(value, plain, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(slope, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradient_of_the_slope_is_the_second_derivative(name):
    activation = ACTIVATIONS[name]
    a = NEAR.clone().requires_grad_()
    _, slope = activation.value_and_slope(a)
    (curvature,) = torch.autograd.grad(slope.sum(), a)
    (derivative,) = torch.autograd.grad(activation.value(a).sum(), a, create_graph=True)
    (expected,) = torch.autograd.grad(derivative.sum(), a)
    torch.testing.assert_close(curvature, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", TAILS)
def test_far_out_an_activation_is_straight(name):
    below, above = TAILS[name]
    a = FAR.clone().requires_grad_()
    value, slope = ACTIVATIONS[name].value_and_slope(a)
    (curvature,) = torch.autograd.grad(slope.sum(), a, retain_graph=True)
    (through_value,) = torch.autograd.grad(value.sum(), a)
    limit = torch.where(a < 0, float(below), float(above))
    torch.testing.assert_close(slope.detach(), limit, rtol=0, atol=1e-9)
    torch.testing.assert_close(through_value, limit, rtol=0, atol=1e-9)
    torch.testing.assert_close(curvature, torch.zeros_like(a), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_in_float32_stay_finite_and_near(name):
    a = torch.tensor([-3e38, -1e20, -1000, -90, -1, 0, 0.5, 90, 1000, 1e20, 3e38])
    a = a.clamp(-1e4, 1e4) if name == "sin" else a

    def parts(a):
        a.requires_grad_()
        value, slope = ACTIVATIONS[name].value_and_slope(a)
        (curvature,) = torch.autograd.grad(slope.sum(), a, retain_graph=True)
        (through_value,) = torch.autograd.grad(value.sum(), a)
        return value, slope, curvature, through_value

    for part, expected in zip(parts(a.float()), parts(a.float().double()), strict=True):
        assert part.dtype == torch.float32
        assert part.isfinite().all()
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("hidden", [(8,), (8, 7), (8, 7, 6)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_new_mlp_field_is_at_rest(layer, hidden, context_features):
    field = MLPField(2, context_features, layer=layer, activation="sin", hidden_features=hidden)
    x, context = rows_for(field, 5)
    velocity, divergence = field.velocity_and_divergence(torch.rand(5), 3 * x, context)
    assert (velocity == 0).all()
    assert (divergence == 0).all()


def test_a_new_linear_field_is_at_rest():
    field = LinearField(3, 2)
    x, context = rows_for(field, 5)
    velocity, divergence = field.velocity_and_divergence(torch.rand(5), x, context)
    assert (velocity == 0).all()
    assert (divergence == 0).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_every_parameter_of_the_output_layer_but_a_gate_leaves_rest_by_gradient(layer):
    field = MLPField(2, 3, layer=layer, hidden_features=(8, 8))
    x, context = rows_for(field, 5)
    field(torch.rand(5), x, context).sum().backward()
    for name, parameter in field.layers[-1].named_parameters():
        inert = name.startswith(
            ("gate.", "network.0.", "hidden.")
        )  # until what they feed has moved
        assert inert == bool((parameter.grad == 0).all()), name


@pytest.mark.parametrize(("features", "expected"), [(1, 2), (2, 2), (5, 1), (17, 0.5), (65, 0.25)])
def test_default_frequency_falls_with_the_features(features, expected):
    assert MLPField(features).frequency == pytest.approx(expected)


@pytest.mark.parametrize("frequency", [0.5, 1.0, 7.0])
def test_a_sinusoidal_first_layer_has_the_frequency_as_its_scale_and_any_phase(frequency):
    field = MLPField(8, hidden_features=(5000,), activation="sin", frequency=frequency)
    first = field.layers[0].linear
    assert first.weight.std().item() == pytest.approx(frequency, rel=0.02)
    assert abs(first.weight.mean().item()) < 4 * frequency / math.sqrt(first.weight.numel())
    assert first.bias.abs().max() <= math.pi
    assert first.bias.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.04)


@pytest.mark.parametrize("activation", ["tanh", ("silu", "sin")])
def test_only_a_sinusoidal_first_layer_takes_a_frequency(activation):
    with pytest.raises(ValueError, match=r"with the activation '(tanh|silu)', .*; got 9"):
        MLPField(2, activation=activation, frequency=9.0)
    assert MLPField(2, activation=activation).frequency is None


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_default_activation_is_sin_then_silu_at_any_depth(depth):
    field = MLPField(2, hidden_features=(4,) * depth)
    assert field.activation == ("sin", *("silu",) * (depth - 1))


def test_reset_parameters_starts_again():
    new, used = MLPField(2, 3), perturbed(MLPField(2, 3))
    for field in (new, used):
        torch.manual_seed(1)
        field.reset_parameters()
    torch.testing.assert_close(used.state_dict(), new.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("features", range(1, 7))
def test_linear_solution_agrees_with_an_independent_solver(features, context_features):
    field = perturbed(LinearField(features, context_features), 0.7)
    x, context = rows_for(field)
    start, end = 0.8, -0.4
    with torch.no_grad():
        solution, ladj = field.solution(x, context, start=start, end=end)
        expected = solve_ivp(
            lambda t, y: field(torch.tensor(t), torch.from_numpy(y.copy()), context).numpy(),
            (start, end),
            x.numpy(),
            method="DOP853",
            rtol=1e-12,
            atol=1e-12,
        ).y[:, -1]
    np.testing.assert_allclose(solution.numpy(), expected, rtol=0, atol=1e-9)
    assert ladj.item() == pytest.approx((end - start) * field.weight.trace().item(), abs=1e-14)


@pytest.mark.parametrize("features", range(1, 7))
def test_linear_ladj_is_the_log_determinant_of_its_solution(features):
    field = perturbed(LinearField(features, 2), 0.7)
    x, context = rows_for(field)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: field.solution(x, context, start=0.3, end=1.0)[0], x
    )
    _, ladj = field.solution(x, context, start=0.3, end=1.0)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-12)


def test_linear_solutions_compose():
    field = perturbed(LinearField(4, 2), 0.7)
    x, context = rows_for(field, 3)
    halfway, first = field.solution(x, context, start=0.0, end=0.4)
    there, second = field.solution(halfway, context, start=0.4, end=1.0)
    at_once, ladj = field.solution(x, context, start=0.0, end=1.0)
    back, _ = field.solution(there, context, start=1.0, end=0.0)
    torch.testing.assert_close(there, at_once, rtol=0, atol=1e-12)
    torch.testing.assert_close(first + second, ladj, rtol=0, atol=1e-12)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


class Constant(nn.Module):
    """Depends on its parameter, and not on x."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, t, x):
        return self.value.expand(x.shape)


class Shear(nn.Module):
    """Depends on x and t, and has no parameters; the Jacobian is [[0, t], [2 x0, 3]]."""

    def forward(self, t, x):
        return torch.stack([t * x[..., 1], x[..., 0] ** 2 + 3 * x[..., 1]], -1)


class Own(VectorField):
    """A field as a user might write it: rotation and growth, the Jacobian [[a, -1], [1, a]]."""

    def __init__(self) -> None:
        super().__init__(2)
        self.growth = nn.Parameter(torch.tensor(0.7))

    def _velocity(self, t, x, context):
        return torch.stack([-x[..., 1], x[..., 0]], -1) + self.growth * x


REVERSE_FIELDS = {
    "constant": (lambda: ModuleField(Constant(), 2), lambda t, x: torch.zeros(2, 2)),
    "no parameters": (
        lambda: ModuleField(Shear(), 2),
        lambda t, x: torch.tensor([[0.0, t], [2 * x[0], 3.0]]),
    ),
    "subclass": (Own, lambda t, x: torch.tensor([[0.7, -1.0], [1.0, 0.7]])),
}
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("x_requires_grad", [False, True])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("make", "jacobian"), REVERSE_FIELDS.values(), ids=REVERSE_FIELDS)
def test_reverse_products_and_divergence_are_right_in_every_mode(
    make, jacobian, mode, x_requires_grad
):
    field = make()
    x = torch.randn(5, 2, requires_grad=x_requires_grad)
    expected = torch.stack([jacobian(0.5, row) for row in x.tolist()])
    with mode():
        t = torch.tensor(0.5)
        probes = torch.randn(3, 5, 2)
        velocity, products = field.velocity_and_products(t, x, probes)
        _, divergence = field.velocity_and_divergence(t, x)
        torch.testing.assert_close(velocity, field(t, x))
        torch.testing.assert_close(
            products, torch.einsum("bij,pbi->pbj", expected, probes), rtol=1e-14, atol=1e-14
        )
        torch.testing.assert_close(divergence, trace(expected), rtol=1e-14, atol=1e-14)
        if mode is not torch.enable_grad:
            assert not velocity.requires_grad
            assert not products.requires_grad


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_inference_mode_changes_no_result(make):
    field = make()
    x, context = rows_for(field, 4)
    t = torch.rand(4)
    expected = field.velocity_and_divergence(t, x, context)
    with torch.inference_mode():
        context = None if context is None else context.clone()
        result = field.velocity_and_divergence(t.clone(), x.clone(), context)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)


def test_reverse_products_leave_x_as_it_was():
    field = ModuleField(UserNetwork(2), 2)
    x = torch.randn(3, 2)
    field.velocity_and_products(torch.tensor(0.5), x, torch.randn(1, 3, 2))
    assert not x.requires_grad
    assert x.grad is None
    assert all(parameter.grad is None for parameter in field.parameters())


def test_reverse_products_pass_gradients_to_a_graph_behind_x():
    field = perturbed(ModuleField(UserNetwork(2), 2))
    root = torch.randn(3, 2, requires_grad=True)
    weights = torch.randn(3)
    _, divergence = field.velocity_and_divergence(torch.tensor(0.5), root.exp())
    expected = trace(jacobians(field, torch.tensor(0.5), root.exp()))
    torch.testing.assert_close(
        gradients(divergence, weights, [root]),
        gradients(expected, weights, [root]),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_no_probes_give_the_velocity_and_no_products(make):
    field = make()
    x, context = rows_for(field, 3)
    t = torch.rand(())
    velocity, products = field.velocity_and_products(t, x, x.new_zeros(0, *x.shape), context)
    torch.testing.assert_close(velocity, field(t, x, context))
    assert len(products) == 0


CALLS = {
    "forward": lambda field, t, x, c: field(t, x, c),
    "products": lambda field, t, x, c: field.velocity_and_products(t, x, x.unsqueeze(0), c),
    "divergence": lambda field, t, x, c: field.velocity_and_divergence(t, x, c),
}


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_each_call_counts_as_one_evaluation(make):
    field = make()
    x, context = rows_for(field, 3)
    with count_evaluations(field) as nfe:
        for expected, (call, times) in enumerate(itertools.product(CALLS.values(), [(), (3,)]), 1):
            call(field, torch.rand(times), x, context)
            assert nfe.value == expected


STAGES = {"euler": 1, "midpoint": 2, "heun3": 3, "rk4": 4}


@pytest.mark.parametrize(("name", "method"), in_turn(FIELDS, STAGES))
def test_a_solve_counts_stages_times_steps(name, method):
    field = FIELDS[name]()
    transform = ContinuousTransform(field, solver=ODESolver(method=method, steps=5))
    x, context = rows_for(field, 3)
    with count_evaluations(transform) as nfe:
        transform.to_base_and_ladj(x, context)
    assert nfe.value == STAGES[method] * 5


@pytest.mark.parametrize("blocks", [1, 2])
def test_backward_counts_for_the_adjoint_and_not_for_backprop(blocks):
    flow = cnf(blocks=blocks)
    for gradient, backward in (("adjoint", 4 * 5 * blocks), ("backprop", 0)):
        solver = ODESolver(method="rk4", steps=5, gradient=gradient)
        solved = flow.using(solver=solver)
        with count_evaluations(solved) as nfe:
            log_prob = solved.log_prob(torch.randn(3, 2)).sum()
            assert nfe.value == 4 * 5 * blocks
            log_prob.backward()
        assert nfe.value == 4 * 5 * blocks + backward


def test_sampling_counts_as_the_density_does():
    flow = cnf(solver=ODESolver(method="rk4", steps=5), divergence=Hutchinson())
    with count_evaluations(flow) as nfe:
        flow.sample(3)
        assert nfe.value == 20
        flow.sample_and_log_prob(3)
        assert nfe.value == 40


def test_nested_counters_each_count_what_they_see():
    field = mlp()
    x = torch.randn(3, 2)
    t = torch.tensor(0.5)
    with count_evaluations(field) as outer:
        field(t, x)
        with count_evaluations(field) as inner:
            field.velocity_and_divergence(t, x)
            field(t, x)
        field(t, x)
    field(t, x)
    assert (outer.value, inner.value) == (4, 2)


def test_a_counter_takes_its_hooks_away_even_after_an_exception():
    flow = cnf(blocks=2)
    field = flow.transforms[0].vector_field
    with pytest.raises(ZeroDivisionError), count_evaluations(flow) as nfe:  # noqa: PT012
        field(torch.tensor(0.5), torch.randn(3, 2))
        raise ZeroDivisionError
    assert nfe.value == 1
    field(torch.tensor(0.5), torch.randn(3, 2))
    assert nfe.value == 1
    assert not any(module._forward_pre_hooks for module in flow.modules())


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_calls_leave_nothing_behind(make):
    field = make()
    x, context = rows_for(field, 3)
    before = {name: value.clone() for name, value in field.state_dict().items()}
    attributes = [set(vars(module)) for module in field.modules()]
    hooks = [len(module._forward_pre_hooks) for module in field.modules()]
    for call in CALLS.values():
        call(field, torch.rand(()), x, context)
    torch.testing.assert_close(field.state_dict(), before, rtol=0, atol=0)
    assert [set(vars(module)) for module in field.modules()] == attributes
    assert [len(module._forward_pre_hooks) for module in field.modules()] == hooks


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_training_and_evaluation_give_the_same(make):
    field = make()
    x, context = rows_for(field, 3)
    t = torch.rand(())
    for call in CALLS.values():
        in_training = call(field.train(), t, x, context)
        torch.testing.assert_close(call(field.eval(), t, x, context), in_training, rtol=0, atol=0)


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_float32_stays_float32_and_near_float64(make):
    field = make()
    x, context = rows_for(field, 4)
    t = torch.rand(4)
    expected = field.velocity_and_divergence(t, x, context)
    context = None if context is None else context.float()
    velocity, divergence = field.float().velocity_and_divergence(t.float(), x.float(), context)
    torch.testing.assert_close(
        (velocity.double(), divergence.double()), expected, rtol=1e-4, atol=1e-4
    )
    assert velocity.dtype == divergence.dtype == torch.float32


def test_only_fields_with_a_formula_say_so():
    assert LinearField(2).has_closed_form_divergence
    assert mlp(hidden_features=(8,), activation="sin").has_closed_form_divergence
    assert mlp(hidden_features=(8, 8)).has_closed_form_divergence
    assert not mlp(hidden_features=(8, 8, 8), activation="sin").has_closed_form_divergence
    assert not ModuleField(UserNetwork(2), 2).has_closed_form_divergence


class Narrow(nn.Module):
    def forward(self, t, x):
        return x[..., :1]


class Listing(nn.Module):
    def forward(self, t, x):
        return [x]


def test_a_network_of_the_wrong_shape_is_refused(shapes_unchecked):
    t, x = torch.tensor(0.0), torch.zeros(3, 2)
    with pytest.raises(
        ValueError, match=r"network must return the shape of x, \(3, 2\); got \(3, 1\)\."
    ):
        ModuleField(Narrow(), 2)(t, x)
    with pytest.raises(
        ValueError, match=r"network must return the shape of x, \(3, 2\); got list\."
    ):
        ModuleField(Listing(), 2)(t, x)


class Calls(nn.Module):
    """A network of a user's, given by a function."""

    def __init__(self, call, width=2):
        super().__init__()
        self.layer = nn.Linear(width, 2)
        self.call = call

    def forward(self, t, x, context=None):
        return self.call(self.layer, t, x, context)


TIMES = pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.1, 0.2, 0.3])], ids=str)
WRONG_NETWORKS = {
    "cat": lambda layer, t, x, context: layer(torch.cat([x, t], -1)),
    "stack": lambda layer, t, x, context: torch.stack([x, t]),
    "index": lambda layer, t, x, context: x[..., 2],
    "another width": lambda layer, t, x, context: layer(x[..., :1]),
    "no argument": lambda layer, t, x, context: layer(x, t, context),
}


@TIMES
@pytest.mark.parametrize("call", WRONG_NETWORKS.values(), ids=WRONG_NETWORKS)
def test_a_network_that_fails_is_told_the_shapes_and_the_line_that_concatenates(call, t):
    message = (
        r"network failed, called as network\(t, x\) with the shapes t \(3?,?\), x \(3, 2\): .*"
        r"torch.cat\(\[x, t\[..., None\].expand\(\*x.shape\[:-1\], 1\)\], -1\)\."
    )
    with pytest.raises(ValueError, match=message):
        ModuleField(Calls(call), 2)(t, torch.zeros(3, 2))


@pytest.mark.parametrize(
    "error", [RuntimeError("can't allocate memory"), NotImplementedError("no kernel")], ids=str
)
def test_other_errors_of_a_network_are_left_as_they_are(error):
    def call(*arguments):
        raise error

    with pytest.raises(type(error)) as caught:
        ModuleField(Calls(call), 2)(torch.tensor(0.3), torch.zeros(3, 2))
    assert caught.value is error


@TIMES
@pytest.mark.parametrize("batch", [(3,), (4, 3)], ids=str)
def test_the_line_that_concatenates_works(t, batch):
    def joined(layer, t, x, context):
        rows = x.shape[:-1]
        return layer(torch.cat([x, t[..., None].expand(*rows, 1), context.expand(*rows, -1)], -1))

    x, context, network = torch.randn(*batch, 2), torch.randn(3, 1), Calls(joined, width=4)
    expected = x @ network.layer.weight[:, :2].mT + t[..., None] * network.layer.weight[:, 2]
    expected = expected + context * network.layer.weight[:, 3] + network.layer.bias
    field = ModuleField(network, 2, 1)
    torch.testing.assert_close(field(t, x, context), expected)
    with pytest.raises(ValueError, match=r"context \(3, 1\): .*context.expand\(\*x.shape"):
        ModuleField(Calls(WRONG_NETWORKS["cat"]), 2, 1)(t, x, context)


@pytest.mark.parametrize(
    "change",
    [torch.Tensor.long, torch.Tensor.cfloat, lambda x: x.to("meta")],
    ids=["long", "complex", "meta"],
)
def test_a_velocity_of_no_real_numbers_is_refused(change, shapes_unchecked):
    field = ModuleField(Calls(lambda layer, t, x, context: change(x)), 2)
    with pytest.raises(ValueError, match=r"network must return a velocity of dtype torch.float64"):
        field(torch.tensor(0.0), torch.zeros(3, 2))


def test_a_network_may_change_in_place_what_it_is_given():
    def inplace(layer, t, x, context):
        return layer(x.mul_(0.5).add_(t.add_(1.0)) + context.mul_(2.0))

    def outofplace(layer, t, x, context):
        return layer(0.5 * x + t + 1.0 + 2.0 * context)

    first = Calls(inplace)
    second = Calls(outofplace)
    second.load_state_dict(first.state_dict())
    x, context = torch.randn(3, 2), torch.randn(3, 1)
    given = x.clone(), context.clone()
    found = []
    for network in (first, second):
        field = ModuleField(network, 2, 1)
        flow = Flow([ContinuousTransform(field, solver=ODESolver(method="rk4", steps=2))])
        with torch.inference_mode():
            found.append([flow.to_data(x, context), flow.log_prob(x, context)])
        found[-1] += [flow.to_data(x, context), flow.log_prob(x, context)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close((x, context), given, rtol=0, atol=0)


VALUE, TYPE = ValueError, TypeError
BAD_ARGUMENTS = [
    (lambda: MLPField(0), VALUE, r"features must be at least 1; got 0\."),
    (lambda: MLPField(-2), VALUE, r"features must be at least 1; got -2\."),
    (lambda: MLPField(2.0), TYPE, r"features must be an int; got 2\.0\."),
    (lambda: MLPField(True), TYPE, r"features must be an int; got True\."),
    (lambda: MLPField("2"), TYPE, r"features must be an int; got '2'\."),
    (lambda: MLPField(2, -1), VALUE, r"context_features must be at least 0; got -1\."),
    (lambda: MLPField(2, 1.5), TYPE, r"context_features must be an int; got 1\.5\."),
    (lambda: MLPField(2, None), TYPE, r"context_features must be an int; got None\."),
    (
        lambda: MLPField(2, hidden_features=()),
        VALUE,
        r"hidden_features must name at least one hidden layer; got \(\)\.",
    ),
    (
        lambda: MLPField(2, hidden_features=(8, 0)),
        VALUE,
        r"each of hidden_features must be at least 1; got 0\.",
    ),
    (
        lambda: MLPField(2, hidden_features=(8, 8.0)),
        TYPE,
        r"each of hidden_features must be an int; got 8\.0\.",
    ),
    (
        lambda: MLPField(2, layer="dense"),
        VALUE,
        r"layer must be one of ignore, concat, squash, .*, film; got 'dense'\.",
    ),
    (
        lambda: MLPField(2, activation="relu"),
        VALUE,
        r"activation must be one of tanh, .*, sin; got 'relu'\.",
    ),
    (
        lambda: MLPField(2, activation=("sin", "relu")),
        VALUE,
        r"activation must be one of tanh, .*, sin; got 'relu'\.",
    ),
    (
        lambda: MLPField(2, activation=("sin", "silu", "silu")),
        VALUE,
        r"one for each of the 2 hidden layers; got 3 names\.",
    ),
    (
        lambda: MLPField(2, hidden_features=(8,), activation=()),
        VALUE,
        r"one for each of the 1 hidden layers; got 0 names\.",
    ),
    *(
        (
            lambda frequency=frequency: MLPField(2, frequency=frequency),
            VALUE,
            rf"frequency must be positive and finite; got {frequency}\.",
        )
        for frequency in (0, -1.0, math.inf, math.nan)
    ),
    (lambda: LinearField(0), VALUE, r"features must be at least 1; got 0\."),
    (lambda: LinearField(2, -1), VALUE, r"context_features must be at least 0; got -1\."),
    (lambda: LinearField(2.0), TYPE, r"features must be an int; got 2\.0\."),
    (lambda: ModuleField(Narrow(), 0), VALUE, r"features must be at least 1; got 0\."),
    (lambda: ModuleField(Narrow(), 2, -1), VALUE, r"context_features must be at least 0"),
    (
        lambda: ModuleField(torch.tanh, 2),
        TYPE,
        r"network must be a torch\.nn\.Module; got builtin_function_or_method\.",
    ),
    (lambda: ModuleField(UserNetwork, 2), TYPE, r"network must be a torch\.nn\.Module; got type\."),
    (lambda: CNF(2, activation="relu"), VALUE, r"activation must be one of"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_with_what_was_expected_and_what_came(
    make, error, message, shapes_unchecked
):
    with pytest.raises(error, match=message):
        make()


def test_a_vector_field_without_velocity_cannot_be_made():
    class Empty(VectorField):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty(2)


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_pre_hooks_of_any_kind_fire_once_for_each_evaluation(with_kwargs):
    field, calls = mlp(), []

    def hook(*arguments):
        calls.append(arguments)

    field.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
    t, x = torch.tensor(0.5), torch.randn(3, 2)
    field(t, x)
    field.velocity_and_divergence(t, x)
    field.velocity_and_products(t, x, torch.ones(1, 3, 2))
    assert len(calls) == 3


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_single_width_is_refused():
    with pytest.raises(TypeError, match=r"widths such as \(128, 128\); got 8"):
        MLPField(2, hidden_features=8)


@pytest.mark.parametrize("context_features", [0, 3])
def test_the_hyper_layer_is_a_network_of_time_with_eight_hidden_tanh_units(context_features):
    layer = perturbed(LAYERS["hyper"](2, 4, context_features))
    hypernet = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 4 * 3))  # as in FFJORD's code
    with torch.no_grad():
        hypernet[0].load_state_dict(layer.hidden.state_dict())
        hypernet[2].weight.copy_(layer.change.weight)
        rest = torch.cat([layer.linear.weight, layer.linear.bias[:, None]], -1)
        hypernet[2].bias.copy_(rest.flatten())
    x = torch.randn(5, 2)
    context = torch.randn(5, context_features) if context_features else None
    for t in torch.rand(3):
        weights = hypernet(t.reshape(1)).reshape(4, 3)
        expected = x @ weights[:, :-1].T + weights[:, -1]
        if context is not None:
            expected = expected + context @ layer.shift.weight.T
        torch.testing.assert_close(layer(t, context).value(x), expected)


@pytest.mark.parametrize("reset", [None, "reset_parameters", "reset_to_zero"])
def test_a_new_hyper_layer_is_the_same_at_every_time_and_can_learn_to_differ(reset):
    layer = LAYERS["hyper"](2, 4)
    if reset is not None:
        getattr(layer, reset)()
    x, t = torch.randn(5, 2), torch.tensor(0.7)
    assert torch.equal(layer(t, None).value(x), layer(t / 3, None).value(x))
    layer(t, None).value(x).square().add(layer(t, None).value(x)).sum().backward()
    assert layer.change.weight.grad.abs().min() > 0


def test_weights_of_the_earlier_hyper_layer_are_refused_with_the_way_to_keep_them():
    layer = LAYERS["hyper"](2, 4)
    old = {"linear.weight": torch.zeros(4, 2), "linear.bias": torch.zeros(4)}
    old |= {"slope.weight": torch.zeros(4, 2), "slope.bias": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=r"unlike FFJORD.s\. It equals a 'blend' layer"):
        layer.load_state_dict(old)
