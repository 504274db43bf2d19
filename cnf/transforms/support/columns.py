"""Maps of the columns of a table to the real line and back."""

import math
from abc import ABC, abstractmethod
from numbers import Real

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf.transforms.support.constraints import Integers, OpenInterval
from cnf.transforms.support.dequantize import (
    clamp_to_logits,
    log_slope_of_sigmoid,
    logit,
    with_noise,
)

Support = str | list[str | int | float] | tuple[str | int | float, ...]
"""Support of a column: "real", "positive", ("interval", low, high), ("circle", low, high),
("periodic", low, high) or "integer"."""


class ColumnMap(ABC):
    """Map of one column to the real line, or to angles, and back."""

    constraint: constraints.Constraint
    """Support of the column."""
    is_ordered: bool = True
    """Whether the bounds, if any, are finite and in order."""
    is_angle: bool = False
    """Whether z is an angle, from -π to π."""

    @abstractmethod
    def to_reals(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Return the number z and the log of dx/dz."""

    @abstractmethod
    def from_reals(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number x and the log of dx/dz."""


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
        farthest = -math.log(torch.finfo(z.dtype).tiny)  # beyond, x would be 0 or infinite
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
        z = clamp_to_logits(z)
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
        self._interval = _Interval(0.0, high - low)

    def to_reals(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        return self._interval.to_reals((x - self.cut).remainder(self._interval.high), generator)

    def from_reals(self, z: Tensor) -> tuple[Tensor, Tensor]:
        distance, log_slope = self._interval.from_reals(z)
        x = self.low + (distance + (self.cut - self.low)).remainder(self._interval.high)
        return x.clamp(self.low, self.high), log_slope


class _Circle(ColumnMap):
    is_angle = True

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.constraint = constraints.interval(low, high)
        self.is_ordered = -math.inf < low < high < math.inf
        self._log_slope = math.log(high - low) - math.log(2 * math.pi) if self.is_ordered else 0.0

    def to_reals(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        turns = (x - self.low) / (self.high - self.low)
        return math.pi * (2 * turns - 1), torch.full_like(x, self._log_slope)

    def from_reals(self, z: Tensor) -> tuple[Tensor, Tensor]:
        turns = (z / math.pi + 1) / 2
        x = self.low + (self.high - self.low) * turns
        return x.clamp(self.low, self.high), torch.full_like(z, self._log_slope)


def column_map(index: int, column: Support) -> ColumnMap:
    """Return the map for an entry of `columns`; raise a ValueError for an invalid one."""
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
        case ["circle", float(low), float(high)]:
            found = _Circle(low, high)
        case ["periodic", float(low), float(high)]:
            found = _Periodic(low, high, low)
        case ["periodic", float(low), float(high), float(cut)]:
            found = _Periodic(low, high, cut)
    if found is None or not found.is_ordered:
        raise ValueError(
            "each column must be 'real', 'positive', 'integer', ('interval', low, high), "
            "('circle', low, high) or ('periodic', low, high), where low < high; "
            f"got {column!r} for column {index}."
        )
    return found
