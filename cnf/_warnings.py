"""Warnings that point at the user's line."""

import sys
import warnings

_PASSED = frozenset(
    ("beartype", "cnf", "contextlib", "functools", "jaxtyping", "sklearn", "torch", "torchdiffeq")
)
"""Packages whose frames are skipped."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost stack frame outside of the skipped packages.

    A fixed `stacklevel` would not do, because the depth of the stack varies.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__")).partition(".")[0]
