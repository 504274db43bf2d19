"""The map of a flow as a torch transform."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform

from cnf.flows.bound import BoundFlow, Flow


class FlowTransform(Transform):
    """The map of a flow from data to base, as a torch transform.

    It says whether it is bijective, which one that draws on the way to the base is not.

    Args:
        flow: The flow.
        context: What it is conditioned on.
        cache_size: As torch's; with 1 the ladj of the last call is kept too, at its cost.
    """

    codomain = constraints.real_vector

    def __init__(self, flow: Flow, context: Tensor | None = None, *, cache_size: int = 0) -> None:
        super().__init__(cache_size)
        self.flow = flow
        self.context = context
        self._bound = BoundFlow(flow)
        self.domain = flow.support
        self.bijective = flow.chain.is_bijective
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but what is cached, whose graph cannot be copied."""
        return {**vars(self), "_inv": None, "_last": None, "_cached_x_y": (None, None)}

    @property
    def inv(self) -> "InverseFlowTransform":
        """The map from base to data."""
        if not isinstance(self._inv, InverseFlowTransform):
            self._inv = InverseFlowTransform(self)
        return self._inv

    def with_cache(self, cache_size: int = 1) -> "FlowTransform":
        """The same map, which keeps its last call or none."""
        other = FlowTransform(self.flow, self.context, cache_size=cache_size)
        other._bound = self._bound
        return other

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Shape of base points, given that of data."""
        batch = tuple(shape)[: len(shape) - len(self.flow.event_shape)]
        return torch.Size([*batch, self.flow.base.features])

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Shape of data, given that of base points."""
        return torch.Size([*shape[:-1], *self.flow.event_shape])

    def _call(self, x: Tensor) -> Tensor:
        if self._cache_size:
            y, ladj = self.call_and_ladj(x)
            self._last = x, y, ladj
            return y
        z: Tensor = self._bound.ask("to_base", x, self.context)
        return z

    def _inverse(self, y: Tensor) -> Tensor:
        if self._cache_size:
            moved, ladj = self.inv.call_and_ladj(y)
            self._last = moved, y, -ladj
            return moved
        x: Tensor = self._bound.ask("to_data", y, self.context)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dz/dx| at `x`, in nats.

        Raises:
            NotImplementedError: If the map is not a bijection, and so has no such number.
        """
        if not self.bijective:
            raise NotImplementedError("the flow is not a bijection; use flow.to_base_and_ladj.")
        if self._last is not None and x is self._last[0] and y is self._last[1]:
            return self._last[2]
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map of `x` and its ladj, in one solve."""
        moved: tuple[Tensor, Tensor] = self._bound.ask("to_base_and_ladj", x, self.context)
        return moved


class InverseFlowTransform(_InverseTransform):
    """The map of a flow from base to data, as a torch transform.

    Args:
        transform: The map from data to base.
    """

    def __getstate__(self) -> dict[str, Any]:
        """All: torch's own inverses leave out what they are the inverse of."""
        return dict(vars(self))

    def call_and_ladj(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The map of `z` and its ladj, in one solve."""
        way: Any = self._inv
        moved: tuple[Tensor, Tensor] = way._bound.ask("to_data_and_ladj", z, way.context)
        return moved
