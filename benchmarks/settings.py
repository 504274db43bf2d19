"""Checks of the settings of benchmarks and experiments."""


def check_counts(settings: object, *names: str, least: int = 1) -> None:
    """Refuse settings that are not counts, or tuples of counts, of at least `least`.

    Raises:
        TypeError: If one is not an int.
        ValueError: If one is too small.
    """
    for name in names:
        value = getattr(settings, name)
        label, counts = (f"each of {name}", value) if isinstance(value, tuple) else (name, [value])
        for count in counts:
            if not isinstance(count, int):
                raise TypeError(f"{label} must be an int; got {count!r}.")
            if count < least:
                raise ValueError(f"{label} must be at least {least}; got {count}.")
