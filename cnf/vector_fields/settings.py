"""Checks of the settings that vector fields share."""

import math
from collections.abc import Sequence

from cnf._checks import check_choice, check_count, check_number, is_positive
from cnf.vector_fields.activations import ACTIVATIONS


def check_activations(
    activation: str | Sequence[str] | None, number: int, what: str = "hidden layers"
) -> tuple[str, ...]:
    """Return one activation for each of `number` layers; None for sin, then silu."""
    if activation is None:
        return ("sin", *("silu",) * (number - 1))
    if not isinstance(activation, str | Sequence):
        raise TypeError(f"activation must be a name, or names; got {activation!r}.")
    names = (activation,) * number if isinstance(activation, str) else tuple(activation)
    if len(names) != number:
        raise ValueError(
            f"activation must be one name, or one for each of the {number} {what}; "
            f"got {len(names)} names."
        )
    return tuple(check_choice("activation", name, ACTIVATIONS) for name in names)


def check_frequency(frequency: float | None, features: int, activation: str) -> float | None:
    """Return the initial scale of a sinusoidal first layer; None for another first layer."""
    if activation != "sin":
        if frequency is not None:
            raise ValueError(
                f"frequency must be None with the activation {activation!r}, because it is the "
                f"scale of a sinusoidal first layer; got {frequency}."
            )
        return None
    if frequency is None:
        return 2.0 / math.sqrt(max(1, features - 1))
    return check_number("frequency", frequency, "positive and finite", is_positive)


def check_time_features(time_features: int, layer: str) -> int:
    """Return the number of time features; refuse all but 0 for the layer "ignore"."""
    count = check_count("time_features", time_features, least=0)
    if count and layer == "ignore":
        raise ValueError(
            'time_features must be 0 with layer="ignore", which does not depend on time; '
            f"got {count}. Choose another layer."
        )
    return count
