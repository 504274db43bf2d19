"""Splits into training, validation and test rows."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.floating[Any]]
"""``(rows, columns)``, or with more axes."""


class Splits(NamedTuple):
    """Training, validation and test rows."""

    train: Rows
    validation: Rows
    test: Rows

    def standardized(self) -> "Splits":
        """Return the rows, scaled so that train and validation jointly have mean 0 and std 1.

        Raises:
            ValueError: If a column is constant in train and validation.
        """
        known = np.concatenate([self.train, self.validation])
        mean, std = known.mean(0), known.std(0)
        if not (std > 0).all():
            constant = np.flatnonzero(~(std > 0)).tolist()
            raise ValueError(f"the rows must vary in every column; constant are {constant}.")
        return Splits(*((part - mean) / std for part in self))


def split_rows(
    x: Rows, *, validation: float = 0.1, test: float = 0.1, seed: int | None = 0
) -> Splits:
    """Split rows into three: first training, then validation, then test rows.

    Args:
        x: The rows.
        validation: Fraction of the rows before the test rows; rounded down, but at least one row.
        test: Fraction of all rows; rounded down, but at least one row.
        seed: Seed of the shuffling before the split; None for no shuffling.

    Raises:
        ValueError: If a fraction is not in (0, 1), or there are too few rows for three parts.

    Example:
        >>> splits = split_rows(np.arange(100.0)[:, None], seed=None)
        >>> [len(part) for part in splits], splits.test[0].item()
        ([81, 9, 10], 90.0)
    """
    for name, fraction in (("validation", validation), ("test", test)):
        if not 0 < fraction < 1:
            raise ValueError(f"{name} must be more than 0 and less than 1; got {fraction}.")
    if seed is not None:
        x = x[np.random.default_rng(seed).permutation(len(x))]
    known = len(x) - max(1, int(test * len(x)))
    trained_on = known - max(1, int(validation * known))
    if trained_on < 1:
        raise ValueError(f"x must have rows for three parts; got {len(x)}.")
    return Splits(x[:trained_on], x[trained_on:known], x[known:])
