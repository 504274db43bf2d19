r"""The modulated layers of a network at one time, all at once.

At one time and context, which q joins, a layer that scales what it gives is the affine map with the
weight and bias :math:`W = f \odot W'` and :math:`b`, where f scales rows. Of the layers here

.. math:: \text{squash, concatsquash:} \quad f = \sigma(G q + g), \quad b = f \odot o + S q

    \text{FiLM:} \quad (f - 1, b - o) = V s(U q + u) + v

with the activation s = silu; squash is without S, and an output layer of FiLM without f. The
products G q of all layers are one product here, and so are S q and U q. With bars for cotangents,
and sums over the entries of a row of a weight,

.. math:: \bar W' = f \odot \bar W, \quad \bar f = \sum \bar W \odot W' \; (+ \, \bar b \odot o),
    \quad \bar z = \bar f \odot f \odot (1 - f)

where z = G q + g. The rest is the transpose of each product: :math:`\bar G = \bar z q^\top`,
:math:`\bar q = G^\top \bar z + S^\top \bar b` and so on. Both are differentiable functions written
by hand: the numbers are few, and each operation costs more than its arithmetic.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.affine import AffineMap
from cnf.vector_fields.conditions import time_and_context
from cnf.vector_fields.handwritten import (
    asks_for_more,
    gradients_of_formula,
    only_autograd_looks_on,
)
from cnf.vector_fields.layers import ConcatSquashLinear, FiLMLinear, SquashLinear, TimeLinear


def affine_maps(modules: Iterable[nn.Module], t: Tensor, context: Tensor | None) -> list[AffineMap]:
    """The maps of layers, which are of one kind, at this time and context."""
    layers = cast("list[TimeLinear]", list(modules))
    shared = t.ndim == 0 and (context is None or context.ndim == 1)
    kind = type(layers[0])
    # A squash layer has shifts at the output only, if at all.
    known = kind in (ConcatSquashLinear, FiLMLinear) or (kind is SquashLinear and context is None)
    if not (shared and known and only_autograd_looks_on(t)):
        return [layer(t, context) for layer in layers]
    q = time_and_context(t, context)
    if kind is FiLMLinear:
        stack, parameters = _film(layers)
    else:
        gated = cast("list[SquashLinear | ConcatSquashLinear]", layers)
        stack, parameters = _gates(gated, len(q))
    weights, biases = stack(q, parameters)
    weights += [layer.linear.weight for layer in layers[len(weights) :]]
    return [AffineMap(weight, None, bias) for weight, bias in zip(weights, biases, strict=True)]


def _gates(
    layers: Sequence[SquashLinear | ConcatSquashLinear], inputs: int
) -> tuple["_Stack", list[Tensor]]:
    parameters = [
        *(layer.linear.weight for layer in layers),
        *(layer.linear.bias for layer in layers),
        *(_widened(layer.gate.weight, inputs) for layer in layers),
        *(layer.gate.bias for layer in layers),
    ]
    if isinstance(layers[0], ConcatSquashLinear):
        parameters += [layer.shift.weight for layer in layers]
    return _Gates(len(layers), len(layers)), parameters


def _widened(weight: Tensor, inputs: int) -> Tensor:
    """The weight of a gate that sees the first inputs only, with zeros for the others."""
    missing = inputs - weight.shape[-1]
    return functional.pad(weight, (0, missing)) if missing else weight


def _film(layers: Sequence[TimeLinear]) -> tuple["_Stack", list[Tensor]]:
    scaled = len(layers) if layers[-1].gate_context else len(layers) - 1
    first, _, second = zip(*(cast("nn.Sequential", layer.network) for layer in layers), strict=True)
    parameters = [
        *(layer.linear.weight for layer in layers[:scaled]),
        *(layer.linear.bias for layer in layers),
        *(part.weight for part in first),
        *(part.bias for part in first),
        *(part.weight for part in second),
        *(part.bias for part in second),
    ]
    return _Film(len(layers), scaled), parameters


class _Stack(ABC):
    """A number of layers, of which the first so many have scaled weights."""

    def __init__(self, layers: int, scaled: int) -> None:
        self.layers, self.scaled = layers, scaled

    def __call__(
        self, q: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The scaled weights, and all biases."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, *parameters)):
            made = _Modulated.apply(self, q, *parameters)  # type: ignore[no-untyped-call]
        else:
            made, _ = self.formula(q, *parameters)
        return [*made[: self.scaled]], [*made[self.scaled :]]

    def groups(self, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
        """The scaled weights, and then one parameter of each layer at a time."""
        starts = range(self.scaled, len(parameters), self.layers)
        rest = [[*parameters[start : start + self.layers]] for start in starts]
        return [[*parameters[: self.scaled]], *rest]

    @abstractmethod
    def formula(
        self, q: Tensor, *parameters: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Scaled weights and biases, and what `pull` needs again; differentiable."""

    @abstractmethod
    def pull(
        self,
        q: Tensor,
        parameters: Sequence[Tensor],
        kept: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        *,
        q_needed: bool,
    ) -> list[Tensor | None]:
        """The cotangents of q, if it is needed, and of the parameters."""


