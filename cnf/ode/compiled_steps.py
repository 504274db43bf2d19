r"""Compiled fixed steps: one program for each step of a compiled vector field.

An explicit Runge-Kutta method goes from :math:`s` at :math:`t_0` to :math:`s'` at :math:`t_1 = t_0
+ h` by slopes :math:`k_i` at stages in between,

.. math:: k_i = f\Big(t_0 + h \sum_j a_{ij}, \; s + h \sum_j a_{ij} k_j\Big), \qquad
    s' = s + h \sum_i b_i k_i

The program of a step contains all its evaluations and their combination, for points and ladj. A
loop runs it once for each step: the compile time grows with the stages, but not with the steps. The
methods and the grid are torchdiffeq's, and so are the numbers up to rounding.

Steps are compiled if the field is compiled, computes its divergence without reverse mode, and has
no torch hooks but counts of its evaluations. Not compiled, and solved evaluation by evaluation, are
adaptive and Adams methods; the adjoint and checkpoint, with gradients on; regularizers; divergences
other than `Exact` and `Hutchinson`; and solves within `torch.func`. A solve that fails or would
spend its budget is repeated so, for its error message.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from cnf._warnings import warn
from cnf.ode.monitor import State
from cnf.vector_fields.compiled import Compilation, reason

if TYPE_CHECKING:
    from cnf.vector_fields.base import VectorField

_STAGES: dict[str, tuple[tuple[float, ...], ...]] = {
    "euler": ((1,),),
    "midpoint": ((1 / 2,), (0, 1)),
    "heun2": ((1,), (1 / 2, 1 / 2)),
    "heun3": ((1 / 3,), (0, 2 / 3), (1 / 4, 0, 3 / 4)),
    "rk4": ((1 / 3,), (-1 / 3, 1), (1, -1, 1), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
"""For each method, the weights of the slopes so far for each next stage, and for the end."""

Rates = Callable[..., State]
"""Takes a field, a time, points and further inputs; returns the rate of each part of the state.
The points are the first part; the other parts are no inputs."""


@dataclass(frozen=True)
class FieldSteps:
    """Fixed steps along a compiled field, each as one program.

    Args:
        field: The field.
        rates: The rates of the state; a global function, because its program is kept.
        inputs: Its further inputs.
    """

    field: "VectorField"
    rates: Rates
    inputs: tuple[Any, ...]

    def is_active_for(self, method: str) -> bool:
        """Return whether steps of the method run as programs in the present context."""
        return (
            method in _STAGES
            and not self._compilation.steps_failed
            and self._compilation.is_active()
            and self.field.has_programs
            and self.field.is_only_counted
        )

    def solve(
        self,
        method: str,
        state: State,
        grid: Tensor,
        times: Tensor,
        *,
        dtype: torch.dtype,
        budget: int,
        fallback: Callable[[], State],
    ) -> State:
        """Return the state at each of `times`.

        Args:
            method: A method for which `is_active_for` is true.
            state: The state at the first time.
            grid: Starts and ends of steps, which include `times`.
            times: The times.
            dtype: Dtype of the points that the field takes.
            budget: Largest number of evaluations.
            fallback: The same solve without these programs, with the error messages.
        """
        stages = len(_STAGES[method]) * (len(grid) - 1)
        if stages > budget or not _advances(grid.detach()):
            return fallback()
        try:
            solution = self._follow(method, state, grid, set(times.tolist()), dtype)
        except Exception as error:
            solution = fallback()  # which raises if the inputs are at fault
            self._do_without(error)
            return solution
        if not all(bool(part.isfinite().all()) for part in solution):
            return fallback()
        for _ in range(stages):
            self.field._count_evaluation(grid[0], state[0], None)
        return solution

    @property
    def _compilation(self) -> Compilation:
        return cast("Compilation", self.field.compilation)

    def _follow(
        self, method: str, state: State, grid: Tensor, times: set[float], dtype: torch.dtype
    ) -> State:
        key = type(self.field), self.rates, method
        step = self._compilation.step(key, lambda: _step(self.rates, _STAGES[method]))
        seen = [state]
        here = _uniform(state)
        # Copies, because a program depends on the base tensors of views, too.
        marks = [t.clone() for t in grid.to(dtype)]
        for (start, end), time in zip(pairwise(marks), grid.tolist()[1:], strict=True):
            moved = step(self.field, start, end, here, self.inputs)
            # A CUDA graph overwrites its last result.
            here = tuple(part.clone() for part in moved)
            if time in times:
                seen.append(here)
        return tuple(map(torch.stack, zip(*seen, strict=True)))

    def _do_without(self, error: Exception) -> None:
        self._compilation.steps_failed = True
        if not self._compilation.failed:  # which has given a warning
            warn(
                f"torch.compile failed on a whole step ({reason(error)}). The flow goes on "
                "with programs of single evaluations: the same numbers, more slowly."
            )


def _step(rates: Rates, stages: tuple[tuple[float, ...], ...]) -> Callable[..., State]:
    def step(
        field: "VectorField", start: Tensor, end: Tensor, state: State, inputs: tuple[Any, ...]
    ) -> State:
        size = end - start
        t, here = start, state
        slopes: list[State] = []
        for weights in stages:
            found = rates(field, t, here[0].to(t.dtype), *inputs)
            slopes.append(tuple(map(torch.Tensor.type_as, found, state)))  # autocast lowers dtypes
            t = start + sum(weights) * size
            here = tuple(
                part + size * _weighted(weights, slope)
                for part, *slope in zip(state, *slopes, strict=True)
            )
        return here

    return step


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return sum(terms[1:], terms[0])


def _uniform(state: State) -> State:
    """Copy the state to the form after a step: no view, and gradients for all parts or none."""
    copies = tuple(part.clone() for part in state)
    return tuple(part.requires_grad_() for part in copies) if torch.is_grad_enabled() else copies


def _advances(grid: Tensor) -> bool:
    """Return whether the time advances in each step, as in `SteppingMonitor`."""
    starts = grid[:-1].abs()
    return bool((starts + grid.diff().abs() > starts).all())
