"""Time-conditioned linear layers: each is an affine map of x whose parts depend on t and context.

Every layer has the form ``gate * (W x) + bias``. A field needs to know no more to carry tangents
through it (``gate * (W dx)``) or to write its divergence in closed form.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class AffineMap(NamedTuple):
    """The map ``x -> gate * (weight x) + bias`` that a layer is at one time and context."""

    weight: Tensor
    """Shape ``(out, in)``."""
    gate: Tensor | None
    """Shape ``(*batch, out)``, where rows differ in it; None stands for ones."""
    bias: Tensor
    """Shape ``(out,)`` or ``(*batch, out)``."""

    def value(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The map of `x`."""
        if self.gate is None and self.bias.ndim == 1:
            return nn.functional.linear(x, self.weight, self.bias)
        return self.tangent(x) + self.bias

    def tangent(self, dx: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The derivative of the map in direction `dx`."""
        product = nn.functional.linear(dx, self.weight)
        return product if self.gate is None else self.gate * product


class TimeLinear(nn.Module, ABC):
    """A linear layer conditioned on time and context.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        context_features: Size of the context; 0 for none.
        gate_context: Whether a gate depends on the context too. The output layer of a field says
            no: its gate is then the same for each row, which the closed-form divergence needs.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context_features: int = 0,
        *,
        gate_context: bool = True,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.context_features = context_features
        self.gate_context = gate_context

    def reset_parameters(self) -> None:
        """Draw the initial weights, as torch does for linear layers."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def reset_to_zero(self) -> None:
        """Make this the zero map at every time and context; a gate stays, with nothing to scale."""
        for name, parameter in self.named_parameters():
            if not name.startswith("gate."):
                nn.init.zeros_(parameter)

    @abstractmethod
    def forward(
        self,
        t: Float[Tensor, "*t_batch"],
        context: Float[Tensor, "*c_batch context_features"] | None,
    ) -> AffineMap:
        """The affine map at this time and context."""


class IgnoreLinear(TimeLinear):
    """``W x + b + U c``: time is ignored."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context_features: int = 0,
        *,
        gate_context: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, context_features, gate_context=gate_context)
        if context_features:
            self.shift = nn.Linear(context_features, out_features, bias=False)

    def forward(
        self,
        t: Float[Tensor, "*t_batch"],  # noqa: ARG002 - the interface of every layer
        context: Float[Tensor, "*c_batch context_features"] | None,
    ) -> AffineMap:
        """The affine map at this context."""
        bias = self.linear.bias
        return AffineMap(
            self.linear.weight, None, bias if context is None else bias + self.shift(context)
        )


class ConcatLinear(TimeLinear):
    """``W [x, t, c] + b``: time and context are further inputs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context_features: int = 0,
        *,
        gate_context: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, context_features, gate_context=gate_context)
        self.shift = nn.Linear(1 + context_features, out_features, bias=False)

    def forward(
        self,
        t: Float[Tensor, "*t_batch"],
        context: Float[Tensor, "*c_batch context_features"] | None,
    ) -> AffineMap:
        """The affine map at this time and context."""
        shift = self.shift(_time_and_context(t, context))
        return AffineMap(self.linear.weight, None, self.linear.bias + shift)


class ConcatSquashLinear(TimeLinear):
    """``(W x + b) * sigmoid(g(t, c)) + s(t, c)`` with affine g and linear s.

    The default layer of FFJORD's published code.

    References:
        Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context_features: int = 0,
        *,
        gate_context: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, context_features, gate_context=gate_context)
        gate_inputs = 1 + (context_features if gate_context else 0)
        self.gate = nn.Linear(gate_inputs, out_features)
        self.shift = nn.Linear(1 + context_features, out_features, bias=False)

    def forward(
        self,
        t: Float[Tensor, "*t_batch"],
        context: Float[Tensor, "*c_batch context_features"] | None,
    ) -> AffineMap:
        """The affine map at this time and context."""
        gate = self.gate(_time_and_context(t, context if self.gate_context else None)).sigmoid()
        bias = gate * self.linear.bias + self.shift(_time_and_context(t, context))
        if gate.ndim == 1:  # the same for each row: cheaper on the weight than on every row
            return AffineMap(gate.unsqueeze(-1) * self.linear.weight, None, bias)
        return AffineMap(self.linear.weight, gate, bias)


def _time_and_context(
    t: Float[Tensor, "*t_batch"], context: Float[Tensor, "*c_batch context_features"] | None
) -> Float[Tensor, "*batch inputs"]:
    time = t.unsqueeze(-1)
    if context is None:
        return time
    batch = torch.broadcast_shapes(t.shape, context.shape[:-1])
    return torch.cat([time.expand(*batch, 1), context.expand(*batch, context.shape[-1])], -1)


LAYERS: dict[str, type[TimeLinear]] = {
    "ignore": IgnoreLinear,
    "concat": ConcatLinear,
    "concatsquash": ConcatSquashLinear,
}
"""Layers by name."""
