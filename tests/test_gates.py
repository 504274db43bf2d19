"""Laws of the gated layers, made all at once: each is as made alone, with all gradients."""

import pytest
import torch
from test_vector_fields import gradients, leaves
from torch import nn
from zoo import mlp, perturbed, residual

from cnf.vector_fields import gates
from cnf.vector_fields.gates import affine_maps
from cnf.vector_fields.layers import LAYERS, ConcatSquashLinear, SquashLinear

CONDITIONS = {
    "time": (0, None),
    "waves": (4, (4,)),
    "context of each row": (3, (5, 3)),
}


def stack(layer, conditions, gate_context=False):
    """Three layers, of which the last is an output layer."""
    return perturbed(
        nn.ModuleList(
            LAYERS[layer](inputs, outputs, conditions, gate_context=gate_context or i < 2)
            for i, (inputs, outputs) in enumerate([(2, 4), (4, 3), (3, 2)])
        )
    )


def flat(maps):
    return [part for affine in maps for part in affine if part is not None]


@pytest.mark.parametrize("gate_context", [False, True])
@pytest.mark.parametrize(("size", "shape"), CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("times", [(), (5,)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_maps_made_at_once_are_those_made_one_by_one(layer, times, size, shape, gate_context):
    layers = stack(layer, size, gate_context)
    context = None if shape is None else torch.randn(shape)
    (t, context), inputs = leaves(layers, torch.rand(times), context)
    at_once = flat(affine_maps(list(layers), t, context))
    one_by_one = flat([layer(t, context) for layer in layers])
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-13, atol=1e-13)

    flat_weights = torch.cat([torch.randn_like(part).flatten() for part in at_once])
    found = [
        gradients(torch.cat([part.flatten() for part in parts]), flat_weights, inputs)
        for parts in (at_once, one_by_one)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        alone = flat(affine_maps(list(layers), t, context))
    torch.testing.assert_close(alone, one_by_one, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("layer", "waves"),
    [("squash", 0), ("concatsquash", 0), ("concatsquash", 2)],
)
@pytest.mark.parametrize("make", [mlp, residual])
def test_fields_make_their_gates_at_once(make, layer, waves, monkeypatch):
    field = make(2, layer=layer, time_features=waves)
    x = torch.randn(3, 2)
    t = torch.rand(())
    expected = field(t, x)
    for kind in (SquashLinear, ConcatSquashLinear):
        monkeypatch.setattr(kind, "forward", None)
    torch.testing.assert_close(field(t, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate_context", [False, True])
@pytest.mark.parametrize(("layer", "size"), [("squash", 0), ("concatsquash", 2)])
def test_first_and_second_derivatives_in_every_parameter_pass_gradcheck(layer, size, gate_context):
    layers = list(stack(layer, size, gate_context))
    parameters = gates._parameters(layers, 1 + size)
    parameters = [parameter.detach().requires_grad_() for parameter in parameters]
    q = torch.randn(1 + size, requires_grad=True)

    def call(q, *parameters):
        return gates._evaluate(3, q, parameters)

    assert torch.autograd.gradcheck(call, (q, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (q, *parameters), fast_mode=True)


def test_torch_func_sees_the_same():
    layers = list(stack("concatsquash", 0))
    t = torch.rand(4)

    def weights(t):
        return torch.cat([part.flatten() for part in flat(affine_maps(layers, t, None))])

    expected = torch.stack([torch.autograd.functional.jacobian(weights, one) for one in t])
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        found = torch.func.vmap(transform(weights))(t)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_autocast_works_as_one_by_one():
    layers = list(stack("concatsquash", 0).float())
    t = torch.rand((), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = flat(affine_maps(layers, t, None))
        expected = flat([layer(t, None) for layer in layers])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
