"""Laws of the convolutional field: convolution, locality, shift equivariance, all layers."""

import math

import pytest
import torch
from test_vector_fields import BATCHES, REVERSE_MODE, assert_divergence_is_the_trace
from torch import nn
from zoo import conv, perturbed, rows_for

from cnf.transforms import ContinuousTransform
from cnf.vector_fields import ConvField
from cnf.vector_fields.conv import Convolution
from cnf.vector_fields.jacobian.affine_map import AffineMap
from cnf.vector_fields.layers import LAYERS

AFFINE_MAPS = {
    "shared": lambda: AffineMap(torch.randn(2, 27), None, torch.randn(2)),
    "bias of each row": lambda: AffineMap(torch.randn(2, 27), None, torch.randn(4, 2)),
    "gate of each row": lambda: AffineMap(torch.randn(2, 27), torch.rand(4, 2), torch.randn(2)),
    "weight of each row": lambda: AffineMap(torch.randn(4, 2, 27), None, torch.randn(4, 2)),
    "offset under the gate of each row": lambda: AffineMap(
        torch.randn(2, 27), torch.rand(4, 2), torch.randn(4, 2), torch.randn(2)
    ),
    "offset under gate and weight of each row": lambda: AffineMap(
        torch.randn(4, 2, 27), torch.rand(4, 2), torch.randn(2), torch.randn(2)
    ),
}


@pytest.mark.parametrize("make", AFFINE_MAPS.values(), ids=AFFINE_MAPS)
def test_a_convolution_is_the_affine_map_of_every_patch(make):
    affine = make()
    images, directions = torch.randn(4, 3, 5, 4), torch.randn(2, 4, 3, 5, 4)
    padded, padded_directions = (nn.functional.pad(x, (1, 1, 1, 1)) for x in (images, directions))
    value, tangent = Convolution(affine, 3).linearised(images)
    product = tangent(directions)
    for i in range(5):
        for j in range(4):
            patch = padded[:, :, i : i + 3, j : j + 3].flatten(1)
            direction = padded_directions[..., i : i + 3, j : j + 3].flatten(2)
            torch.testing.assert_close(value[..., i, j], affine.value(patch))
            torch.testing.assert_close(product[..., i, j], affine.tangent(direction))


