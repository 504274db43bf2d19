"""The settings that the networks of vector fields share, checked."""

import math
from collections.abc import Mapping, Sequence

from cnf._checks import check_choice, check_count, check_number, is_positive
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.layers import LAYERS


def check_widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    """Refuse what is not one width for each of at least one hidden layer.

    Raises:
        TypeError: If `widths` is no sequence, or one of them no int.
        ValueError: If there are none, or one of them is less than 1.
    """
    if not isinstance(widths, Sequence):
        raise TypeError(f"{name} must be widths such as (128, 128); got {widths!r}.")
    if not widths:
        raise ValueError(f"{name} must name at least one hidden layer; got ().")
    return tuple(check_count(f"each of {name}", width) for width in widths)


def check_layer(layer: str) -> str:
    """Refuse a layer without a class.

    Raises:
        ValueError: If the name is unknown.
    """
    return check_name("layer", layer, LAYERS)


def check_activation(activation: str) -> str:
    """Refuse an unknown activation.

    Raises:
        ValueError: If the name is unknown.
    """
    return check_name("activation", activation, ACTIVATIONS)


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
    return tuple(check_activation(name) for name in names)


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


def check_name(argument: str, name: str, known: Mapping[str, object]) -> str:
    """Refuse a name that is not known."""
    return check_choice(argument, name, known)
