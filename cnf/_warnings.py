"""Warnings that point at the user's line, however deep in the package their cause is seen."""

import sys
import warnings

_PASSED = frozenset(
    ("beartype", "cnf", "contextlib", "functools", "jaxtyping", "sklearn", "torch", "torchdiffeq")
)
"""Packages whose lines stand between the user's and the cause, as decorators of torch do."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of a line: the innermost one of the stack of calls that is in none of these packages.

    `warnings.warn` counts calls, which differ by the way to the cause.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__")).partition(".")[0]
