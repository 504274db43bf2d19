"""Constraints that torch lacks, comparison of constraints, and selection of rows."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import constraints

from cnf.bases.ordered_normal import OrderedVector


class OpenInterval(constraints.Constraint):
    """Numbers between two bounds, the bounds excluded."""

    is_open = True

    def __init__(self, lower_bound: float, upper_bound: float) -> None:
        self.lower_bound = lower_bound
        self.upper_bound = upper_bound
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return the mask of the numbers between the bounds."""
        return (value > self.lower_bound) & (value < self.upper_bound)

    def __repr__(self) -> str:
        return f"OpenInterval({self.lower_bound}, {self.upper_bound})"


class Integers(constraints.Constraint):
    """Integers of either sign."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        """Return the mask of the integers."""
        return value == torch.round(value)

    def __repr__(self) -> str:
        return "Integers()"


def covers(larger: constraints.Constraint, smaller: constraints.Constraint) -> bool:
    """Return whether `larger` contains `smaller`, the ends of intervals aside.

    This compares bounds of numbers, or of each entry of a vector. Other constraints, such as a
    simplex, contain an equal constraint alone.
    """
    wide, narrow = _entries(larger), _entries(smaller)
    if len(wide) != len(narrow):
        wide, narrow = wide * len(narrow), narrow * len(wide)
    return all(itertools.starmap(_covers, zip(wide, narrow, strict=True)))


def is_symmetric(constraint: constraints.Constraint, *, together: int) -> bool:
    """Return whether a constraint stays when the features, `together` at a time, change places."""
    entries = list(map(repr, _entries(constraint)))
    if len(entries) > 1:
        return entries == entries[:together] * (len(entries) // together)
    factors = getattr(getattr(constraint, "manifold", None), "factors", None)
    return factors is None and not isinstance(constraint, OrderedVector)


def _entries(constraint: constraints.Constraint) -> list[constraints.Constraint]:
    """Return the constraint of each entry of a vector, or a single one for all."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    if isinstance(constraint, constraints.cat):
        pairs = zip(constraint.cseq, constraint.lengths, strict=True)
        return [kind for part, length in pairs for kind in _entries(part) * length]
    return [constraint]


def _covers(larger: constraints.Constraint, smaller: constraints.Constraint) -> bool:
    wide, narrow = _bounds(larger), _bounds(smaller)
    if wide is None or narrow is None or isinstance(larger, OrderedVector):
        return type(larger) is type(smaller) and repr(larger) == repr(smaller)
    if larger.is_discrete and not smaller.is_discrete:
        return False
    return bool((wide[0] <= narrow[0]).all() and (narrow[1] <= wide[1]).all())


def _bounds(constraint: constraints.Constraint) -> tuple[Tensor, Tensor] | None:
    """Return the least and the largest number; None for constraints of another kind."""
    if isinstance(constraint, OrderedVector):
        return torch.tensor(-math.inf), torch.tensor(math.inf)
    bounded = hasattr(constraint, "lower_bound") or hasattr(constraint, "upper_bound")
    if not bounded and not isinstance(constraint, type(constraints.real) | Integers):
        return None
    low = getattr(constraint, "lower_bound", -math.inf)
    high = getattr(constraint, "upper_bound", math.inf)
    return torch.as_tensor(low).cpu(), torch.as_tensor(high).cpu()


def select(mask: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the rows of `x` where the mask ``(*batch,)`` is true, and their contexts."""
    if context is not None:
        context = context.expand(*mask.shape, context.shape[-1])[mask]
    return x[mask], context


def row_before(mask: Tensor) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """Return the map from the index of a row that `select` returned to its index before."""
    return lambda row: (*row[:-1], *mask.nonzero()[row[-1]].tolist())


def spread(mask: Tensor, values: Tensor, *, elsewhere: float) -> Tensor:
    """Return the values, in order, where the mask is true, and `elsewhere` where it is false."""
    return values.new_full(mask.shape, elsewhere).masked_scatter(mask, values)
