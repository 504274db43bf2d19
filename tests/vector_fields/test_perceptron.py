"""Laws of perceptrons of any depth: the divergence is the trace, under every way of autograd."""

import functools
import itertools

import pytest
import torch
from test_vector_fields import REVERSE_MODE, gradients, leaves
from torch.autograd import forward_ad
from zoo import mlp, rows_for

from cnf._memory import LiveBytes
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.jacobian.affine_map import AffineMap
from cnf.vector_fields.jacobian.autograd import standard_basis
from cnf.vector_fields.jacobian.perceptron import Perceptron, jacobian_trace
from cnf.vector_fields.layers import LAYERS
from cnf.vector_fields.staged import applied, linearised

DEPTHS = {1: (5,), 2: (5, 4), 3: (5, 4, 6), 4: (5, 4, 6, 3), 5: (4, 3, 5, 2, 3)}
DEEP = [depth for depth in DEPTHS if depth > 2]  # test_vector_fields has the others
WHAT = ["divergence", "products"]


def assert_divergence_is_the_trace(field, t, x, context=None):
    """By reverse mode through the velocity alone."""
    (t, x, context), inputs = leaves(field, t, x, context)
    velocity, divergence = field.velocity_and_divergence(t, x, context)
    basis = standard_basis(x)
    expected_velocity, products = REVERSE_MODE(field, t, x, basis, context)
    expected = (basis * products).sum(-1).sum(0)
    torch.testing.assert_close(velocity, expected_velocity, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(divergence, expected, rtol=1e-12, atol=1e-12)

    weights = torch.randn_like(divergence)
    found, brute = (gradients(value, weights, inputs) for value in (divergence, expected))
    torch.testing.assert_close(found, brute, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        _, alone = field.velocity_and_divergence(t, x, context)
    torch.testing.assert_close(alone, divergence, rtol=1e-13, atol=1e-13)


def evaluated(network, x, probes):
    """The value, and products with probes, or the trace if there are none."""
    if probes is None:
        return network.velocity_and_divergence(x)
    value, tangents = linearised(network.stages, x)
    return value, applied(tangents, probes)


def of_parameters(depth, bias_rows=None):
    """A function that makes a network of weights and biases, and these tensors."""
    widths = (2, *DEPTHS[depth], 2)
    weights = [torch.randn(n, m) / m**0.5 for m, n in itertools.pairwise(widths)]
    biases = [
        torch.randn(n) if bias_rows is None else torch.randn(bias_rows, n) for n in widths[1:]
    ]

    def network(*parameters):
        pairs = zip(parameters[: depth + 1], parameters[depth + 1 :], strict=True)
        maps = [AffineMap(weight, None, bias) for weight, bias in pairs]
        return Perceptron(maps, [ACTIVATIONS["tanh"]] * depth)

    return network, [tensor.requires_grad_() for tensor in (*weights, *biases)]


@pytest.mark.parametrize("depth", DEEP)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_divergence_is_the_trace_for_every_activation(activation, depth):
    field = mlp(3, activation=activation, hidden_features=DEPTHS[depth])
    x, _ = rows_for(field, 4)
    assert_divergence_is_the_trace(field, torch.rand(()), x)


@pytest.mark.parametrize("features", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("depth", DEEP)
def test_divergence_is_the_trace_in_any_dimension(depth, features):
    field = mlp(features, activation="tanh", hidden_features=DEPTHS[depth])
    x, _ = rows_for(field, 3)
    assert_divergence_is_the_trace(field, torch.rand(()), x)


@pytest.mark.parametrize("times", [(), (3, 2)], ids=str)
@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_divergence_is_the_trace_for_every_layer(layer, context_features, times):
    field = mlp(2, context_features, layer=layer, hidden_features=DEPTHS[3])
    x, context = rows_for(field, 3, 2)
    assert_divergence_is_the_trace(field, torch.rand(times), x, context)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (7,), (2, 0), (2, 4)], ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
def test_divergence_is_the_trace_in_any_batch(depth, batch):
    field = mlp(2, 3, layer="concat", activation="gelu", hidden_features=DEPTHS[depth])
    x, context = rows_for(field, *batch)
    for own in (context, torch.randn(3)):
        assert_divergence_is_the_trace(field, torch.rand(()), x, own)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_pass_gradcheck_for_every_activation_and_layer(activation, layer):
    field = mlp(2, activation=activation, layer=layer, hidden_features=(3, 2, 3))
    x, _ = rows_for(field, 2)
    (t, x), _ = leaves(field, torch.rand(()), x)
    for call in (
        field.velocity_and_divergence,
        lambda t, x: field.velocity_and_products(t, x, torch.ones(1, 2, 2)),
    ):
        assert torch.autograd.gradcheck(call, (t, x), fast_mode=True)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("bias_rows", [None, 2])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_first_and_second_derivatives_in_every_input_pass_gradcheck(depth, bias_rows, what):
    network, parameters = of_parameters(depth, bias_rows)
    x = torch.randn(2, 2, requires_grad=True)
    probes = None if what == "divergence" else torch.randn(1, 2, 2, requires_grad=True)

    def call(x, probes, *parameters):
        return evaluated(network(*parameters), x, probes)

    inputs = (x, probes, *parameters)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_torch_func_and_forward_mode_give_the_gradient_of_autograd(depth):
    field = mlp(2, hidden_features=DEPTHS[depth], activation="silu")
    x, _ = rows_for(field, 5)
    t = torch.rand(())

    def divergence(x):
        return field.velocity_and_divergence(t, x)[1].sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(divergence(leaf), leaf)
    by_rows = torch.func.vmap(torch.func.grad(divergence))(x)
    torch.testing.assert_close(by_rows, expected, rtol=1e-11, atol=1e-11)

    direction = torch.randn_like(x)
    change = (expected * direction).sum()
    _, forward = torch.func.jvp(divergence, (x,), (direction,))
    torch.testing.assert_close(forward, change, rtol=1e-11, atol=1e-11)
    with forward_ad.dual_level():
        dual = divergence(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, change)


def test_gradients_of_many_cotangents_at_once_are_those_of_each():
    network, parameters = of_parameters(3)
    x = torch.randn(4, 2, requires_grad=True)
    _, divergence = network(*parameters).velocity_and_divergence(x)
    gradient = functools.partial(torch.autograd.grad, divergence, x, retain_graph=True)
    (at_once,) = gradient(torch.eye(4), is_grads_batched=True)
    each = torch.stack([gradient(row)[0] for row in torch.eye(4)])
    torch.testing.assert_close(at_once, each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("context_rows", [None, 0, 1, 1500])
@pytest.mark.parametrize("layer", ["film", "squash"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_many_rows_have_the_numbers_and_gradients_that_they_have_alone(depth, layer, context_rows):
    field = mlp(
        2, 0 if context_rows is None else 1, hidden_features=DEPTHS[depth], layer=layer
    ).double()
    t, x = torch.rand(()), torch.randn(1500, 2)
    context = None if context_rows is None else torch.randn(*[context_rows] * bool(context_rows), 1)
    (t, x, context), inputs = leaves(field, t, x, context)
    found = torch.cat([part.flatten() for part in field.velocity_and_divergence(t, x, context)])

    def part(rows):
        own = context[rows] if context_rows == 1500 else context
        return field.velocity_and_divergence(t, x[rows], own)

    parts = zip(part(slice(0, 700)), part(slice(700, None)), strict=True)
    alone = torch.cat([torch.cat(each).flatten() for each in parts])
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    together, apart = (gradients(values, weights, inputs) for values in (found, alone))
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_autocast_gives_bfloat16_near_the_numbers_of_float32(depth, activation):
    field = mlp(2, hidden_features=DEPTHS[depth], activation=activation).float()
    t, x = torch.rand((), dtype=torch.float32), torch.randn(4, 2, dtype=torch.float32)
    expected = field.velocity_and_divergence(t, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = field.velocity_and_divergence(t, x)
    assert found[0].dtype == torch.bfloat16
    for value, precise in zip(found, expected, strict=True):
        assert (value - precise).abs().max() < 0.05 * (1 + precise.abs().max())


def test_without_gradients_the_memory_of_a_deep_trace_hardly_grows_with_the_features():
    def peak(features, rows=500, width=8):
        widths = (features, width, width, width, features)
        weights = [torch.randn(n, m) for m, n in itertools.pairwise(widths)]
        slopes = [torch.randn(rows, width) for _ in range(3)]
        with torch.no_grad(), LiveBytes() as live:
            jacobian_trace(weights, slopes)
        return live.peak

    assert peak(64) < 1.5 * peak(4)
