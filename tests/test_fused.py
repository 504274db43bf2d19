"""Laws of the fused evaluation: it is the plain one, with all gradients, in any blocks of rows."""

import itertools

import pytest
import torch
from test_vector_fields import FAR, NEAR, assert_divergence_is_the_trace, gradients, leaves
from torch.autograd import forward_ad
from zoo import mlp, rows_for

from cnf.vector_fields import fused
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.affine_map import AffineMap
from cnf.vector_fields.jacobian.perceptron import Perceptron
from cnf.vector_fields.layers import LAYERS

DEPTHS = {1: (5,), 2: (5, 4), 3: (5, 4, 6), 4: (5, 4, 6, 3), 5: (4, 3, 5, 2, 3)}
WHAT = ["divergence", "products"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of at most three rows."""
    monkeypatch.setattr(fused, "_CACHE_BYTES", 0)
    monkeypatch.setattr(fused, "_LEAST_ROWS", 3)


@pytest.fixture
def fused_only(monkeypatch):
    """No plain formulas to fall back on."""
    for way in ("divergence", "products"):
        monkeypatch.setattr(Perceptron, f"velocity_and_{way}", None)


def probes_for(what, x, count=3):
    return None if what == "divergence" else torch.randn(count, *x.shape)


def plainly(network, x, probes):
    if probes is None:
        return network.velocity_and_divergence(x)
    return network.velocity_and_products(x, probes)


def fusedly(network, x, probes):
    if probes is None:
        return fused.velocity_and_divergence(network, x)
    return fused.velocity_and_products(network, x, probes)


def assert_fused_is_plain(field, t, x, context, what):
    probes = probes_for(what, x)
    (t, x, context, probes), inputs = leaves(field, t, x, context, probes)
    made = [way(field._network(t, context), x, probes) for way in (fusedly, plainly)]
    torch.testing.assert_close(made[0], made[1], rtol=1e-13, atol=1e-13)

    weights = [torch.randn_like(value) for value in made[0]]
    by_way = [
        torch.autograd.grad(values, inputs, weights, allow_unused=True, materialize_grads=True)
        for values in made
    ]
    torch.testing.assert_close(by_way[0], by_way[1], rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        alone = fusedly(field._network(t, context), x, probes)
    torch.testing.assert_close(alone, made[0], rtol=1e-13, atol=1e-13)


def loose(depth, activation="tanh", features=2, bias_rows=None):
    """A function of x, probes or None, weights and biases, and these tensors."""
    widths = (features, *DEPTHS[depth], features)
    weights = [torch.randn(n, m) / m**0.5 for m, n in itertools.pairwise(widths)]
    biases = [
        torch.randn(n) if bias_rows is None else torch.randn(bias_rows, n) for n in widths[1:]
    ]
    names = (activation,) * depth if isinstance(activation, str) else activation
    activations = [ACTIVATIONS[name] for name in names]

    def network(*parameters):
        half = len(parameters) // 2
        pairs = zip(parameters[:half], parameters[half:], strict=True)
        return Perceptron([AffineMap(weight, None, bias) for weight, bias in pairs], activations)

    return network, [tensor.requires_grad_() for tensor in (*weights, *biases)]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_jet_is_the_value_and_its_derivatives(name):
    a = torch.cat([NEAR, FAR]).requires_grad_()
    value = ACTIVATIONS[name].value(a)
    (slope,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), a)
    expected = (value.detach(), slope.detach(), curvature)
    for order in (1, 2):
        jet = ACTIVATIONS[name].jet(a.detach().clone(), order)
        torch.testing.assert_close(jet, expected[: 1 + order], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_jets_in_float32_stay_finite_and_near(name):
    a = torch.tensor([-3e38, -1e20, -1000, -90, -1, 0.5, 90, 1000, 1e20, 3e38], dtype=torch.float32)
    a = a.clamp(-1e4, 1e4) if name == "sin" else a
    jet = ACTIVATIONS[name].jet(a.clone(), 2)
    precise = ACTIVATIONS[name].jet(a.double(), 2)
    assert {part.dtype for part in jet} == {torch.float32}
    for part, expected in zip(jet, precise, strict=True):
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_is_plain_for_every_activation_and_depth(activation, depth, what):
    field = mlp(3, activation=activation, hidden_features=DEPTHS[depth])
    x, _ = rows_for(field, 4)
    assert_fused_is_plain(field, torch.rand(()), x, None, what)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_fused_is_plain_for_every_layer(layer, depth, context_features, what):
    field = mlp(2, context_features, layer=layer, hidden_features=DEPTHS[depth])
    x, context = rows_for(field, 3, 2)
    assert_fused_is_plain(field, torch.rand(()), x, context, what)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (7,), (2, 0), (2, 4)], ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.usefixtures("small_blocks")
def test_fused_is_plain_in_any_batch_and_blocks(depth, batch, what):
    field = mlp(2, 3, layer="concat", activation="gelu", hidden_features=DEPTHS[depth])
    x, context = rows_for(field, *batch)
    for own in (context, torch.randn(3)):
        assert_fused_is_plain(field, torch.rand(()), x, own, what)


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("depth", [4, 5])
def test_divergence_of_a_deep_network_is_the_trace(depth, features):
    field = mlp(features, activation="tanh", hidden_features=DEPTHS[depth])
    x, _ = rows_for(field, 3)
    assert_divergence_is_the_trace(field, torch.rand(()), x)


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
    network, parameters = loose(depth, bias_rows=bias_rows)
    x = torch.randn(2, 2, requires_grad=True)
    probes = probes_for(what, x, 1)
    probes = probes if probes is None else probes.requires_grad_()
    inputs = (x, probes, *parameters)

    def call(x, probes, *parameters):
        return fusedly(network(*parameters), x, probes)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.usefixtures("fused_only")
def test_training_and_evaluation_are_fused(what):
    for layer in LAYERS:
        field = mlp(2, layer=layer, hidden_features=(5, 4, 3), time_features=int(layer != "ignore"))
        x, _ = rows_for(field, 4)
        x.requires_grad_()
        values = fusedly(field._network(torch.rand(()), None), x, probes_for(what, x))
        torch.autograd.grad(sum(value.sum() for value in values), [x, *field.parameters()])


@pytest.mark.parametrize("create_graph", [False, True])
def test_an_input_may_depend_on_another(create_graph):
    network, parameters = loose(2)
    found = []
    for way in (fusedly, plainly):
        x = (parameters[0][:3, :2].exp()) * parameters[-1]
        velocity, divergence = way(network(*parameters), x, None)
        scalar = velocity.square().sum() + divergence.exp().sum()
        first = torch.autograd.grad(scalar, parameters, create_graph=create_graph)
        if create_graph:
            first += torch.autograd.grad(sum(part.square().sum() for part in first), parameters)
        found.append(first)
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("what", WHAT)
def test_gradients_reach_what_asks_for_them_alone(what):
    network, parameters = loose(3)
    x = torch.randn(4, 2)
    probes = probes_for(what, x)
    asking = {"x": [x], "output bias": parameters[-1:], "second weight": parameters[1:2]}
    if probes is not None:
        asking["probes"] = [probes]
    for inputs in asking.values():
        for tensor in (x, *parameters, *(() if probes is None else (probes,))):
            tensor.requires_grad_(any(tensor is one for one in inputs))
        found = []
        for way in (fusedly, plainly):
            values = way(network(*parameters), x, probes)
            scalar = sum(value.square().sum() for value in values)
            found.append(torch.autograd.grad(scalar, inputs))
            assert values[0].requires_grad or way is plainly
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("what", WHAT)
def test_one_of_the_two_may_go_unused(what, create_graph, index):
    network, parameters = loose(2)
    x = torch.randn(4, 2, requires_grad=True)
    probes = probes_for(what, x)
    found = []
    for way in (fusedly, plainly):
        value = way(network(*parameters), x, probes)[index]
        found.append(
            torch.autograd.grad(
                value.square().sum(),
                [x, *parameters],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("what", WHAT)
def test_a_backward_pass_can_be_repeated_and_then_lets_go(what):
    network, parameters = loose(3)
    x = torch.randn(4, 2)
    scalar = sum(value.sum() for value in fusedly(network(*parameters), x, probes_for(what, x)))
    first, second = (torch.autograd.grad(scalar, parameters, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.autograd.grad(scalar, parameters)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(scalar, parameters)


def test_a_weight_changed_before_the_backward_pass_is_noticed():
    network, parameters = loose(2)
    _, divergence = fusedly(network(*parameters), torch.randn(4, 2), None)
    with torch.no_grad():
        parameters[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        divergence.sum().backward()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_torch_func_sees_the_same(depth):
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

    doubled = {name: 2 * value for name, value in field.named_parameters()}
    module = torch.nn.Module()
    module.field = field
    module.forward = lambda x: field.velocity_and_divergence(t, x)[1]
    called = torch.func.functional_call(
        module, {f"field.{name}": value for name, value in doubled.items()}, (x,)
    )
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(called, field.velocity_and_divergence(t, x)[1])


def test_gradients_of_many_cotangents_at_once_are_those_of_each():
    network, parameters = loose(3)
    x = torch.randn(4, 2, requires_grad=True)
    _, divergence = fusedly(network(*parameters), x, None)
    at_once = torch.autograd.grad(
        divergence, x, torch.eye(4), is_grads_batched=True, retain_graph=True
    )[0]
    each = [torch.autograd.grad(divergence, x, row, retain_graph=True)[0] for row in torch.eye(4)]
    torch.testing.assert_close(at_once, torch.stack(each), rtol=1e-12, atol=1e-12)


def test_autocast_works_as_in_the_plain_formulas():
    field = mlp(2, hidden_features=(5, 4)).float()
    x = torch.randn(4, 2, dtype=torch.float32)
    network = field._network(torch.rand((), dtype=torch.float32), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = fusedly(network, x, None), plainly(network, x, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found[0].dtype == torch.bfloat16


@pytest.mark.parametrize("what", WHAT)
def test_float32_stays_float32(what):
    field = mlp(2, hidden_features=(5, 4, 3)).float()
    x = torch.randn(4, 2, dtype=torch.float32, requires_grad=True)
    probes = None if what == "divergence" else torch.randn(2, 4, 2, dtype=torch.float32)
    values = fusedly(field._network(torch.rand((), dtype=torch.float32), None), x, probes)
    assert {value.dtype for value in values} == {torch.float32}
    found = gradients(values[1], torch.ones_like(values[1]), [x, *field.parameters()])
    assert {gradient.dtype for gradient in found} == {torch.float32}
