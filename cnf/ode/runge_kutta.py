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

from cnf.vector_fields.handwritten import only_autograd_looks_on


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
    if size.requires_grad or not only_autograd_looks_on(size):
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


class LeanSteps:
    """An adaptive solver of torchdiffeq, as a base class before it, with lean arithmetic.

    Args:
        everywhere: Whether a step ends at each of the times; else at the last, beyond which the
            field must not be evaluated.
        on_trial: Told of each step that is tried: the errors of all numbers, in units of the
            tolerance, and whether the step is rejected.
        options: What torchdiffeq's solvers take.
    """

    func: Any
    y0: Tensor
    rk_state: Any
    rtol: Tensor
    atol: Tensor
    safety: Tensor
    ifactor: Tensor
    dfactor: Tensor
    order: int
    norm: Callable[[Tensor], Tensor]

    def __init__(self, *, everywhere: bool, on_trial: Callable[..., None], **options: Any) -> None:
        super().__init__(**options)
        self.everywhere = everywhere
        self.on_trial = on_trial
        self.method = tableau(type(self))

    def _before_integrate(self, t: Tensor) -> None:
        super()._before_integrate(t)  # type: ignore[misc]
        self.rk_state = self.rk_state._replace(dt=_without_derivatives(self.rk_state.dt))
        self.stops = t[1:] if self.everywhere else t[-1:]

    def _advance(self, next_t: Tensor) -> Tensor:
        """The state at a time, with as many steps as it takes."""
        from torchdiffeq._impl.interp import _interp_evaluate, _interp_fit

        while next_t > self.rk_state.t1:
            self.rk_state = self._adaptive_step(self.rk_state)
        y1, _, t0, t1, _, (y0, stages) = self.rk_state
        if next_t == t1:
            ended: Tensor = y1
            return ended
        size = (t1 - t0).to(y0)
        y_mid = moved(y0, size, self.method.middle, stages)
        curve = _interp_fit(y0, y1, y_mid, stages[0], stages[-1], size)
        within: Tensor = _interp_evaluate(curve, t0, t1, next_t)
        return within

    def _adaptive_step(self, state: Any) -> Any:
        """Try one step: where the next one starts, and its size."""
        from torchdiffeq._impl.misc import _optimal_step_size

        y0, f0, _, t0, size, _ = state
        if not size.isfinite():
            size = torch.zeros_like(size)  # which the callback refuses
        self.func.callback_step(t0, y0, size)
        t1 = t0 + size
        stop = self.stops[torch.searchsorted(self.stops.detach(), t0.detach(), right=True)]
        if t1 >= stop:
            t1, size = stop, stop - t0
        # `func` itself adds nothing but a pass over the state, to see its dtype.
        y1, stages = take_step(self.func.base_func, y0, f0, t0, t1, self.method)
        with torch.no_grad():
            error = moved(torch.zeros_like(y0), constant(size.detach()), self.method.error, stages)
            errors = error / (self.atol + self.rtol * torch.max(y0.abs(), y1.abs()))
            ratio = self.norm(errors).abs()
            limits = (self.safety, self.ifactor, self.dfactor)
            next_size = _optimal_step_size(size.detach(), ratio, *limits, self.order)
            next_size = _without_derivatives(next_size)
        rejected = not ratio <= 1
        self.on_trial(errors, rejected=rejected)
        if rejected:
            self.func.callback_reject_step(t0, y0, size)
            return state._replace(dt=next_size)
        self.func.callback_accept_step(t0, y0, size)
        return type(state)(y1, stages[-1], t0, t1, next_size, (y0, stages))


def _without_derivatives(size: Tensor) -> Tensor:
    """A size chosen for a step: a constant, to forward-mode differentiation too."""
    return torch.full((), float(size), dtype=size.dtype, device=size.device)
