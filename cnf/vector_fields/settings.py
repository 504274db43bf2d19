"""The settings that the networks of vector fields share, checked."""

import math
from collections.abc import Sequence

from cnf._checks import check_choice, check_count, check_number, is_positive
from cnf.vector_fields.activations import ACTIVATIONS


def check_activations(
    activation: str | Sequence[str] | None, number: int, what: str = "hidden layers"
) -> tuple[str, ...]:
    """One activation for each of a `number` of layers; None for sin, then silu.

    Raises:
        TypeError: If `activation` is neither a name nor names.
        ValueError: If a name is unknown, or their number wrong.
    """
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
    """The initial scale of a sinusoidal first layer; None if the first layer is another.

    Raises:
        ValueError: If `frequency` is given for another `activation`, or not positive and finite.
    """
    if activation != "sin":
        if frequency is not None:
            raise ValueError(
                "frequency is the scale of a sinusoidal first layer; leave it out with the "
                f"activation {activation!r}; got {frequency}."
            )
        return None
    if frequency is None:
        return 4.0 / math.sqrt(max(1, features - 1))
    return check_number("frequency", frequency, "positive and finite", is_positive)


def check_time_features(time_features: int, layer: str) -> int:
    """Refuse time features of a layer that ignores time.

    Raises:
        TypeError: If `time_features` is not an int.
        ValueError: If it is less than 0, or not 0 with the layer "ignore".
    """
    count = check_count("time_features", time_features, least=0)
    if count and layer == "ignore":
        raise ValueError(
            'time_features must be 0 with layer="ignore", which does not depend on time; '
            f"got {count}. Choose another layer."
        )
    return count
