r"""A multi-layer perceptron and its Jacobian in one hand-written differentiable function.

With shared weights :math:`W_i` and activations :math:`s_i`, of which there are n, each row has

.. math:: a_i = W_i h_{i-1} + b_i, \quad h_i = s_i(a_i), \quad h_0 = x, \quad
    v = W_{n+1} h_n + b_{n+1}, \qquad J = W_{n+1} D_n W_n \cdots D_1 W_1

with the diagonal matrices :math:`D_i` of the slopes :math:`d_i = s_i'(a_i)`. A `Chain` makes a
result :math:`\tau(d_1, …, d_n)` of J, linear in each :math:`d_i`: the trace, or products with
probes.

**Backward.** Let a bar be the cotangent (the gradient of what follows) of a value. The chain gives
:math:`\bar d_i`, and its share of each :math:`\bar W_i`. Then from :math:`\bar h_n = W_{n+1}^\top
\bar v` downwards

.. math:: \bar a_i = d_i \odot \bar h_i + s_i''(a_i) \odot \bar d_i, \quad
    \bar h_{i-1} = W_i^\top \bar a_i, \quad
    \bar W_i \mathrel{+}= \sum_\text{rows} \bar a_i h_{i-1}^\top, \quad
    \bar b_i = \sum_\text{rows} \bar a_i

so that beside h and d only the curvatures :math:`s_i''(a_i)` are kept. Each takes a pass or two,
given h and d.

**The trace**, with a cotangent :math:`\bar\tau` for each row. One hidden layer:
:math:`\tau = d_1^\top k` with :math:`k_j = (W_1 W_2)_{jj}`; then :math:`\bar d_1 = \bar\tau k`.
Two: :math:`\tau = d_1^\top K d_2` with :math:`K = W_2^\top \odot W_1 W_3`, made once for all rows;
then :math:`\bar d_1 = \bar\tau K d_2`, :math:`\bar d_2 = \bar\tau K^\top d_1` and :math:`\bar K =
\sum_\text{rows} \bar\tau d_1 d_2^\top`. More: for each feature p, the tangent :math:`c_p = W_2 D_1
W_1 e_p` of the second layer and the cotangent :math:`r_p = W_n^\top D_n W_{n+1}^\top e_p` of the
last but one are linear in :math:`d_1` and :math:`d_n`. All :math:`c_p` are one product of
:math:`d_1` with the row-wise outer products of :math:`W_1` and :math:`W_2^\top`, and all
:math:`r_p` one with those of :math:`W_{n+1}^\top` and :math:`W_n`: no row forms
:math:`D_1 W_1`, and neither the basis nor the Jacobian appears. They meet in the last layer but
one, where the tangents have been carried on if n > 3:

.. math:: \tau = d_{n-1}^\top \sum_p c_p \odot r_p, \quad
    \bar c_p = \bar\tau d_{n-1} \odot r_p, \quad \bar r_p = \bar\tau d_{n-1} \odot c_p, \quad
    \bar d_{n-1} = \bar\tau \sum_p c_p \odot r_p

**Products** carry tangents :math:`c_i = W_i u_{i-1}, u_i = d_i \odot c_i` with :math:`u_0` the
probes, to :math:`W_{n+1} u_n`; then :math:`\bar d_i = \sum_\text{probes} \bar u_i \odot c_i`,
:math:`\bar c_i = d_i \odot \bar u_i` and :math:`\bar u_{i-1} = W_i^\top \bar c_i`.

**Blocks.** On the CPU rows are taken in blocks whose numbers stay in the cache, forward and
backward; gradients of weights are summed over them.

**Second derivatives.** A backward pass that is to be differentiated itself goes through the plain
formulas of `Perceptron`. These also serve alone where autograd does not look on, or is not alone:
under `torch.func`, forward-mode differentiation, autocast and `torch.compile`; and where rows
differ in a weight or gate.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cnf.vector_fields.activations import Activation
from cnf.vector_fields.affine_map import AffineMap
from cnf.vector_fields.chains import Chain, Products, Sums, trace_chain
from cnf.vector_fields.handwritten import (
    asks_for_more,
    gradients_of_formula,
    only_autograd_looks_on,
)
from cnf.vector_fields.jacobian.perceptron import Perceptron

_CACHE_BYTES = 2**22
_LEAST_ROWS = 512


def velocity_and_products(
    network: Perceptron,
    x: Float[Tensor, "*batch features"],
    probes: Float[Tensor, "probes *batch features"],
) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "probes *batch features"]]:
    """The same as the method of `network`, fused where that can be."""
    if not _serves(network, x):
        return network.velocity_and_products(x, probes)
    flat = probes.reshape(len(probes), x.shape[:-1].numel(), x.shape[-1])
    velocity, products = _evaluate(network, x, flat)
    return velocity.view(x.shape), products.view(probes.shape)


def velocity_and_divergence(
    network: Perceptron, x: Float[Tensor, "*batch features"]
) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "*batch"]]:
    """The same as the method of `network`, fused where that can be."""
    if not _serves(network, x):
        return network.velocity_and_divergence(x)
    velocity, divergence = _evaluate(network, x, None)
    return velocity.view(x.shape), divergence.view(x.shape[:-1])


def _serves(network: Perceptron, x: Tensor) -> bool:
    """Whether rows share the linear parts of `network`, and only autograd, if any, looks on."""
    batch = x.shape[:-1]
    return only_autograd_looks_on(x) and all(
        affine.is_shared and affine.offset is None and affine.bias.shape[:-1] in ((), batch)
        for affine in network.maps
    )


def _evaluate(network: Perceptron, x: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Velocity and result of the chain, with a graph only if a gradient may be asked for."""
    rows = x.reshape(-1, x.shape[-1])
    parameters = (
        *(affine.weight for affine in network.maps),
        *(_for_rows(affine.bias) for affine in network.maps),
    )
    variables = (rows, *parameters) if probes is None else (rows, probes, *parameters)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in variables):
        found: tuple[Tensor, Tensor] = _Fused.apply(  # type: ignore[no-untyped-call]
            network.activations, rows, probes, *parameters
        )
        return found
    velocity, result, _ = _forward(network.activations, rows, probes, parameters, order=1)
    return velocity, result


