"""Mean and standard deviation of columns, in double precision whatever the dtype of the rows."""

import torch
from torch import Tensor

from cnf._checks import is_rounded_away


def column_moments(name: str, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the columns of rows ``(rows, features)``, in float64.

    A constant column has the standard deviation 0.

    Args:
        name: Name of the rows, for messages.
        x: At least two rows, finite.
        weight: Weight of each row, ``(rows,)``, of any scale; None for equal weights.

    Raises:
        ValueError: If there are fewer than two rows of positive weight, or the dtype of `x` cannot
            hold the spread of a column: too large, or rounded away beside its mean.
    """
    rows = x.detach().to("cpu", torch.float64)
    if weight is not None:
        share = weight.detach().to("cpu", torch.float64)
        rows, share = rows[share > 0], share[share > 0]
        share = share / share.max()
    else:
        share = rows.new_ones(len(rows))
    if len(rows) < 2:
        raise ValueError(
            f"{name} must have shape (rows, features) with at least 2 rows; got {tuple(x.shape)}."
            if weight is None
            else f"{name} must have at least 2 rows of positive weight; got {len(rows)}."
        )
    share = (share / share.sum()).unsqueeze(-1)
    mean = (share * rows).sum(0)
    variance = (share * (rows - mean).square()).sum(0) / (1 - share.square().sum())
    std = variance.sqrt()
    largest = torch.finfo(x.dtype).max
    if not (std < largest).all():
        huge = (~(std < largest)).nonzero().flatten().tolist()
        raise ValueError(
            f"{name} must have a standard deviation that {x.dtype} can hold; it is too large in "
            f"{huge}. Rescale these features, or use float64."
        )
    low, high = rows.amin(0), rows.amax(0)
    constant = low == high
    std = std.where(~constant, 0.0)
    _refuse_rounded(name, std, torch.maximum(low.abs(), high.abs()), x.dtype)
    return mean.where(~constant, low), std


def _refuse_rounded(name: str, std: Tensor, largest: Tensor, dtype: torch.dtype) -> None:
    lost = is_rounded_away(std, largest, dtype)
    if lost.any():
        first = int(lost.nonzero()[0])
        raise ValueError(
            f"{name} loses its digits in {dtype}: column {first} has numbers of up to "
            f"{float(largest[first]):.10g} with a standard deviation of {float(std[first]):.3g}. "
            "Subtract a constant from the column before it is rounded, or use float64 for the data "
            "and the flow (flow.double())."
        )
