r"""The arithmetic of an embedded Runge-Kutta method, for torchdiffeq's control of its steps.

A step from :math:`(t_0, y_0)` of size h has the stages

.. math:: k_i = f\Bigl(t_0 + \alpha_i h,\; y_0 + h \sum_{j < i} \beta_{ij} k_j\Bigr), \qquad
    y_1 = y_0 + h \sum_i c_i k_i

and an estimate :math:`h \sum_i e_i k_i` of its error. torchdiffeq keeps the stages of each number
side by side, so that every sum goes over a short last axis and every stage is written with gaps,
and makes dense output of every step. Here each stage is a tensor to itself, and dense output is
made only where a time lies within a step. Order, tableau, error ratio, first and next step sizes
are torchdiffeq's; the numbers are the same but for rounding.

Reference: Dormand and Prince (1980), A family of embedded Runge-Kutta formulae.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnf.vector_fields.jacobian.autograd import functions_are_transformed


class Tableau(NamedTuple):
    """Coefficients of an embedded method."""

    alpha: list[float]
    """Where in the step the stages after the first are."""
    beta: list[list[float]]
    """What each of them takes of the stages before it."""
    solution: list[float] | None
    """What the end takes of all stages; None if that is what the last stage has taken."""
    error: list[float]
    middle: list[float]
    """What the middle of the step takes, for dense output."""


def tableau(solver: Any) -> Tableau:
    """The tableau of one of torchdiffeq's adaptive solvers, in double precision."""
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
    """The state at `t1`, and all stages; differentiable in all tensors.

    Args:
        rhs: Takes a time and a state.
        y0: The state at `t0`.
        f0: Its rate there.
        t0: Time of the start.
        t1: Time of the end.
        method: The coefficients.
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
    """The size of a step as a number, which makes sums cheaper, unless derivatives ask for it."""
    if size.requires_grad or torch.compiler.is_compiling() or functions_are_transformed():
        return size
    return float(size)


def moved(
    y0: Tensor, size: Tensor | float, weights: Sequence[float], stages: Sequence[Tensor]
) -> Tensor:
    """`y0` moved by `size` times a weighted sum of stages, not all of whose weights are zero."""
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