class _Fused(torch.autograd.Function):
    """Velocity and result of a chain, of rows, probes or None, all weights and all biases."""

    @staticmethod
    def forward(
        ctx: Any,
        activations: Sequence[Activation],
        x: Tensor,
        probes: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        velocity, result, blocks = _forward(activations, x, probes, parameters, order=2)
        ctx.activations, ctx.parameters, ctx.blocks = activations, len(parameters), len(blocks)
        ctx.save_for_backward(x, probes, *parameters, *itertools.chain(*blocks))
        return velocity, result

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        x, probes, *tensors = ctx.saved_tensors
        parameters, kept = tensors[: ctx.parameters], tensors[ctx.parameters :]
        if asks_for_more(cotangents):
            formula = functools.partial(_formula, ctx.activations)
            return None, *gradients_of_formula(formula, (x, probes, *parameters), cotangents)
        size = len(kept) // ctx.blocks
        blocks = [kept[start : start + size] for start in range(0, len(kept), size)]
        needed = ctx.needs_input_grad[1:3]
        return None, *_backward(x, probes, parameters, blocks, cotangents, needed)


def _forward(
    activations: Sequence[Activation],
    x: Tensor,
    probes: Tensor | None,
    parameters: Sequence[Tensor],
    order: int,
) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """Velocity, result and, with `order` 2, what `_backward` needs of each block of rows."""
    weights, biases = _halves(parameters)
    chain = _chain(weights, probes)
    velocities, results, kept = [], [], []
    size = _block_rows(x, (1 + order) * sum(map(len, weights)) + chain.entries)
    for start in range(0, max(1, len(x)), size):
        rows = slice(start, start + size)
        value, slopes = x[rows], []
        units: list[Tensor] = []
        for weight, bias, activation in zip(weights, biases, activations, strict=False):
            jet = activation.jet(torch.addmm(_of(bias, rows), value, weight.T), order)
            value = jet[0]
            slopes.append(jet[1])
            units += jet if order == 2 else ()
        velocities.append(torch.addmm(_of(biases[-1], rows), value, weights[-1].T))
        own_probes = None if probes is None else probes[:, rows]
        if order == 2:
            result, made = chain.carry(slopes, own_probes)
            kept.append((*units, *made))
        else:
            result = chain.result(slopes, own_probes)
        results.append(result)
    return _joined(velocities), _joined(results, chain.row_axis), kept


def _backward(
    x: Tensor,
    probes: Tensor | None,
    parameters: Sequence[Tensor],
    blocks: Sequence[Sequence[Tensor]],
    cotangents: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The cotangents of x and the probes, if they are needed, and of the parameters."""
    weights, biases = _halves(parameters)
    chain = _chain(weights, probes)
    of_x: list[Tensor] = []
    of_probes: list[Tensor] = []
    of_biases: list[list[Tensor]] = [[] for _ in biases]
    of_chain, of_values = Sums(), Sums()
    start, units = 0, 3 * (len(weights) - 1)
    for kept in blocks:
        values, slopes, curvatures = (kept[i:units:3] for i in range(3))
        rows = slice(start, start + len(values[0]))
        start = rows.stop
        bar = cotangents[1][(slice(None),) * chain.row_axis + (rows,)]
        own_probes = None if probes is None else probes[:, rows]
        slope_bars, probe_bar = chain.pull(bar, slopes, own_probes, kept[units:], of_chain)
        if probe_bar is not None and needed[1]:
            of_probes.append(probe_bar @ weights[0])
        bar = cotangents[0][rows]
        for i in reversed(range(len(weights))):
            of_values.add(i, bar, values[i - 1] if i else x[rows])
            of_biases[i].append(bar.sum(0) if biases[i].ndim == 1 else bar)
            if i:
                bar = (bar @ weights[i]).mul_(slopes[i - 1])
                bar.addcmul_(slope_bars[i - 1], curvatures[i - 1])
        if needed[0]:
            of_x.append(bar @ weights[0])
    shares = chain.to_weights(of_chain.in_order)
    return [
        _joined(of_x) if of_x else None,
        _joined(of_probes, 1) if of_probes else None,
        *(total.add_(share) for total, share in zip(of_values.in_order, shares, strict=True)),
        *itertools.starmap(_bias_gradient, zip(biases, of_biases, strict=True)),
    ]


def _formula(
    activations: Sequence[Activation], x: Tensor, probes: Tensor | None, *parameters: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain one."""
    weights, biases = _halves(parameters)
    maps = [AffineMap(weight, None, bias) for weight, bias in zip(weights, biases, strict=True)]
    network = Perceptron(maps, activations)
    if probes is None:
        return network.velocity_and_divergence(x)
    return network.velocity_and_products(x, probes)


def _chain(weights: Sequence[Tensor], probes: Tensor | None) -> Chain:
    return trace_chain(weights) if probes is None else Products(weights, len(probes))


def _halves(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Weights and biases."""
    half = len(parameters) // 2
    return parameters[:half], parameters[half:]


def _for_rows(bias: Tensor) -> Tensor:
    return bias if bias.ndim == 1 else bias.reshape(-1, bias.shape[-1])


def _of(bias: Tensor, rows: slice) -> Tensor:
    return bias if bias.ndim == 1 else bias[rows]


def _bias_gradient(bias: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Of a bias of each row its rows, of a shared one the sum."""
    return _joined(parts) if bias.ndim > 1 else sum(parts[1:], start=parts[0])


def _joined(blocks: Sequence[Tensor], row_axis: int = 0) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), row_axis)


def _block_rows(x: Tensor, entries: int) -> int:
    """Rows of a block, of so many entries each: blocks that fit the cache of a CPU, and alike."""
    if x.device.type != "cpu":
        return max(1, len(x))
    most = max(_LEAST_ROWS, _CACHE_BYTES // (entries * x.element_size()))
    blocks = max(1, math.ceil(len(x) / most))
    return max(1, math.ceil(len(x) / blocks))
