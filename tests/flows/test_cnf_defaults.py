"""Laws of the default field of `CNF`."""

import pytest

from cnf import CNF


def field_of(features, **settings):
    return CNF(features, **settings).transforms[-1].vector_field


@pytest.mark.parametrize(
    ("features", "settings", "widths", "first"),
    [
        (1, {}, (64, 64, 64, 64), "sin"),
        (3, {}, (64, 64, 64, 64), "sin"),
        (4, {}, (128, 128), "silu"),
        (2, {"augment": 2}, (128, 128), "silu"),
        (2, {"context_features": 5}, (64, 64, 64, 64), "sin"),
        (2, {"hidden_features": (8,)}, (8,), "sin"),
        (4, {"hidden_features": (8, 8, 8)}, (8, 8, 8), "silu"),
        (4, {"frequency": 2.0}, (128, 128), "sin"),
        (2, {"activation": "tanh"}, (64, 64, 64, 64), "tanh"),
    ],
)
def test_few_features_have_a_deep_field_that_begins_with_a_sine(features, settings, widths, first):
    field = field_of(features, **settings)
    assert field.hidden_features == widths
    assert field.activation[0] == first
    assert set(field.activation[1:]) <= {"silu", first}
