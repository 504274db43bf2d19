"""Time-conditioned linear layers: affine maps of x that depend on t and context.

Every layer has the form ``gate * (W x + offset) + bias``, from which a field gets tangents
(``gate * (W dx)``) and closed forms of its divergence.

References:
    Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367
"""

import math
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnf._shapes import Context, Times
from cnf.vector_fields.conditioning import beside
from cnf.vector_fields.jacobian.affine_map import AffineMap


class ConditionLinear(nn.Linear):
    """Linear layer of time and context, which are one vector unless rows differ."""

    def forward(self, conditions: Tensor) -> Tensor:
        """Return the layer's value."""
        if conditions.ndim > 1:
            return super().forward(conditions)
        # One operation; torch's own layer takes several, which cost more than the arithmetic.
        if self.bias is None:
            return torch.mv(self.weight, conditions)
        return torch.addmv(self.bias, self.weight, conditions)


class TimeLinear(nn.Module, ABC):
    """Linear layer conditioned on time and context.

    A subclass makes its parts in the hook `_build` and returns the map in `forward`.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        context_features: Size of the context; 0 for none.
        gate_context: Whether a gate depends on the context too; False for the output layer of a
            field, because the closed-form divergence needs a gate that all rows share.
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
        self._build()

    @abstractmethod
    def _build(self) -> None:
        """Hook: make the parts beside `linear`."""

    @abstractmethod
    def forward(self, t: Times, context: Context | None) -> AffineMap:
        """Return the affine map at this time and context."""

    def reset_parameters(self) -> None:
        """Draw the initial weights, as torch does for linear layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def reset_to_waves(self, frequency: float) -> None:
        """Draw the weights of a sinusoidal layer: normal with this scale, and uniform phases."""
        nn.init.normal_(self.linear.weight, std=frequency)
        nn.init.uniform_(self.linear.bias, -math.pi, math.pi)

    def reset_to_zero(self) -> None:
        """Make this the zero map at every time and context; a gate keeps its weights."""
        for name, parameter in self.named_parameters():
            if not name.startswith("gate."):
                nn.init.zeros_(parameter)

    def _linear(self, inputs: int, *, bias: bool) -> nn.Linear:
        return ConditionLinear(inputs, self.linear.out_features, bias=bias)

    @property
    def _gate_inputs(self) -> int:
        return 1 + (self.context_features if self.gate_context else 0)

    def _gated(self, gate: Tensor, shift: Tensor) -> AffineMap:
        """Return the map ``sigmoid(gate) * (W x + b) + shift``."""
        factor = gate.sigmoid()
        weight, offset = self.linear.weight, self.linear.bias
        if factor.ndim == 1:  # the same for each row: cheaper on the weight than on every row
            return AffineMap(
                factor.unsqueeze(-1) * weight, None, torch.addcmul(shift, factor, offset)
            )
        return AffineMap(weight, factor, shift, offset)


class IgnoreLinear(TimeLinear):
    """``W x + b + U c``: time is ignored."""

    def _build(self) -> None:
        if self.context_features:
            self.shift = self._linear(self.context_features, bias=False)

    def forward(self, t: Times, context: Context | None) -> AffineMap:
        """Return the affine map at this context."""
        weight, bias = self.linear.weight, self.linear.bias
        return AffineMap(weight, None, bias if context is None else bias + self.shift(context))


class ConcatLinear(TimeLinear):
    """``W [x, t, c] + b``: time and context are further inputs."""

    def _build(self) -> None:
        self.shift = self._linear(1 + self.context_features, bias=False)

    def forward(self, t: Times, context: Context | None) -> AffineMap:
        """Return the affine map at this time and context."""
        shift = self.shift(beside(t.unsqueeze(-1), context))
        return AffineMap(self.linear.weight, None, self.linear.bias + shift)


class SquashLinear(TimeLinear):
    """``(W x + b) * sigmoid(g(t, c))`` with affine g."""

    def _build(self) -> None:
        self.gate = self._linear(self._gate_inputs, bias=True)
        if self.context_features and not self.gate_context:
            self.shift = self._linear(self.context_features, bias=False)

    def forward(self, t: Times, context: Context | None) -> AffineMap:
        """Return the affine map at this time and context."""
        time = t.unsqueeze(-1)
        if context is None or self.gate_context:
            return self._gated(self.gate(beside(time, context)), torch.zeros_like(self.linear.bias))
        return self._gated(self.gate(time), self.shift(context))


class ConcatSquashLinear(TimeLinear):
    """``(W x + b) * sigmoid(g(t, c)) + s(t, c)`` with affine g and linear s.

    The default layer of FFJORD's published code.
    """

    def _build(self) -> None:
        self.gate = self._linear(self._gate_inputs, bias=True)
        self.shift = self._linear(1 + self.context_features, bias=False)

    def forward(self, t: Times, context: Context | None) -> AffineMap:
        """Return the affine map at this time and context."""
        time = t.unsqueeze(-1)
        conditions = beside(time, context)
        gate = self.gate(conditions if self.gate_context else time)
        return self._gated(gate, self.shift(conditions))


