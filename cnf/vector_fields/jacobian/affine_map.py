"""Affine map of a time-conditioned layer at one time and context."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class AffineMap(NamedTuple):
    """Affine map ``x -> gate * (weight x + offset) + bias``."""

    weight: Tensor
    """Shape ``(out, in)``, or ``(*batch, out, in)`` where rows have their own."""
    gate: Tensor | None
    """Shape ``(*batch, out)``, where rows have their own; None stands for ones."""
    bias: Tensor
    """Shape ``(out,)`` or ``(*batch, out)``."""
    offset: Tensor | None = None
    """Shape ``(out,)``; None stands for zeros. With a gate for each row it is cheaper to add within
    the product than, times the gate, in the bias."""

    @property
    def is_shared(self) -> bool:
        """Whether all rows have the same linear part."""
        return self.gate is None and self.weight.ndim == 2

    def value(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the map of `x`."""
        if self.gate is None and self.weight.ndim == 2 and self.bias.ndim == 1:
            return nn.functional.linear(x, self.weight, self.bias)
        return self._scaled(self._product(x, self.offset)) + self.bias

    @property
    def at_zero(self) -> Float[Tensor, "*batch out"]:
        """Value of the map at zero."""
        return self.bias if self.offset is None else self.bias + self._scaled(self.offset)

    def tangent(self, dx: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the derivative of the map in direction `dx`."""
        return self._scaled(self._product(dx))

    def cotangent(self, dy: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch in"]:
        """Return the transposed derivative of the map, applied to `dy`."""
        dy = self._scaled(dy)
        if self.weight.ndim == 2:
            return dy @ self.weight
        return (dy.unsqueeze(-2) @ self.weight).squeeze(-2)

    def linearised(
        self, x: Float[Tensor, "*batch in"]
    ) -> tuple[Float[Tensor, "*batch out"], Callable[[Tensor], Tensor]]:
        """Return the map of `x`, and its derivative."""
        return self.value(x), self.tangent

    def rows(self, rows: slice) -> "AffineMap":
        """Return the map of some rows of a batch ``(rows, in)``; they share the weight."""
        gate = self.gate if self.gate is None else of_rows(self.gate, rows)
        return self._replace(gate=gate, bias=of_rows(self.bias, rows))

    def _product(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        if self.weight.ndim == 2:
            return nn.functional.linear(x, self.weight, offset)
        product = (self.weight @ x.unsqueeze(-1)).squeeze(-1)
        return product if offset is None else product + offset

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.gate is None else self.gate * y


def of_rows(values: Tensor, rows: slice) -> Tensor:
    """Return the values of some rows; all rows share values without a row for each."""
    return values if values.ndim == 1 or len(values) == 1 else values[rows]
