"""Laws of the residual field: its definition, its start, its bottleneck, its settings."""

import math

import pytest
import torch
from test_vector_fields import assert_divergence_is_the_trace
from torch import nn
from zoo import perturbed, residual, rows_for

from cnf.vector_fields import ResidualField
from cnf.vector_fields.layers import LAYERS


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_field_that_ignores_time_is_a_residual_network_of_torch_layers(blocks):
    field = residual(3, blocks=blocks, layer="ignore", activation=("tanh", "silu"))
    first, *inner, last = (layer.linear for layer in field.layers)
    x = torch.randn(5, 3)
    h = torch.tanh(first(x))
    for enter, leave in zip(inner[::2], inner[1::2], strict=True):
        h = h + leave(nn.functional.silu(enter(h)))
    torch.testing.assert_close(field(torch.rand(5), x), last(h))


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("times", [(), (3, 4)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_divergence_is_the_trace_for_every_layer(layer, times, context_features):
    count = 0 if layer == "ignore" else 1
    field = residual(3, context_features, layer=layer, time_features=count)
    x, context = rows_for(field, 3, 4)
    assert_divergence_is_the_trace(field, torch.rand(times), x, context)


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_new_residual_field_is_at_rest(layer, context_features):
    field = ResidualField(2, context_features, layer=layer, hidden_features=8)
    x, context = rows_for(field, 5)
    assert (field(torch.rand(5), 3 * x, context) == 0).all()
    perturbed(field)
    assert (field(torch.rand(5), 3 * x, context) != 0).all()


def test_a_block_whose_second_layer_is_zero_changes_nothing():
    deep, shallow = residual(3, blocks=3), residual(3, blocks=1)
    for index in (4, 6):
        deep.layers[index].reset_to_zero()
    for mine, theirs in zip(shallow.layers, [*deep.layers[:3], deep.layers[-1]], strict=True):
        mine.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3)
    t = torch.rand(())
    torch.testing.assert_close(deep(t, x), shallow(t, x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("width", "expected"), [(5, None), (4, 4), (1, 1), (8, None)])
def test_the_bottleneck_is_the_width_where_it_is_less_than_the_features(width, expected):
    assert residual(5, hidden_features=width).bottleneck == expected


def test_the_input_layer_is_sinusoidal_unless_told_otherwise():
    field = ResidualField(5, hidden_features=1000)
    first = field.layers[0].linear
    assert field.activation == ("sin", "silu")
    assert field.frequency == pytest.approx(1)
    assert first.weight.std().item() == pytest.approx(1, rel=0.05)
    assert first.bias.abs().max() <= math.pi
    assert ResidualField(2, activation="tanh").activation == ("tanh", "tanh")
    assert ResidualField(2, activation="tanh").frequency is None


VALUE, TYPE = ValueError, TypeError
BAD_ARGUMENTS = [
    ({"features": 0}, VALUE, r"features must be at least 1; got 0\."),
    ({"hidden_features": 0}, VALUE, r"hidden_features must be at least 1; got 0\."),
    ({"hidden_features": (8, 8)}, TYPE, r"hidden_features must be an int; got \(8, 8\)\."),
    ({"blocks": 0}, VALUE, r"blocks must be at least 1; got 0\."),
    ({"blocks": 1.5}, TYPE, r"blocks must be an int; got 1\.5\."),
    ({"layer": "dense"}, VALUE, r"layer must be one of ignore, .*; got 'dense'\."),
    ({"activation": "relu"}, VALUE, r"activation must be one of tanh, .*; got 'relu'\."),
    (
        {"activation": ("sin", "silu", "silu")},
        VALUE,
        r"one for each of the 2 kinds of layer, input and block; got 3 names\.",
    ),
    ({"activation": "tanh", "frequency": 1.0}, VALUE, r"must be None with the activation 'tanh'"),
    (
        {"time_features": 1, "layer": "ignore"},
        VALUE,
        r'time_features must be 0 with layer="ignore"',
    ),
]


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("settings", "error", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        ResidualField(**{"features": 2, **settings})
