"""The affine map that a time-conditioned layer is at one time and context."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class AffineMap(NamedTuple):
    """The map ``x -> gate * (weight x) + bias`` that a layer is at one time and context."""

    weight: Tensor
    """Shape ``(out, in)``, or ``(*batch, out, in)`` where rows differ in it."""
    gate: Tensor | None
    """Shape ``(*batch, out)``, where rows differ in it; None stands for ones."""
    bias: Tensor
    """Shape ``(out,)`` or ``(*batch, out)``."""

    @property
    def is_shared(self) -> bool:
        """Whether all rows have the same linear part."""
        return self.gate is None and self.weight.ndim == 2

    def value(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The map of `x`."""
        if self.is_shared and self.bias.ndim == 1:
            return nn.functional.linear(x, self.weight, self.bias)
        return self.tangent(x) + self.bias

    def tangent(self, dx: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The derivative of the map in direction `dx`."""
        if self.weight.ndim == 2:
            product = nn.functional.linear(dx, self.weight)
        else:
            product = (self.weight @ dx.unsqueeze(-1)).squeeze(-1)
        return product if self.gate is None else self.gate * product

    def cotangent(self, dy: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch in"]:
        """The transposed derivative of the map, of `dy`."""
        dy = dy if self.gate is None else self.gate * dy
        if self.weight.ndim == 2:
            return dy @ self.weight
        return (dy.unsqueeze(-2) @ self.weight).squeeze(-2)

    def linearised(
        self, x: Float[Tensor, "*batch in"]
    ) -> tuple[Float[Tensor, "*batch out"], Callable[[Tensor], Tensor]]:
        """The map of `x`, and its derivative."""
        return self.value(x), self.tangent
