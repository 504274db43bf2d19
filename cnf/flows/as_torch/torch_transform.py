"""The map of a flow as a torch transform."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform

from cnf.flows.as_torch.bound import BoundFlow, Flow


class FlowTransform(Transform):
    """The map of a flow from data to base, as a torch transform.

    It is not `bijective` if a transform of the flow draws.

    Args:
        flow: The flow.
        context: The context of the flow.
        cache_size: As torch's; with 1 the ladj of the last call is computed and kept too.
    """

    codomain = constraints.real_vector

    def __init__(self, flow: Flow, context: Tensor | None = None, *, cache_size: int = 0) -> None:
        super().__init__(cache_size)
        self.flow = flow
        self.context = context
        self._bound = BoundFlow(flow)
        self.domain = flow.support
        self.bijective = flow.transforms.is_bijective
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A cached graph cannot be copied.
        return {**vars(self), "_inv": None, "_last": None, "_cached_x_y": (None, None)}

    @property
    def inv(self) -> "InverseFlowTransform":
        """The map from base to data."""
        if not isinstance(self._inv, InverseFlowTransform):
            self._inv = InverseFlowTransform(self)
        return self._inv

    def with_cache(self, cache_size: int = 1) -> "FlowTransform":
        """Return the same map with another cache."""
        other = FlowTransform(self.flow, self.context, cache_size=cache_size)
        other._bound = self._bound
        return other

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of base points for a shape of data."""
        batch = tuple(shape)[: len(shape) - len(self.flow.event_shape)]
        return torch.Size([*batch, self.flow.base.features])

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of data for a shape of base points."""
        return torch.Size([*shape[:-1], *self.flow.event_shape])

    def _call(self, x: Tensor) -> Tensor:
        if self._cache_size:
            y, ladj = self.call_and_ladj(x)
            self._last = x, y, ladj
            return y
        z: Tensor = self._bound.call("to_base", x, self.context)
        return z

    def _inverse(self, y: Tensor) -> Tensor:
        if self._cache_size:
            moved, ladj = self.inv.call_and_ladj(y)
            self._last = moved, y, -ladj
            return moved
        x: Tensor = self._bound.call("to_data", y, self.context)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log|det dz/dx| at `x`, in nats.

        Raises:
            NotImplementedError: If the map is not a bijection.
        """
        if not self.bijective:
            raise NotImplementedError("the flow is not a bijection; use flow.to_base_and_ladj.")
        if self._last is not None and x is self._last[0] and y is self._last[1]:
            return self._last[2]
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the base points of `x` and the ladj, from one solve."""
        moved: tuple[Tensor, Tensor] = self._bound.call("to_base_and_ladj", x, self.context)
        return moved


class InverseFlowTransform(_InverseTransform):
    """The map of a flow from base to data, as a torch transform; made from its inverse."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))  # torch's own inverses leave out the transform that they invert

    def call_and_ladj(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the data of `z` and the ladj, from one solve."""
        to_base: Any = self._inv
        moved: tuple[Tensor, Tensor] = to_base._bound.call("to_data_and_ladj", z, to_base.context)
        return moved
