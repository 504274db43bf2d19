r"""Multi-layer perceptron at one time and context, and the trace of its Jacobian.

With weights :math:`W_i` that all rows share and n activations :math:`s_i`, each row has

.. math:: a_i = W_i h_{i-1} + b_i, \quad h_i = s_i(a_i), \quad h_0 = x, \quad
    v = W_{n+1} h_n + b_{n+1}, \qquad J = W_{n+1} D_n W_n \cdots D_1 W_1

with the diagonal matrices :math:`D_i` of the slopes :math:`d_i = s_i'(a_i)`. A gate of a hidden
layer, which scales :math:`W_i` for each row, is a factor of :math:`d_i`. A skip from x to v adds
``skip * x`` to v, and the sum of `skip` to the trace.

**One hidden layer.** :math:`\mathrm{tr} J = k^\top d_1` with :math:`k_j = (W_1 W_2)_{jj}`.

**Two.** :math:`\mathrm{tr} J = d_1^\top K d_2` with :math:`K = W_2^\top \odot W_1 W_3`. K, like k,
is computed once for all rows.

**More.** For each feature p, the tangent :math:`c_p = W_2 D_1 W_1 e_p` of the second layer and the
cotangent :math:`r_p = W_n^\top D_n W_{n+1}^\top e_p` of the last but one are linear in :math:`d_1`
and :math:`d_n`. All :math:`c_p` are one product of :math:`d_1` with the row-wise outer products of
:math:`W_1` and :math:`W_2^\top`, and all :math:`r_p` one of :math:`d_n` with the row-wise outer
products of :math:`W_{n+1}^\top` and :math:`W_n`. They meet in the last layer but one, to which the
tangents are carried if n > 3:

.. math:: \mathrm{tr} J = d_{n-1}^\top \sum_p c_p \odot r_p

**Blocks.** On a CPU, rows are taken in blocks whose values stay in its cache.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnf._shapes import Rows, Values
from cnf.vector_fields.activations import Activation
from cnf.vector_fields.jacobian.affine_map import AffineMap, of_rows
from cnf.vector_fields.jacobian.autograd import standard_basis
from cnf.vector_fields.staged import Activated, Stage, WithSkip, applied, linearised

_BLOCK_ROWS = 1024


class Perceptron(NamedTuple):
    """Affine maps with activations between them."""

    maps: Sequence[AffineMap]
    """Maps of the hidden layers, and of the output layer."""
    activations: Sequence[Activation]
    """Activations of the hidden layers."""
    skip: Tensor | None = None
    """Factor of x in the value, for each feature, and perhaps for each row."""

    @property
    def stages(self) -> list[Stage]:
        """The hidden layers with their activations, and the output layer; one stage with a skip."""
        *hidden, output = self.maps
        stages: list[Stage] = [*map(Activated, hidden, self.activations), output]
        return stages if self.skip is None else [WithSkip(stages, self.skip)]

    def velocity_and_divergence(self, x: Rows) -> tuple[Rows, Values]:
        """Return the value, and the trace of the Jacobian.

        Where each row has its own weights, or gate of the output layer, the trace is the sum over
        the standard basis.
        """
        *hidden, output = self.maps
        if output.gate is not None or any(affine.weight.ndim > 2 for affine in self.maps):
            basis = standard_basis(x)
            velocity, tangents = linearised(self.stages, x)
            return velocity, (basis * applied(tangents, basis)).sum(-1).sum(0)
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and x.ndim == 2 and len(x) > max(_BLOCK_ROWS, 8 * x.shape[-1]):
            return self._in_blocks(x)
        slopes, start = [], x
        for affine, activation in zip(hidden, self.activations, strict=True):
            x, slope = activation.value_and_slope(affine.value(x))
            slopes.append(slope if affine.gate is None else slope * affine.gate)
        velocity = output.value(x)
        trace = jacobian_trace([affine.weight for affine in self.maps], slopes)
        if self.skip is None:
            return velocity, trace
        return torch.addcmul(velocity, self.skip, start), trace + self.skip.sum(-1)

    def _in_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = math.ceil(len(x) / max(_BLOCK_ROWS, 8 * x.shape[-1]))
        edges = [len(x) * i // blocks for i in range(blocks + 1)]
        found = []
        for rows in itertools.starmap(slice, itertools.pairwise(edges)):
            skip = None if self.skip is None else of_rows(self.skip, rows)
            own = self._replace(maps=[affine.rows(rows) for affine in self.maps], skip=skip)
            found.append(own.velocity_and_divergence(x[rows]))
        velocities, divergences = zip(*found, strict=True)
        return torch.cat(velocities), torch.cat(divergences)


def jacobian_trace(weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> Values:
    """Return the trace of the Jacobian of a perceptron at each row.

    Args:
        weights: Weights of the hidden layers and of the output layer, each ``(out, in)``.
        slopes: Slopes of the activations, each ``(*batch, out)``.
    """
    if len(slopes) == 1:
        first, last = weights
        return slopes[0] @ (first * last.T).sum(-1)
    if len(slopes) == 2:
        first, second, last = weights
        return (slopes[0] @ (second.T * (first @ last)) * slopes[1]).sum(-1)
    first, second, *between, before, last = weights  # a sum over features
    meetings = slopes[0].new_zeros(())
    for entry, exit_ in zip(first.unbind(-1), last.unbind(), strict=True):
        tangents = slopes[0] @ (entry.unsqueeze(-1) * second.T)
        for slope, weight in zip(slopes[1:-2], between, strict=True):
            tangents = (slope * tangents) @ weight.T
        cotangents = slopes[-1] @ (exit_.unsqueeze(-1) * before)
        meetings = torch.addcmul(meetings, tangents, cotangents)
    return (slopes[-2] * meetings).sum(-1)
