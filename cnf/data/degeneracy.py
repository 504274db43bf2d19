"""Columns whose density is unbounded: constant, repeated, or linear functions of other columns."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._moments import column_moments
from cnf._warnings import warn
from cnf.data.names import listed

_SHARE = 0.05
_FEWEST = 10
_DEPENDENT = 1e-10
"""Variance of a combination of standardised columns that rounding in float32 can leave of none."""
_LOADING = 0.1


class DegenerateDataWarning(UserWarning):
    """The best density of these rows is infinite somewhere, so that a likelihood means little."""


def check_columns(name: str, x: Float[Tensor, "rows columns"], names: Sequence[str]) -> None:
    """Refuse constant columns, and warn of values that many rows share and of linear dependence.

    Args:
        name: What to call the rows in the message.
        x: The rows, real numbers all of which count alike.
        names: Name of each column.

    Raises:
        ValueError: If a column is constant, or varies by less than its dtype can tell.

    Warns:
        DegenerateDataWarning: If more than 5 % of the rows share a value of a column, or columns
            are linear functions of each other.
    """
    column_moments(name, x)
    rows = x.detach().to("cpu", torch.float64)
    constant = (rows == rows[:1]).all(0).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"{name} must vary in every column, for a constant has no density; it is constant in "
            f"{listed([names[i] for i in constant])}. Leave these columns out."
        )
    remarks = [*_of_repeated_values(rows, names), *_of_dependence(rows, names)]
    if remarks:
        warn(
            f"{name} has no bounded density: {'; '.join(remarks)}. The likelihood then grows "
            "without bound and says little about the fit.",
            DegenerateDataWarning,
        )


def _of_repeated_values(rows: Tensor, names: Sequence[str]) -> list[str]:
    shared = []
    for name, column in zip(names, rows.unbind(-1), strict=True):
        values, counts = column.unique(return_counts=True)
        most = counts.argmax()
        if counts[most] >= _FEWEST and counts[most] > _SHARE * len(rows):
            shared.append(f"{name} ({values[most]:g} in {100 * counts[most] / len(rows):.0f} %)")
    if not shared:
        return []
    return [
        f"more than 5 % of the rows share a value of {listed(shared)}; call whole numbers "
        "integers (transforms_for in Python, --support NAME=integer of the command cnf), model the "
        "rows with the value apart, or add noise as wide as the rounding"
    ]


def _of_dependence(rows: Tensor, names: Sequence[str]) -> list[str]:
    if rows.shape[1] < 2 or len(rows) <= rows.shape[1]:
        return []
    std, mean = torch.std_mean(rows, dim=0)
    standard = (rows - mean) / std
    variances, directions = torch.linalg.eigh(standard.T @ standard / len(rows))
    flat = directions[:, variances < _DEPENDENT]
    involved = (flat.abs() > _LOADING).any(-1).nonzero().flatten().tolist()
    if not involved:
        return []
    return [
        f"a linear function of the columns {listed([names[i] for i in involved])} is constant; "
        "leave out what follows from the others"
    ]
