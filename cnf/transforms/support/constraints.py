"""What numbers may be, where torch has no constraint for it, and rows picked by it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import constraints


class OpenInterval(constraints.Constraint):
    """Numbers between two bounds, the bounds excluded.

    Args:
        lower_bound: What they are greater than.
        upper_bound: What they are less than.
    """

    is_open = True

    def __init__(self, lower_bound: float, upper_bound: float) -> None:
        self.lower_bound = lower_bound
        self.upper_bound = upper_bound
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Which numbers are between the bounds."""
        return (value > self.lower_bound) & (value < self.upper_bound)


class Integers(constraints.Constraint):
    """Whole numbers, of either sign."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        """Which numbers are whole."""
        return value == torch.round(value)


def select(mask: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows of `x` for which the mask ``(*batch,)`` is true, and their contexts."""
    if context is not None:
        context = context.expand(*mask.shape, context.shape[-1])[mask]
    return x[mask], context


def row_before(mask: Tensor) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """Where a row that `select` has picked, as the last axis counts them, was before."""

    def before(row: tuple[int, ...]) -> tuple[int, ...]:
        return (*row[:-1], *mask.nonzero()[row[-1]].tolist())

    return before


def spread(mask: Tensor, values: Tensor, *, elsewhere: float) -> Tensor:
    """The values, one after another, where the mask is true, and `elsewhere` where it is not."""
    return values.new_full(mask.shape, elsewhere).masked_scatter(mask, values)
