"""Moments of columns, in double precision for every dtype."""

import torch
from torch import Tensor

from cnf._checks import check_events, check_vectors, is_rounded_away, refuse_rows

_LEAST_SHRINKAGE = 1e-6


def check_rows_and_weight(name: str, x: Tensor, weight: Tensor | None) -> None:
    """Refuse all but finite floating rows ``(rows, features)``, and weights that are at least 0."""
    if isinstance(x, Tensor) and x.ndim != 2:
        raise ValueError(
            f"{name} must have shape (rows, features) with at least 2 rows; got {tuple(x.shape)}."
        )
    size = x.shape[-1] if isinstance(x, Tensor) else 0
    check_vectors(name, x, size, like=x if _is_floating(x) else torch.empty(0))
    if weight is not None:
        check_events("weight", weight, (), like=weight if _is_floating(weight) else x)
        if weight.shape != x.shape[:1]:
            raise ValueError(f"weight must have shape ({len(x)},); got {tuple(weight.shape)}.")
        refuse_rows("weight", weight < 0, "at least 0")


def _is_floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def column_moments(name: str, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the columns of ``(rows, features)``, in float64.

    A constant column has the standard deviation 0.

    Args:
        name: Name of the rows, for messages.
        x: At least two rows, finite.
        weight: Weight of each row, ``(rows,)``, of any scale; None for equal weights.

    Raises:
        ValueError: If there are fewer than two rows of positive weight, or the standard deviation
            of a column overflows, or is lost to rounding in, the dtype of `x`.
    """
    rows = x.detach().to("cpu", torch.float64)
    share = rows.new_ones(len(rows))
    if weight is not None:
        share = weight.detach().to("cpu", torch.float64)
        rows, share = rows[share > 0], share[share > 0]
        share = share / share.max()
    if len(rows) < 2:
        raise ValueError(
            f"{name} must have shape (rows, features) with at least 2 rows; got {tuple(x.shape)}."
            if weight is None
            else f"{name} must have at least 2 rows of positive weight; got {len(rows)}."
        )
    share = (share / share.sum()).unsqueeze(-1)
    low, high = rows.amin(0), rows.amax(0)
    constant = low == high
    mean = (share * rows).sum(0).where(~constant, low)
    distance = rows - mean
    unit = distance.abs().amax(0).where(~constant, 1.0)  # squares of tiny numbers would be 0
    others, greatest = share.flatten().sort().values.tensor_split([len(share) - 1])
    # 1 - (share ** 2).sum(), but accurate if one share is nearly 1
    freedom = greatest * others.sum() + (others * (1 - others)).sum()
    std = unit * ((share * (distance / unit).square()).sum(0) / freedom).sqrt()
    std = std.where(~constant, 0.0)
    _refuse_beyond(name, std, x.dtype)
    largest = torch.maximum(low.abs(), high.abs())
    lost = is_rounded_away(std, largest, x.dtype)
    if lost.any():
        first = int(lost.nonzero()[0])
        raise ValueError(
            f"{name} loses its digits in {x.dtype}: column {first} has numbers of up to "
            f"{float(largest[first]):.10g} with a standard deviation of {float(std[first]):.3g}. "
            "Subtract a constant from the column before it is rounded, or use float64 for the data "
            "and the flow (flow.double())."
        )
    return mean, std


def shrunk_correlation(scaled: Tensor, share: Tensor, *, least: float = _LEAST_SHRINKAGE) -> Tensor:
    """Return the correlations, shrunk towards zero by the rule of Ledoit and Wolf.

    Args:
        scaled: Rows ``(rows, features)`` with columns of mean 0 and variance 1.
        share: Share of each row in their weight, ``(rows,)``.
        least: Least shrinkage, from 0 to 1; two rows alone would have none.

    References:
        Ledoit and Wolf (2004), A well-conditioned estimator for large-dimensional covariance
        matrices, lemmas 3.2 to 3.4.
    """
    effective_rows = 1 / share.square().sum()
    correlation = (share.unsqueeze(-1) * scaled).T @ scaled
    identity = torch.eye(scaled.shape[-1], dtype=scaled.dtype)
    distance = (correlation - identity).square().sum()
    # The error of each entry, from the spread of its summands over the rows.
    squares = scaled.square()
    error = ((share.unsqueeze(-1) * squares).T @ squares - correlation.square()).sum()
    shrinkage = min(1.0, float(error / effective_rows / distance)) if distance > 0 else 1.0
    return torch.lerp(correlation, identity, max(shrinkage, min(1.0, least)))


def _refuse_beyond(name: str, std: Tensor, dtype: torch.dtype) -> None:
    """Refuse standard deviations that are infinite in the dtype, or have an infinite inverse."""
    large = ~(std < torch.finfo(dtype).max)
    small = (std > 0) & (std < torch.finfo(dtype).tiny)
    for size, beyond in (("large", large), ("small", small)):
        if beyond.any():
            columns = beyond.nonzero().flatten().tolist()
            raise ValueError(
                f"{name} must have a standard deviation that {dtype} can hold; it is too {size} in "
                f"{columns}. Rescale these features, or use float64."
            )
