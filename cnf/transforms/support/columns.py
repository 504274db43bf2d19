"""The columns of a table, each with its own way to the real line and back."""

import math
from abc import ABC, abstractmethod
from numbers import Real

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf.transforms.support.constraints import Integers, OpenInterval
from cnf.transforms.support.dequantize import (
    log_slope_of_sigmoid,
    logit,
    with_noise,
    within_reach_of_logit,
)

Support = str | list[str | int | float] | tuple[str | int | float, ...]
"""What the numbers of a column may be: "real", "positive", ("interval", low, high),
("periodic", low, high) or "integer"."""


class ColumnMap(ABC):
    """How one column is spread over the real line and brought back."""

    constraint: constraints.Constraint
    """Which numbers the column may hold."""
    is_ordered: bool = True
    """Whether the bounds, if any, leave room between them."""

    @abstractmethod
    def to_reals(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """The real number z and the log of dx/dz."""

    @abstractmethod
    def from_reals(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The number x and the log of dx/dz."""


class _Real(ColumnMap):
    constraint = constraints.real

    def to_reals(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)

    def from_reals(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, torch.zeros_like(z)


class _Positive(ColumnMap):
    constraint = constraints.positive

    def to_reals(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        z = x.log()
        return z, z

    def from_reals(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # Farther out, x would be 0 or infinite.
        farthest = -math.log(torch.finfo(z.dtype).tiny)
        z = z.clamp(-farthest, farthest)
        return z.exp(), z


class _Integer(ColumnMap):
    constraint = Integers()

    def to_reals(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        return with_noise(x, generator), torch.zeros_like(x)

    def from_reals(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z.floor(), torch.zeros_like(z)


class _Interval(ColumnMap):
    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.constraint = OpenInterval(low, high)
        self.is_ordered = -math.inf < low < high < math.inf

    def to_reals(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        z = logit((x - self.low) / (self.high - self.low))
        return z, self._log_slope(z)

    def from_reals(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = within_reach_of_logit(z)
        low, high = torch.tensor([self.low, self.high], dtype=z.dtype, device=z.device)
        x = low + (high - low) * z.sigmoid()
        x = x.clamp(torch.nextafter(low, high), torch.nextafter(high, low))
        return x, self._log_slope(z)

    def _log_slope(self, z: Tensor) -> Tensor:
        return log_slope_of_sigmoid(z) + math.log(self.high - self.low)


class _Periodic(ColumnMap):
    def __init__(self, low: float, high: float, cut: float) -> None:
        self.low, self.high, self.cut = low, high, cut
        self.constraint = constraints.interval(low, high)
        self.is_ordered = -math.inf < low < high < math.inf and low <= cut <= high
        self._opened = _Interval(0.0, high - low)

    def to_reals(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        return self._opened.to_reals((x - self.cut).remainder(self._opened.high), generator)

    def from_reals(self, z: Tensor) -> tuple[Tensor, Tensor]:
        turned, log_slope = self._opened.from_reals(z)
        x = self.low + (turned + (self.cut - self.low)).remainder(self._opened.high)
        return x.clamp(self.low, self.high), log_slope


def column_map(index: int, column: Support) -> ColumnMap:
    """The map that an entry of `columns` asks for.

    Raises:
        ValueError: If it asks for none.
    """
    found: ColumnMap | None = None
    entries = column if isinstance(column, list | tuple) else [column]
    if not all(isinstance(entry, str | Real) for entry in entries):
        entries = []
    match [float(entry) if isinstance(entry, Real) else entry for entry in entries]:
        case ["real"]:
            found = _Real()
        case ["positive"]:
            found = _Positive()
        case ["integer"]:
            found = _Integer()
        case ["interval", float(low), float(high)]:
            found = _Interval(low, high)
        case ["periodic", float(low), float(high)]:
            found = _Periodic(low, high, low)
        case ["periodic", float(low), float(high), float(cut)]:
            found = _Periodic(low, high, cut)
    if found is None or not found.is_ordered:
        raise ValueError(
            "each column must be 'real', 'positive', 'integer', ('interval', low, high) or "
            f"('periodic', low, high), where low < high; got {column!r} for column {index}."
        )
    return found
