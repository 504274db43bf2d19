"""Laws of the time features: waves of t beside t, as if they were part of the context."""

import math

import pytest
import torch
from test_vector_fields import BATCHES, assert_divergence_is_the_trace
from zoo import mlp, rows_for

from cnf import MLPField
from cnf.vector_fields.layers import LAYERS

TIMED = [layer for layer in LAYERS if layer != "ignore"]


def waves(t, count):
    columns = [torch.sin(math.pi * k * t) for k in range(1, count + 1)]
    columns += [torch.cos(math.pi * k * t) for k in range(1, count + 1)]
    return torch.stack(columns, -1)


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("times", [(), (3, 4)], ids=str)
@pytest.mark.parametrize("layer", TIMED)
def test_time_features_are_a_context_that_follows_time(layer, times, context_features):
    field = mlp(2, context_features, layer=layer, time_features=3)
    same = mlp(2, context_features + 6, layer=layer, time_features=0)
    weights = field.state_dict()  # the waves are no part of what is scaled
    same.load_state_dict({k: v for k, v in weights.items() if "context_scaling" not in k})
    x, context = rows_for(field, 3, 4)
    t = torch.rand(times)
    joined = waves(t, 3).expand(3, 4, 6)
    if context is not None:
        joined = torch.cat([joined, context], -1)
    torch.testing.assert_close(
        field.velocity_and_divergence(t, x, context),
        same.velocity_and_divergence(t, x, joined),
        rtol=1e-13,
        atol=1e-13,
    )


@pytest.mark.parametrize("contexts", ["none", "one for all", "one for each row"])
@pytest.mark.parametrize("times", ["one for all", "one for each row"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("hidden", [(8,), (8, 7)], ids=str)
@pytest.mark.parametrize("layer", TIMED)
def test_divergence_is_the_trace_with_time_features(layer, hidden, batch, times, contexts):
    size = 0 if contexts == "none" else 3
    field = mlp(2, size, layer=layer, hidden_features=hidden, time_features=2)
    x, context = rows_for(field, *batch)
    if contexts == "one for all":
        context = torch.randn(3)
    t = torch.rand(batch if times == "one for each row" else ())
    assert_divergence_is_the_trace(field, t, x, context)


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("layer", TIMED)
def test_one_time_for_all_rows_keeps_the_closed_form(layer, context_features, monkeypatch):
    field = mlp(2, context_features, layer=layer, time_features=2)
    x, context = rows_for(field, 4)
    monkeypatch.setattr(MLPField, "velocity_and_products", None)
    field.velocity_and_divergence(torch.rand(()), x, context)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"time_features": -1}, ValueError, r"time_features must be at least 0; got -1\."),
        ({"time_features": 1.0}, TypeError, r"time_features must be an int; got 1\.0\."),
        (
            {"time_features": 2, "layer": "ignore"},
            ValueError,
            r'must be 0 with layer="ignore", which does not depend on time; got 2\. Choose another',
        ),
    ],
)
def test_bad_time_features_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        MLPField(2, **settings)
