"""Vector fields that are sequences of stages, with forward-mode derivatives."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from cnf._shapes import Context, Rows, Times
from cnf.vector_fields.activations import Activation
from cnf.vector_fields.base import VectorField

Tangent: TypeAlias = Callable[[Tensor], Tensor]
"""Derivative as a linear map of directions with a leading axis of probes."""


@runtime_checkable
class Stage(Protocol):
    """Differentiable map of x at one time and context."""

    def value(self, x: Tensor) -> Tensor:
        """Return the map of `x`."""

    def linearised(self, x: Tensor) -> tuple[Tensor, Tangent]:
        """Return the map of `x`, and its derivative there."""


class Activated(NamedTuple):
    """Stage followed by an activation."""

    stage: Stage
    activation: Activation

    def value(self, x: Tensor) -> Tensor:
        """Return the map of `x`."""
        return self.activation.value(self.stage.value(x))

    def linearised(self, x: Tensor) -> tuple[Tensor, Tangent]:
        """Return the map of `x`, and its derivative there."""
        inner, tangent = self.stage.linearised(x)
        value, slope = self.activation.value_and_slope(inner)
        return value, lambda dx: slope * tangent(dx)


class WithSkip(NamedTuple):
    """Sequence of stages, to whose value a multiple of x is added."""

    stages: Sequence[Stage]
    skip: Tensor

    def value(self, x: Tensor) -> Tensor:
        """Return the map of `x`."""
        value = x
        for stage in self.stages:
            value = stage.value(value)
        return torch.addcmul(value, self.skip, x)

    def linearised(self, x: Tensor) -> tuple[Tensor, Tangent]:
        """Return the map of `x`, and its derivative there."""
        value, tangents = linearised(self.stages, x)
        return (
            torch.addcmul(value, self.skip, x),
            lambda dx: torch.addcmul(applied(tangents, dx), self.skip, dx),
        )


class LayeredField(VectorField):
    """Vector field that is a sequence of stages: a base class for networks.

    A subclass defines its `stages`. Jacobian products are computed forward with the values, so that
    training takes no second backward pass.
    """

    @abstractmethod
    def stages(self, t: Times, x: Rows, context: Context | None) -> Sequence[Stage]:
        """Return the stages at this time and context, from x (for its shape) to the velocity."""

    @property
    def inner_widths(self) -> Sequence[int]:
        """Size of the last axis after each stage but the last; empty for images."""
        return ()

    def _velocity(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        value = x
        for stage in self.stages(t, x, context):
            value = stage.value(value)
        return value

    def _velocity_and_products(
        self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        velocity, tangents = linearised(self.stages(t, x, context), x)
        return velocity, applied(tangents, probes)

    @property
    def bottleneck(self) -> int | None:
        """Least of `inner_widths`, if it is less than `features`."""
        narrowest = min(self.inner_widths, default=self.features)
        return narrowest if narrowest < self.features else None

    def _velocity_and_bottleneck_products(
        self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return bottleneck_products(self.stages(t, x, context), self.inner_widths, x, probes)


def bottleneck_products(
    stages: Iterable[Stage], inner_widths: Sequence[int], x: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the value, and the products of the probes with the Jacobian, cut at the narrowest."""
    # From behind the narrowest stage to the velocity, then from x to the narrowest stage.
    velocity, tangents = linearised(stages, x)
    start = 1 + inner_widths.index(min(inner_widths))
    return velocity, applied([*tangents[start:], *tangents[:start]], probes)


def linearised(stages: Iterable[Stage], x: Tensor) -> tuple[Tensor, list[Tangent]]:
    """Return the value of a sequence of stages at `x`, and the derivative of each there."""
    tangents = []
    for stage in stages:
        x, tangent = stage.linearised(x)
        tangents.append(tangent)
    return x, tangents


def applied(tangents: Iterable[Tangent], dx: Tensor) -> Tensor:
    """Apply one derivative after another to the direction `dx`."""
    for tangent in tangents:
        dx = tangent(dx)
    return dx