def test_a_field_that_ignores_time_is_a_stack_of_torch_convolutions():
    field = conv((2, 5, 4), hidden_channels=(3, 6), layer="ignore", activation="softplus")
    stack = []
    for layer, (inputs, outputs) in zip(field.layers, [(2, 3), (3, 6), (6, 2)], strict=True):
        convolution = nn.Conv2d(inputs, outputs, 3, padding="same")
        with torch.no_grad():
            convolution.weight.copy_(layer.linear.weight.view_as(convolution.weight))
            convolution.bias.copy_(layer.linear.bias)
        stack += [convolution, nn.Softplus(threshold=40)]
    images = torch.randn(7, 2, 5, 4)
    expected = nn.Sequential(*stack[:-1])(images).flatten(1)
    torch.testing.assert_close(field(torch.rand(7), images.flatten(1)), expected)


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("times", ["one for all", "one for each row"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_forward_and_reverse_products_agree_for_every_layer(layer, batch, times, context_features):
    field = conv((2, 2, 3), context_features, layer=layer)
    x, context = rows_for(field, *batch)
    t = torch.rand(batch if times == "one for each row" else ())
    probes = torch.randn(3, *x.shape)
    velocity, forward = field.velocity_and_products(t, x, probes, context)
    expected, reverse = REVERSE_MODE(field, t, x, probes, context)
    torch.testing.assert_close(velocity, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        (probes * forward).sum(-1), (probes * reverse).sum(-1), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_divergence_is_the_trace_with_one_context_for_all_rows(layer):
    field = conv((1, 2, 3), 2, layer=layer)
    x, _ = rows_for(field, 3)
    assert_divergence_is_the_trace(field, torch.rand(()), x, torch.randn(2))
    assert_divergence_is_the_trace(field, torch.rand(3), x, torch.randn(2))


@pytest.mark.parametrize(("kernel_size", "depth"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_a_pixel_depends_on_those_within_reach_and_on_no_others(kernel_size, depth):
    field = conv((2, 9, 8), hidden_channels=(3,) * depth, kernel_size=kernel_size)
    x = torch.randn(field.features)
    jacobian = torch.autograd.functional.jacobian(lambda y: field(torch.rand(()), y), x)
    influence = jacobian.view(2, 9, 8, 2, 9, 8).abs()[:, 4, 4].amax((0, 1))
    reach = kernel_size // 2 * (depth + 1)
    rows, columns = torch.arange(9).sub(4).abs(), torch.arange(8).sub(4).abs()
    within = (rows[:, None] <= reach) & (columns <= reach)
    assert torch.equal(influence > 0, within)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_shifted_image_has_the_shifted_velocity_away_from_the_border(layer):
    field = conv((1, 12, 12), layer=layer, hidden_channels=(3,))
    images = torch.randn(12, 12)
    shifted = images.roll((1, 2), (0, 1))
    t = torch.rand(())
    velocity, moved = (field(t, x.flatten()).view(12, 12) for x in (images, shifted))
    torch.testing.assert_close(moved[5:9, 5:9], velocity[4:8, 3:7], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_new_conv_field_is_at_rest(layer, context_features):
    field = ConvField((2, 3, 3), context_features, layer=layer, hidden_channels=(4,))
    x, context = rows_for(field, 5)
    assert (field(torch.rand(5), 3 * x, context) == 0).all()
    perturbed(field)
    assert (field(torch.rand(5), 3 * x, context) != 0).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_no_rows_give_no_rows(layer):
    field = conv((1, 2, 3), 2, layer=layer)
    x, context = rows_for(field, 0)
    for t in (torch.rand(()), torch.rand(0)):
        velocity, divergence = field.velocity_and_divergence(t, x, context)
        assert velocity.shape == (0, 6)
        assert divergence.shape == (0,)


def test_initial_weights_are_those_of_torch_convolutions():
    field = ConvField((20, 2, 2), hidden_channels=(500,), layer="ignore")
    reference = nn.Conv2d(20, 500, 3)
    drawn = field.layers[0].linear
    for mine, theirs in ((drawn.weight, reference.weight), (drawn.bias, reference.bias)):
        bound = 1 / math.sqrt(20 * 9)
        assert mine.abs().max() <= bound
        assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.1)


def test_the_exact_divergence_of_many_pixels_warns():
    transform = ContinuousTransform(ConvField((1, 9, 9), hidden_channels=(1,)))
    with pytest.warns(UserWarning, match="81 Jacobian products"):
        transform.to_base_and_ladj(torch.zeros(1, 81))


VALUE, TYPE = ValueError, TypeError
BAD_ARGUMENTS = [
    ({"shape": (8, 8)}, VALUE, r"shape must be \(channels, height, width\); got \(8, 8\)\."),
    ({"shape": 64}, TYPE, r"shape must be sizes such as \(3, 32, 32\); got 64\."),
    ({"shape": (1, 0, 8)}, VALUE, r"each of shape must be at least 1; got 0\."),
    ({"shape": (1, 8.0, 8)}, TYPE, r"each of shape must be an int; got 8\.0\."),
    ({"context_features": -1}, VALUE, r"context_features must be at least 0; got -1\."),
    ({"hidden_channels": ()}, VALUE, r"hidden_channels must name at least one hidden layer"),
    ({"hidden_channels": 32}, TYPE, r"hidden_channels must be widths such as .*; got 32\."),
    ({"hidden_channels": (0,)}, VALUE, r"each of hidden_channels must be at least 1; got 0\."),
    ({"layer": "dense"}, VALUE, r"layer must be one of ignore, .*; got 'dense'\."),
    ({"activation": "relu"}, VALUE, r"activation must be one of tanh, .*; got 'relu'\."),
    ({"kernel_size": 4}, VALUE, r"kernel_size must be odd; got 4\. Try 5\."),
    ({"kernel_size": 0}, VALUE, r"kernel_size must be at least 1; got 0\."),
    ({"kernel_size": 3.0}, TYPE, r"kernel_size must be an int; got 3\.0\."),
]


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("settings", "error", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        ConvField(**{"shape": (1, 8, 8), **settings})
