"""Degenerate columns, with an unbounded density: constant, repeated or linearly dependent."""

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
"""Variance of a combination of standardised columns that counts as zero, beside rounding."""
_ROUNDINGS = 8
"""Divisor of the squared rounding step: 12 for the variance of one rounding, less for sums."""
_LOADING = 0.1


class DegenerateDataWarning(UserWarning):
    """The likelihood of the rows is unbounded, or dominated by outliers."""


def check_columns(name: str, x: Float[Tensor, "rows columns"], names: Sequence[str]) -> None:
    """Refuse constant columns, and warn of values that many rows share and of linear dependence.

    Args:
        name: Name of the rows in the message.
        x: Rows of real numbers, with equal weights.
        names: Name of each column.

    Raises:
        ValueError: If a column is constant, or its variation is lost to rounding in its dtype.

    Warns:
        DegenerateDataWarning: If more than 5 % of the rows share a value of a column, or columns
            are linear functions of each other.
    """
    rows = x.detach().to("cpu", torch.float64)
    _, std = column_moments(name, x)
    constant = (std == 0).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"{name} must vary in every column, because a constant has no density; it is constant "
            f"in {listed([names[i] for i in constant])}. Leave these columns out."
        )
    remarks = [*_repeated_values(rows, names), *_linear_dependence(rows, x.dtype, names)]
    if remarks:
        warn(
            f"{name} has no bounded density: {'; '.join(remarks)}. The likelihood then grows "
            "without bound and says little about the fit.",
            DegenerateDataWarning,
        )


def _repeated_values(rows: Tensor, names: Sequence[str]) -> list[str]:
    fewest = max(_FEWEST, int(_SHARE * len(rows)) + 1)
    if len(rows) < fewest:
        return []
    ordered = rows.T.contiguous().sort().values  # many times faster than along the first axis
    repeated = (ordered[:, fewest - 1 :] == ordered[:, : len(rows) - fewest + 1]).any(1)
    shared = []
    for i in repeated.nonzero().flatten().tolist():
        values, counts = ordered[i].unique_consecutive(return_counts=True)
        most = counts.argmax()
        percent = 100 * counts[most] / len(rows)
        shared.append(f"{names[i]} ({values[most] + 0.0:g} in {percent:.0f} %)")
    if not shared:
        return []
    return [
        f"more than 5 % of the rows share a value of {listed(shared)}; declare integers "
        "(transforms_for in Python, --support NAME=integer of the command cnf), model the "
        "rows with the value apart, or add noise as wide as the rounding"
    ]


def _linear_dependence(rows: Tensor, dtype: torch.dtype, names: Sequence[str]) -> list[str]:
    rows = rows / rows.abs().amax(0)  # squares are then neither 0 nor inf
    size = rows.std(0)
    middle = rows.T.contiguous().median(1).values  # outliers may move a mean off nearly all rows
    standard = (rows - middle) / size
    step = torch.finfo(dtype).eps * rows.abs() / size
    if len(rows) <= rows.shape[1] or rows.shape[1] < 2:
        return []
    flat = _flat_directions(standard, step, torch.eye(rows.shape[1], dtype=rows.dtype))
    if flat.shape[1]:  # again without outliers, which make any columns look dependent
        far = standard.square().sum(1)
        near = far <= far.median()
        flat = _flat_directions(standard[near], step[near], flat)
    loading = flat.abs() / flat.abs().amax(0)
    involved = (loading > _LOADING).any(1).nonzero().flatten().tolist()
    if not involved:
        return []
    return [
        f"a linear function of the columns {listed([names[i] for i in involved])} is constant; "
        "leave out columns that depend on the others"
    ]


def _flat_directions(standard: Tensor, step: Tensor, basis: Tensor) -> Tensor:
    """Return the directions in a subspace along which standardised rows vary only by rounding.

    `step` is the rounding step of each number; `basis` has a direction in each column.
    """
    along = (standard - standard.mean(0)) @ basis
    variances, eigenvectors = torch.linalg.eigh(along.T @ along / len(along))
    directions = basis @ eigenvectors
    expected = directions.square().T @ standard.var(0, correction=0)
    rounding = directions.square().T @ step.amax(0).square() / _ROUNDINGS
    flat: Tensor = directions[:, variances <= _DEPENDENT * expected + rounding]
    return flat
