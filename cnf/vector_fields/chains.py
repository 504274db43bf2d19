r"""What is made of the Jacobian of a perceptron: its trace, or its products with probes.

The Jacobian of each row is :math:`J = W_{n+1} D_n W_n \cdots D_1 W_1`, where the rows share the
weights and :math:`D_i` is the diagonal matrix of the slopes of the i-th activation. A chain is a
function of the slopes, linear in each; `cnf.vector_fields.fused` derives what it does, forward and
backward.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Sums:
    """Running sums over blocks of rows, one for each of some matrices."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, index: int, left: Tensor, right: Tensor) -> None:
        """Add ``left.T @ right`` to one of them."""
        if index in self._sums:
            self._sums[index].addmm_(left.T, right)
        else:
            self._sums[index] = left.T @ right

    @property
    def in_order(self) -> list[Tensor]:
        """The sums, by their index."""
        return [self._sums[index] for index in sorted(self._sums)]


class Chain(ABC):
    """A function of the slopes at each row, linear in those of each layer."""

    matrices: Sequence[Tensor]
    """Products of weights, made once for all rows; their gradients are sums over the rows."""
    row_axis: int
    """Which axis of the result runs over the rows, if x has one batch axis."""
    entries: int
    """How many numbers are made for each row."""

    @abstractmethod
    def carry(
        self, slopes: Sequence[Tensor], probes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result, and what `pull` needs again. Differentiable; for any batch shape."""

    def result(self, slopes: Sequence[Tensor], probes: Tensor | None) -> Tensor:
        """The result alone, where nothing is to be differentiated."""
        return self.carry(slopes, probes)[0]

    @abstractmethod
    def pull(
        self,
        cotangent: Tensor,
        slopes: Sequence[Tensor],
        probes: Tensor | None,
        kept: Sequence[Tensor],
        sums: Sums,
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """The cotangents of the slopes, and of the probes as the first layer has taken them.

        Those of `matrices` are added to `sums`. For one batch axis.
        """

    @abstractmethod
    def to_weights(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """The cotangents of the weights, given those of `matrices`."""


def trace_chain(weights: Sequence[Tensor]) -> Chain:
    """The chain whose result is the trace of J, ``(*batch,)``."""
    shallow: dict[int, type[OneLayer | TwoLayers]] = {2: OneLayer, 3: TwoLayers}
    return shallow.get(len(weights), ManyLayers)(weights)


class OneLayer(Chain):
    """The trace with one hidden layer."""

    row_axis = 0

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.first, last = weights
        self.last = last.T
        self.matrices = ((self.first * self.last).sum(-1, keepdim=True),)
        self.entries = 0

    def carry(
        self, slopes: Sequence[Tensor], probes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The trace."""
        del probes
        return (slopes[0] @ self.matrices[0]).squeeze(-1), ()

    def pull(
        self,
        cotangent: Tensor,
        slopes: Sequence[Tensor],
        probes: Tensor | None,
        kept: Sequence[Tensor],
        sums: Sums,
    ) -> tuple[Sequence[Tensor], None]:
        """The cotangent of the slopes."""
        del probes, kept
        column = cotangent.unsqueeze(-1)
        sums.add(0, slopes[0], column)
        return [column * self.matrices[0].T], None

    def to_weights(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """The cotangents of the weights."""
        return [sums[0] * self.last, (sums[0] * self.first).T]


class TwoLayers(Chain):
    """The trace with two hidden layers."""

    row_axis = 0

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.first, second, self.last = weights
        self.second = second.T
        self.around = self.first @ self.last
        self.matrices = (self.second * self.around,)
        self.entries = 2 * len(second)

    def carry(
        self, slopes: Sequence[Tensor], probes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The trace."""
        del probes
        coupled = slopes[0] @ self.matrices[0]
        return (slopes[1] * coupled).sum(-1), (coupled,)

    def pull(
        self,
        cotangent: Tensor,
        slopes: Sequence[Tensor],
        probes: Tensor | None,
        kept: Sequence[Tensor],
        sums: Sums,
    ) -> tuple[Sequence[Tensor], None]:
        """The cotangents of the slopes."""
        del probes
        column = cotangent.unsqueeze(-1)
        coupled = column * slopes[1]
        sums.add(0, slopes[0], coupled)
        return [coupled @ self.matrices[0].T, column * kept[0]], None

    def to_weights(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """The cotangents of the weights."""
        around = sums[0] * self.second
        return [around @ self.last.T, (sums[0] * self.around).T, self.first.T @ around]


class ManyLayers(Chain):
    """The trace with three hidden layers or more."""

    row_axis = 0

    def __init__(self, weights: Sequence[Tensor]) -> None:
        first, second, *self.between, before, last = weights
        self.entry, self.exit = (first, second.T), (last.T, before)
        self.features = first.shape[-1]
        self.matrices = (row_products(*self.entry), row_products(*self.exit), *self.between)
        widths = [len(second), before.shape[-1], *map(len, self.between)]
        self.entries = 2 * self.features * sum(widths)

    def carry(
        self, slopes: Sequence[Tensor], probes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The trace."""
        del probes
        tangents = [self._for_each_feature(slopes[0] @ self.matrices[0])]
        for slope, weight in zip(slopes[1:-2], self.between, strict=True):
            tangents.append((slope.unsqueeze(-2) * tangents[-1]) @ weight.T)
        cotangents = self._for_each_feature(slopes[-1] @ self.matrices[1])
        met = _inner_products(tangents[-1], cotangents)
        return (slopes[-2] * met).sum(-1), (*tangents, cotangents, met)

    def result(self, slopes: Sequence[Tensor], probes: Tensor | None) -> Tensor:
        """The trace, in a few arrays that serve one feature after another."""
        del probes

        def carried(entry: Tensor, leave: Tensor) -> tuple[Tensor, Tensor]:
            tangent = slopes[0] @ entry
            for slope, weight in zip(slopes[1:-2], self.between, strict=True):
                tangent = tangent.mul_(slope) @ weight.T
            return tangent, slopes[-1] @ leave

        entries, leaves = map(self._of_each_feature, self.matrices[:2])
        first, *others = zip(entries, leaves, strict=True)
        tangent, cotangent = carried(*first)
        met = tangent.mul_(cotangent)
        for pair in others:
            met.addcmul_(*carried(*pair))
        return met.mul_(slopes[-2]).sum(-1)

    def pull(
        self,
        cotangent: Tensor,
        slopes: Sequence[Tensor],
        probes: Tensor | None,
        kept: Sequence[Tensor],
        sums: Sums,
    ) -> tuple[Sequence[Tensor], None]:
        """The cotangents of the slopes."""
        del probes
        *tangents, cotangents, met = kept
        column = cotangent.unsqueeze(-1)
        scale = (column * slopes[-2]).unsqueeze(-2)
        back = (scale * tangents[-1]).flatten(-2)
        sums.add(1, slopes[-1], back)
        found = [back @ self.matrices[1].T, column * met]
        ahead = scale * cotangents
        for i in reversed(range(len(self.between))):
            slope = slopes[1 + i].unsqueeze(-2)
            sums.add(2 + i, ahead.flatten(0, 1), (slope * tangents[i]).flatten(0, 1))
            ahead = ahead @ self.between[i]
            found.append(_inner_products(ahead, tangents[i]))
            ahead.mul_(slope)
        ahead = ahead.flatten(-2)
        sums.add(0, slopes[0], ahead)
        found.append(ahead @ self.matrices[0].T)
        return found[::-1], None

    def to_weights(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """The cotangents of the weights."""
        first, second = pulled_row_products(sums[0], *self.entry)
        last, before = pulled_row_products(sums[1], *self.exit)
        return [first, second.T, *sums[2:], before, last.T]

    def _for_each_feature(self, joined: Tensor) -> Tensor:
        apart: Tensor = joined.unflatten(-1, (self.features, -1))
        return apart

    def _of_each_feature(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return self._for_each_feature(matrix).unbind(-2)


class Products(Chain):
    """Products of J with probes, ``(probes, *batch, features)``."""

    row_axis = 1

    def __init__(self, weights: Sequence[Tensor], count: int) -> None:
        self.matrices = weights
        self.entries = 2 * count * sum(map(len, weights))

    def carry(
        self, slopes: Sequence[Tensor], probes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The products."""
        assert probes is not None  # noqa: S101 - for mypy
        kept: list[Tensor] = []
        for slope, weight in zip(slopes, self.matrices, strict=False):
            tangent = (kept[-1] if kept else probes) @ weight.T
            kept += [tangent, slope * tangent]
        return kept[-1] @ self.matrices[-1].T, tuple(kept)

    def pull(
        self,
        cotangent: Tensor,
        slopes: Sequence[Tensor],
        probes: Tensor | None,
        kept: Sequence[Tensor],
        sums: Sums,
    ) -> tuple[Sequence[Tensor], Tensor]:
        """The cotangents of the slopes, and of the probes behind the first weight."""
        assert probes is not None  # noqa: S101 - for mypy
        found = []
        for i in reversed(range(1, len(self.matrices))):
            sums.add(i, cotangent.flatten(0, 1), kept[2 * i - 1].flatten(0, 1))
            cotangent = cotangent @ self.matrices[i]
            found.append((cotangent * kept[2 * i - 2]).sum(0))
            cotangent.mul_(slopes[i - 1])
        sums.add(0, cotangent.flatten(0, 1), probes.flatten(0, 1))
        return found[::-1], cotangent

    def to_weights(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """The cotangents of the weights, which are the matrices."""
        return sums


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """The outer products of the rows of two matrices, flattened: their row-wise Kronecker product.

    From ``(rows, m)`` and ``(rows, n)`` to ``(rows, m * n)``.
    """
    return (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)


def pulled_row_products(cotangent: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The cotangents of the two matrices of `row_products`, given that of the result."""
    outer = cotangent.unflatten(-1, (left.shape[-1], right.shape[-1]))
    return (outer * right.unsqueeze(-2)).sum(-1), (left.unsqueeze(-1) * outer).sum(-2)


def _inner_products(left: Tensor, right: Tensor) -> Tensor:
    """The sum of entrywise products over the last axis but one, without all of them at once."""
    first, *pairs = zip(left.unbind(-2), right.unbind(-2), strict=True)
    total = first[0] * first[1]
    for one, other in pairs:
        total = torch.addcmul(total, one, other)
    return total
