r"""Steps of embedded Runge-Kutta methods, under torchdiffeq's step-size control.

A step from :math:`(t_0, y_0)` of size h has the stages

.. math:: k_i = f\Bigl(t_0 + \alpha_i h,\; y_0 + h \sum_{j < i} \beta_{ij} k_j\Bigr), \qquad
    y_1 = y_0 + h \sum_i c_i k_i

and an estimate :math:`h \sum_i e_i k_i` of its error. torchdiffeq stores the stages of each number
side by side, so that every sum is over a short last axis and every stage is strided, and computes
dense output for every step. Here each stage is a tensor, and dense output is computed only if a
time lies inside a step. Order, tableau, error ratio, first and next step sizes are torchdiffeq's;
the numbers are the same up to rounding.

Reference: Dormand and Prince (1980), A family of embedded Runge-Kutta formulae.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnf._checks import functions_are_transformed


class Tableau(NamedTuple):
    """Coefficients of an embedded method."""

    alpha: list[float]
    """Positions of the stages after the first, in units of the step."""
    beta: list[list[float]]
    """Weights of the earlier stages, for each of these stages."""
    solution: list[float] | None
    """Weights of all stages for the end; None if the last stage is evaluated at the end."""
    error: list[float]
    """Weights of all stages for the error estimate."""
    middle: list[float]
    """Weights of all stages for the middle of the step, for dense output."""


def tableau(solver: Any) -> Tableau:
    """Return the tableau of one of torchdiffeq's adaptive solvers, in double precision."""
    alpha, beta, solution, error = solver.tableau
    reuses_last = solution[-1] == 0 and bool((solution[:-1] == beta[-1]).all())
    return Tableau(
        alpha.tolist(),
        [row.tolist() for row in beta],
        None if reuses_last else solution.tolist(),
        error.tolist(),
        solver.mid.tolist(),
    )


def take_step(
    rhs: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    f0: Tensor,
    t0: Tensor,
    t1: Tensor,
    method: Tableau,
) -> tuple[Tensor, list[Tensor]]:
    """Return the state at `t1`, and all stages; differentiable in all tensors.

    `y0` is the state at `t0` and `f0` its rate; `rhs` takes a time and a state.
    """
    start, end, size = t0.to(y0), t1.to(y0), (t1 - t0).to(y0)
    # Just before the end, in case the field jumps there.
    before_end = end + (torch.nextafter(end.detach(), start.detach()) - end.detach())
    stages, y1, factor = [f0], y0, constant(size)
    for alpha, beta in zip(method.alpha, method.beta, strict=True):
        y1 = moved(y0, factor, beta, stages)
        stages.append(rhs(before_end if alpha == 1 else start + alpha * size, y1))
    if method.solution is not None:
        y1 = moved(y0, factor, method.solution, stages)
    return y1, stages


def constant(size: Tensor) -> Tensor | float:
    """Return the size of a step as a number, for cheaper sums, unless it needs derivatives."""
    if size.requires_grad or torch.compiler.is_compiling() or functions_are_transformed():
        return size
    return float(size)


def moved(
    y0: Tensor, size: Tensor | float, weights: Sequence[float], stages: Sequence[Tensor]
) -> Tensor:
    """Add `size` times a weighted sum of stages to `y0`; not all weights may be zero."""
    pairs = [pair for pair in zip(weights, stages, strict=True) if pair[0] != 0]
    weight, stage = pairs[0]
    if isinstance(size, Tensor):
        total = stage * weight
        for weight, stage in pairs[1:]:
            total.add_(stage, alpha=weight)
        return torch.addcmul(y0, total, size)
    y1 = torch.add(y0, stage, alpha=weight * size)
    for weight, stage in pairs[1:]:
        y1.add_(stage, alpha=weight * size)
    return y1
