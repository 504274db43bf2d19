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
"""Variance of a combination of standardised columns that is as good as none, rounding apart."""
_LOADING = 0.1


class DegenerateDataWarning(UserWarning):
    """A likelihood of these rows means little: it has no bound, or follows values far outside."""


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
    rows = x.detach().to("cpu", torch.float64)
    _, std = column_moments(name, x)
    constant = (std == 0).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"{name} must vary in every column, for a constant has no density; it is constant in "
            f"{listed([names[i] for i in constant])}. Leave these columns out."
        )
    remarks = [*_of_repeated_values(rows, names), *_of_dependence(rows, x.dtype, names)]
    if remarks:
        warn(
            f"{name} has no bounded density: {'; '.join(remarks)}. The likelihood then grows "
            "without bound and says little about the fit.",
            DegenerateDataWarning,
        )


def _of_repeated_values(rows: Tensor, names: Sequence[str]) -> list[str]:
    fewest = max(_FEWEST, int(_SHARE * len(rows)) + 1)
    if len(rows) < fewest:
        return []
    ordered = rows.T.contiguous().sort().values  # many times faster than along the first axis
    repeated = (ordered[:, fewest - 1 :] == ordered[:, : len(rows) - fewest + 1]).any(1)
    shared = []
    for i in repeated.nonzero().flatten().tolist():
        values, counts = ordered[i].unique_consecutive(return_counts=True)
        most = counts.argmax()
        share = 100 * counts[most] / len(rows)
        shared.append(f"{names[i]} ({values[most] + 0.0:g} in {share:.0f} %)")
    if not shared:
        return []
    return [
        f"more than 5 % of the rows share a value of {listed(shared)}; call whole numbers "
        "integers (transforms_for in Python, --support NAME=integer of the command cnf), model the "
        "rows with the value apart, or add noise as wide as the rounding"
    ]


def _of_dependence(rows: Tensor, dtype: torch.dtype, names: Sequence[str]) -> list[str]:
    rows = rows / rows.abs().amax(0)  # their squares are then neither 0 nor inf
    flat = _dependent(rows, dtype)
    if flat.any():  # a few rows far outside, which make any columns alike, do not count
        far = _standard(rows).square().amax(1)
        flat &= _dependent(rows[far <= far.median()], dtype)
    involved = [name for name, is_flat in zip(names, flat.tolist(), strict=True) if is_flat]
    if not involved:
        return []
    return [
        f"a linear function of the columns {listed(involved)} is constant; leave out what follows "
        "from the others"
    ]


def _dependent(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Which columns take part in a linear function that is constant but for rounding."""
    standard = _standard(rows)
    step = torch.finfo(dtype).eps * rows.abs().amax(0) / rows.std(0)
    varies = standard.isfinite().all(0)
    standard, step = standard[:, varies], step[varies]
    dependent = torch.zeros(rows.shape[1], dtype=torch.bool)
    if standard.shape[1] < 2 or len(rows) <= standard.shape[1]:
        return dependent
    variances, directions = torch.linalg.eigh(standard.T @ standard / len(rows))
    rounding = (directions * step.unsqueeze(-1)).square().sum(0) / 4
    flat = directions[:, variances < _DEPENDENT + rounding]
    dependent[varies] = (flat.abs() > _LOADING).any(-1)
    return dependent


def _standard(rows: Tensor) -> Tensor:
    std, mean = torch.std_mean(rows, dim=0)
    return (rows - mean) / std