class _Modulated(torch.autograd.Function):
    """The scaled weights and the biases of a stack, of q and its parameters."""

    @staticmethod
    def forward(ctx: Any, stack: _Stack, q: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        made, kept = stack.formula(q, *parameters)
        ctx.stack, ctx.parameters = stack, len(parameters)
        ctx.save_for_backward(q, *parameters, *kept)
        return made

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        q, *tensors = ctx.saved_tensors
        parameters, kept = tensors[: ctx.parameters], tensors[ctx.parameters :]
        if asks_for_more(cotangents):
            return None, *gradients_of_formula(
                lambda *inputs: ctx.stack.formula(*inputs)[0], (q, *parameters), cotangents
            )
        needed = ctx.needs_input_grad[1]
        return None, *ctx.stack.pull(q, parameters, kept, cotangents, q_needed=needed)


class _Gates(_Stack):
    """Squash or concatsquash layers."""

    def formula(
        self, q: Tensor, *parameters: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Scaled weights and biases, and the factors."""
        weights, *rest = self.groups(parameters)
        offset, gate, gate_bias, *shift = map(torch.cat, rest)
        factor = torch.addmv(gate_bias, gate, q).sigmoid()
        bias = factor * offset
        if shift:
            bias = torch.addmv(bias, shift[0], q)
        sizes = list(map(len, weights))
        return (*_scaled(weights, factor.split(sizes)), *bias.split(sizes)), (factor,)

    def pull(
        self,
        q: Tensor,
        parameters: Sequence[Tensor],
        kept: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        *,
        q_needed: bool,
    ) -> list[Tensor | None]:
        """The cotangents of q, if it is needed, and of the parameters."""
        weights, offsets, gates, _, *shifts = self.groups(parameters)
        (factor,) = kept
        weight_bars, bias_bar = cotangents[: self.scaled], torch.cat([*cotangents[self.scaled :]])
        factor_bar = torch.cat(_row_sums(weight_bars, weights))
        factor_bar.addcmul_(bias_bar, torch.cat(offsets))
        gate_bar = factor_bar.mul_(torch.addcmul(factor, factor, factor, value=-1))
        sizes = list(map(len, weights))
        q_bar = torch.cat(gates).T @ gate_bar if q_needed else None
        found = [
            *_scaled(weight_bars, factor.split(sizes)),
            *(factor * bias_bar).split(sizes),
            *torch.outer(gate_bar, q).split(sizes),
            *gate_bar.split(sizes),
        ]
        for group in shifts:
            found += torch.outer(bias_bar, q).split(sizes)
            q_bar = q_bar if q_bar is None else torch.addmv(q_bar, torch.cat(group).T, bias_bar)
        return [q_bar, *found]


class _Film(_Stack):
    """FiLM layers."""

    def formula(
        self, q: Tensor, *parameters: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Scaled weights and biases, what goes into the activation, and the factors."""
        weights, offsets, first, first_bias, second, second_bias = self.groups(parameters)
        inner = torch.addmv(torch.cat(first_bias), torch.cat(first), q)
        units = functional.silu(inner).split(list(map(len, first)))
        made = list(map(torch.addmv, second_bias, second, units))
        factors = [1 + part[: len(weight)] for part, weight in zip(made, weights, strict=False)]
        biases = [
            offset + part[len(part) - len(offset) :]
            for part, offset in zip(made, offsets, strict=True)
        ]
        return (*_scaled(weights, factors), *biases), (inner, *factors)

    def pull(
        self,
        q: Tensor,
        parameters: Sequence[Tensor],
        kept: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        *,
        q_needed: bool,
    ) -> list[Tensor | None]:
        """The cotangents of q, if it is needed, and of the parameters."""
        weights, _, first, _, second, _ = self.groups(parameters)
        inner, *factors = kept
        sizes = list(map(len, first))
        units, slope = ACTIVATIONS["silu"].jet(inner.clone(), 1)
        weight_bars, bias_bars = cotangents[: self.scaled], cotangents[self.scaled :]
        factor_bars = _row_sums(weight_bars, weights)
        made_bars = [
            *map(torch.cat, zip(factor_bars, bias_bars, strict=False)),
            *bias_bars[self.scaled :],
        ]
        unit_bars = [part.T @ bar for part, bar in zip(second, made_bars, strict=True)]
        inner_bar = torch.cat(unit_bars).mul_(slope)
        return [
            torch.cat(first).T @ inner_bar if q_needed else None,
            *_scaled(weight_bars, factors),
            *bias_bars,
            *torch.outer(inner_bar, q).split(sizes),
            *inner_bar.split(sizes),
            *map(torch.outer, made_bars, units.split(sizes)),
            *made_bars,
        ]


def _scaled(weights: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """The rows of each weight, scaled."""
    pairs = zip(weights, factors, strict=True)
    return [factor.unsqueeze(-1) * weight for weight, factor in pairs]


def _row_sums(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """The inner products of the rows of matrices."""
    return [(one * other).sum(-1) for one, other in zip(left, right, strict=True)]
