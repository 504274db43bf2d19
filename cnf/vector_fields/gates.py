r"""The gated layers of a network at one time, all at once.

At one time and context, which q joins, a concatsquash layer is the affine map with the weight and
bias

.. math:: W = f \odot W', \quad b = f \odot o + S q, \qquad f = \sigma(z), \quad z = G q + g

where f scales rows; a squash layer is the same without S. The products G q of all layers are one
product here, and so are S q. With bars for cotangents, and sums over the entries of each row,

.. math:: \bar f = \sum \bar W \odot W' + \bar b \odot o, \quad
    \bar z = \bar f \odot f \odot (1 - f), \quad \bar W' = f \odot \bar W, \quad
    \bar o = f \odot \bar b

    \bar G = \bar z q^\top, \quad \bar g = \bar z, \quad \bar S = \bar b q^\top, \quad
    \bar q = G^\top \bar z + S^\top \bar b

in one hand-written differentiable function: the numbers are few, and each operation costs more than
its arithmetic. `torch.compile` takes the formula, and makes its own.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnf.vector_fields.affine_map import AffineMap
from cnf.vector_fields.conditioning import time_and_context
from cnf.vector_fields.handwritten import (
    asks_for_more,
    gradients_of_formula,
    only_autograd_looks_on,
)
from cnf.vector_fields.layers import ConcatSquashLinear, SquashLinear, TimeLinear


def affine_maps(modules: Iterable[nn.Module], t: Tensor, context: Tensor | None) -> list[AffineMap]:
    """The maps of layers, which are of one kind, at this time and context."""
    layers = cast("list[TimeLinear]", list(modules))
    shared = t.ndim == 0 and (context is None or context.ndim == 1)
    # With a context, a squash layer may have a shift, at the output only.
    gated = isinstance(layers[0], ConcatSquashLinear) or (
        isinstance(layers[0], SquashLinear) and context is None
    )
    if not (shared and gated and (torch.compiler.is_compiling() or only_autograd_looks_on(t))):
        return [layer(t, context) for layer in layers]
    q = time_and_context(t, context)
    made = _evaluate(len(layers), q, _parameters(layers, len(q)))
    weights, biases = made[: len(layers)], made[len(layers) :]
    return [AffineMap(weight, None, bias) for weight, bias in zip(weights, biases, strict=True)]


def _parameters(layers: Sequence[TimeLinear], inputs: int) -> list[Tensor]:
    """W' of all layers, then o of all, and so on: G, g, and S if there is one."""
    gated = cast("list[SquashLinear | ConcatSquashLinear]", layers)
    return [
        *(layer.linear.weight for layer in gated),
        *(layer.linear.bias for layer in gated),
        *(_widened(layer.gate.weight, inputs) for layer in gated),
        *(layer.gate.bias for layer in gated),
        *(layer.shift.weight for layer in gated if isinstance(layer, ConcatSquashLinear)),
    ]


def _widened(weight: Tensor, inputs: int) -> Tensor:
    """The weight of a gate that sees the first inputs only, with zeros for the others."""
    missing = inputs - weight.shape[-1]
    return nn.functional.pad(weight, (0, missing)) if missing else weight


def _evaluate(layers: int, q: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The weights of all layers, and then the biases."""
    differentiable = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (q, *parameters)
    )
    if differentiable and not torch.compiler.is_compiling():
        made: tuple[Tensor, ...] = _Gated.apply(  # type: ignore[no-untyped-call]
            layers, q, *parameters
        )
        return made
    return _formula(layers, q, *parameters)[1:]


class _Gated(torch.autograd.Function):
    """The weights and biases of so many layers, of q and their parameters."""

    @staticmethod
    def forward(ctx: Any, layers: int, q: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        factor, *made = _formula(layers, q, *parameters)
        ctx.layers = layers
        ctx.save_for_backward(q, factor, *parameters)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        q, factor, *parameters = ctx.saved_tensors
        layers = ctx.layers
        if asks_for_more(cotangents):
            return None, *gradients_of_formula(
                lambda *inputs: _formula(layers, *inputs)[1:], (q, *parameters), cotangents
            )
        groups = _groups(layers, parameters)
        return None, *_backward(q, factor, groups, cotangents, q_needed=ctx.needs_input_grad[1])


def _formula(layers: int, q: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The factors of all layers in one tensor, then the weights, then the biases."""
    weights, *rest = _groups(layers, parameters)
    offset, gate, gate_bias, *shift = map(torch.cat, rest)
    factor = torch.addmv(gate_bias, gate, q).sigmoid()
    bias = factor * offset
    if shift:
        bias = torch.addmv(bias, shift[0], q)
    sizes = list(map(len, weights))
    return factor, *_scaled(weights, factor.split(sizes)), *bias.split(sizes)


def _backward(
    q: Tensor,
    factor: Tensor,
    groups: Sequence[list[Tensor]],
    cotangents: Sequence[Tensor],
    *,
    q_needed: bool,
) -> list[Tensor | None]:
    """The cotangents of q, if it is needed, and of the parameters."""
    weights, offsets, gates, _, *shifts = groups
    sizes = list(map(len, weights))
    weight_bars, bias_bar = cotangents[: len(weights)], torch.cat([*cotangents[len(weights) :]])
    pairs = zip(weight_bars, weights, strict=True)
    factor_bar = torch.cat([(bar * weight).sum(-1) for bar, weight in pairs])
    factor_bar.addcmul_(bias_bar, torch.cat(offsets))
    gate_bar = factor_bar.mul_(torch.addcmul(factor, factor, factor, value=-1))
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


def _groups(layers: int, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """One parameter of each layer at a time."""
    starts = range(0, len(parameters), layers)
    return [[*parameters[start : start + layers]] for start in starts]


def _scaled(weights: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """The rows of each weight, scaled."""
    pairs = zip(weights, factors, strict=True)
    return [factor.unsqueeze(-1) * weight for weight, factor in pairs]