class BlendLinear(TimeLinear):
    """``(1 - t) (W0 x + b0) + t (W1 x + b1) + U c``: from one layer to another."""

    def _build(self) -> None:
        self.end = self._linear(self.linear.in_features, bias=True)
        if self.context_features:
            self.shift = self._linear(self.context_features, bias=False)

    def forward(self, t: Times, context: Context | None) -> AffineMap:
        """Return the affine map at this time and context."""
        weight = torch.lerp(self.linear.weight, self.end.weight, t[..., None, None])
        bias = torch.lerp(self.linear.bias, self.end.bias, t[..., None])
        return AffineMap(weight, None, bias if context is None else bias + self.shift(context))

    def reset_to_waves(self, frequency: float) -> None:
        """Draw the same weights for t = 0 and t = 1."""
        super().reset_to_waves(frequency)
        self.end.load_state_dict(self.linear.state_dict())


class HyperLinear(TimeLinear):
    """``W(t) x + b(t) + U c``, where a network of t with one hidden layer gives W and b.

    The hypernetwork of FFJORD's published code: 8 hidden tanh units, whose output bias is the
    layer's W and b here. A new one does not depend on t.

    References:
        Grathwohl et al. (2019), FFJORD, `lib/layers/diffeq_layers/basic.py` of its code.
        https://github.com/rtqichen/ffjord
    """

    _WIDTH = 8

    def _build(self) -> None:
        size = (self.linear.in_features + 1) * self.linear.out_features
        self.hidden = ConditionLinear(1, self._WIDTH)
        self.change = ConditionLinear(self._WIDTH, size, bias=False)
        nn.init.zeros_(self.change.weight)
        if self.context_features:
            self.shift = self._linear(self.context_features, bias=False)

    def forward(self, t: Times, context: Context | None) -> AffineMap:
        """Return the affine map at this time and context."""
        columns = self.linear.in_features + 1
        change = self.change(self.hidden(t.unsqueeze(-1)).tanh()).unflatten(-1, (-1, columns))
        weight = self.linear.weight + change[..., :-1]
        bias = self.linear.bias + change[..., -1]
        return AffineMap(weight, None, bias if context is None else bias + self.shift(context))

    def reset_parameters(self) -> None:
        """Draw the initial weights; nothing depends on t yet."""
        super().reset_parameters()
        nn.init.zeros_(self.change.weight)

    def reset_to_zero(self) -> None:
        """Make this the zero map; the hidden layer stays, or it would never learn."""
        super().reset_to_zero()
        self.hidden.reset_parameters()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if f"{prefix}slope.weight" in state_dict:
            raise RuntimeError(
                "these are weights of an earlier 'hyper' layer, which was linear in t, unlike "
                "FFJORD's. It equals a 'blend' layer whose `end` is linear + slope: load them so "
                "into a field with layer='blend'"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class FiLMLinear(TimeLinear):
    """``(1 + g(t, c)) * W x + s(t, c)``, with a small network for g and s; no g at the output.

    References:
        Perez et al. (2018), FiLM: Visual Reasoning with a General Conditioning Layer.
        https://arxiv.org/abs/1709.07871
    """

    _WIDTH = 32

    def _build(self) -> None:
        outputs = self.linear.out_features * (2 if self.gate_context else 1)
        self.network = nn.Sequential(
            ConditionLinear(1 + self.context_features, self._WIDTH),
            nn.SiLU(),
            ConditionLinear(self._WIDTH, outputs),
        )

    def forward(self, t: Times, context: Context | None) -> AffineMap:
        """Return the affine map at this time and context."""
        modulation = self.network(beside(t.unsqueeze(-1), context))
        if not self.gate_context:
            return AffineMap(self.linear.weight, None, self.linear.bias + modulation)
        scale, shift = modulation.chunk(2, -1)
        gate, bias = 1 + scale, self.linear.bias + shift
        if gate.ndim == 1:  # as in _gated
            return AffineMap(gate.unsqueeze(-1) * self.linear.weight, None, bias)
        return AffineMap(self.linear.weight, gate, bias)

    def reset_to_zero(self) -> None:
        """Make this the zero map; the network keeps a hidden layer, or it would never learn."""
        for parameter in (*self.linear.parameters(), *self.network[-1].parameters()):
            nn.init.zeros_(parameter)


def reset_layers(layers: nn.ModuleList, frequency: float | None = None) -> None:
    """Draw the initial weights of a field: torch's, but zero for the last layer.

    A `frequency` draws the first layer as a sinusoidal layer of this scale.
    """
    first, *_ = (each := cast("list[TimeLinear]", list(layers)))
    for layer in each:
        layer.reset_parameters()
    if frequency is not None:
        first.reset_to_waves(frequency)
    make_zero(layers)


def make_zero(layers: nn.ModuleList) -> None:
    """Make the last layer of a field zero; the other layers stay."""
    cast("list[TimeLinear]", list(layers))[-1].reset_to_zero()


LAYERS: dict[str, type[TimeLinear]] = {
    "ignore": IgnoreLinear,
    "concat": ConcatLinear,
    "squash": SquashLinear,
    "concatsquash": ConcatSquashLinear,
    "blend": BlendLinear,
    "hyper": HyperLinear,
    "film": FiLMLinear,
}
"""Layers by name: the layers of FFJORD's published code, and FiLM."""
