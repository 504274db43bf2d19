"""Solver of ordinary differential equations, with the methods of torchdiffeq."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._checks import (
    all_finite,
    check_choice,
    check_count,
    check_number,
    functions_are_transformed,
    is_exporting,
    is_hidden,
    is_positive,
)
from cnf._memory import check_fits
from cnf.ode.checkpointing import RecordingMonitor, solve_by_steps
from cnf.ode.compiled_steps import FieldSteps
from cnf.ode.monitor import ODEError, RightHandSide, SolveMonitor, State, SteppingMonitor
from cnf.ode.torchdiffeq_door import evaluations_per_step, is_multistep, methods, one_step, solvers

__all__ = ["ErrorNorm", "Gradient", "ODEError", "ODESolver", "RightHandSide", "State", "methods"]

_MONITORS: dict[str, type[SolveMonitor]] = {
    "external": SolveMonitor,
    "checkpoint": RecordingMonitor,
}
"""Special monitors, by the kind of method, else by the gradient."""

Gradient = Literal["adjoint", "backprop", "checkpoint"]
ErrorNorm = Literal["points_and_ladj", "points"]


@dataclass(frozen=True, kw_only=True)
class ODESolver:
    """Settings of the ODE solver.

    Raises:
        TypeError: If `steps` or `max_evaluations` is not an int.
        ValueError: If a setting is out of range or two of them do not fit together.

    References:
        Chen et al. (2018), Neural Ordinary Differential Equations, for the adjoint.
        https://arxiv.org/abs/1806.07366
        Kidger et al. (2021), "Hey, that's not an ODE", for its seminorm.
        https://arxiv.org/abs/2009.09457

    Example:
        >>> ODESolver(method="rk4", steps=20).gradient
        'adjoint'
    """

    method: str = "dopri5"
    """Any method of torchdiffeq; `methods()` lists them. Its Adams methods are of high order, and
    stable for small steps only: check them against another method."""
    rtol: float = 1e-5
    """Relative tolerance of every part of the state, ladj included; for adaptive methods."""
    atol: float = 1e-5
    """Absolute tolerance of every part of the state; for adaptive methods."""
    error_norm: ErrorNorm = "points_and_ladj"
    """Error that sets the steps of an adaptive method: of the points and the ladj, or of the points
    alone, if the ladj may be less precise."""
    first_step: float | None = None
    """First step of an adaptive method, in units of time, reduced if too large; None to choose it
    by one more evaluation, which gives a tiny step for a zero field."""
    steps: int | None = None
    """Number of equal steps of a fixed-step method."""
    gradient: Gradient = "adjoint"
    """Method of gradients. The "adjoint" solves a second ODE backwards, with constant memory and an
    error of the order of the tolerance; "backprop" differentiates the steps, exactly and faster,
    with memory for every step; "checkpoint" does the same but recomputes one step at a time, with
    memory for the graph of one step."""
    max_evaluations: int = 10_000
    """Largest number of evaluations of a solve, and of a backward pass; more raise an `ODEError`,
    before the solve if they are known to be needed."""

    def __post_init__(self) -> None:
        kinds = methods()
        check_choice("method", self.method, kinds)
        for name in ("rtol", "atol", "first_step"):
            value = getattr(self, name)
            if value is not None or name != "first_step":
                number = check_number(name, value, "positive and finite", is_positive)
                object.__setattr__(self, name, number)
        check_choice("gradient", self.gradient, get_args(Gradient))
        check_choice("error_norm", self.error_norm, get_args(ErrorNorm))
        budget = check_count("max_evaluations", self.max_evaluations)
        object.__setattr__(self, "max_evaluations", budget)
        self._check_kind(kinds[self.method])

    def _check_kind(self, kind: str) -> None:
        if kind == "fixed":
            if self.steps is None:
                raise ValueError(f"method {self.method!r} takes fixed steps; give steps=.")
            object.__setattr__(self, "steps", check_count("steps", self.steps))
        elif self.steps is not None:
            raise ValueError(
                f"method {self.method!r} chooses its own steps; got steps={self.steps}. "
                "Leave steps out, or choose a fixed-step method such as 'rk4'."
            )
        if kind != "adaptive" and self.first_step is not None:
            raise ValueError(
                f"first_step is for adaptive methods such as 'dopri5', and {self.method!r} is "
                f"none; got {self.first_step}. Leave it out."
            )
        if kind == "external" and self.gradient != "adjoint":
            raise ValueError(
                f"method {self.method!r} leaves torch, which {self.gradient} cannot follow; "
                "use gradient='adjoint'."
            )
        if self.gradient == "checkpoint" and is_multistep(self.method):
            raise ValueError(
                f"method {self.method!r} remembers earlier steps, so that checkpoint cannot redo "
                "one alone; use gradient='adjoint' or 'backprop', or a method such as 'rk4'."
            )

    def solve(
        self,
        rhs: RightHandSide,
        state: State,
        times: Float[Tensor, " times"],
        *,
        dependencies: Callable[[], Sequence[Tensor]] = tuple,
        controlled: int | None = None,
        programs: FieldSteps | None = None,
    ) -> State:
        """Solve dstate/dt = rhs(t, state) through the given times.

        Args:
            rhs: Function of a 0-dim time and the state that returns the derivative of each tensor.
            state: State at ``times[0]``: tensors, the first with rows ``(*batch, features)``.
            times: At least two times, strictly increasing or decreasing.
            dependencies: Function that returns every other tensor that `rhs` depends on. The
                adjoint and checkpoint give no gradient to other tensors.
            controlled: Number of tensors of the state, from the first, in the error norm of an
                adaptive method; None for all. With ``error_norm="points"`` it is one.
            programs: Compiled steps of the same right-hand side.

        Returns:
            The state at each time, in tensors with ``len(times)`` as a new first axis. For a state
            without rows, `rhs` is not called.

        Raises:
            ValueError: If the tolerances are below the rounding of the dtype of the state, or the
                states at all times do not fit in memory.
            ODEError: If the solve fails.
        """
        kind = methods()[self.method]
        self._check(kind, state, times)
        if state[0].numel() == 0:
            return _without_rows(state, times, dependencies())
        unique = {id(tensor): tensor for tensor in dependencies() if tensor.requires_grad}
        parameters = tuple(unique.values())
        needs_gradient = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*state, times, *parameters)
        )
        gradient = self.gradient if needs_gradient else "backprop"
        hidden = False
        if functions_are_transformed() or is_exporting():
            hidden = any(map(is_hidden, (*state, times, *dependencies())))
            self._check_transformed(kind, gradient, times, hidden=hidden)
        monitor = _MONITORS.get(kind, _MONITORS.get(gradient, SteppingMonitor))(
            rhs,
            dependencies,
            method=self.method,
            kind=kind,
            gradient=gradient,
            budget=self.max_evaluations,
            controlled=1 if self.error_norm == "points" else controlled,
        )
        if not all_finite(state):
            raise monitor.error_at_start(state)
        arguments = self._arguments(monitor, times)
        solve = partial(solvers()[0], monitor, state, times, **arguments)
        if gradient == "adjoint":
            solution = self._by_adjoint(monitor, state, times, parameters, arguments)
        elif gradient == "checkpoint":
            assert isinstance(monitor, RecordingMonitor)  # noqa: S101 - by `_MONITORS`, for mypy
            step = one_step(self.method, monitor, like=state[0])
            solution = solve_by_steps(monitor, solve, step, state, times, parameters)
        else:
            # Even if nothing needs a gradient, a field in reverse mode would leave a graph, because
            # it differentiates with respect to x.
            with torch.set_grad_enabled(needs_gradient):
                if hidden:
                    solution = self._solve_hidden(monitor, state, times)
                elif programs is not None and programs.is_active_for(self.method):
                    grid = self._grid(times, (times[-1] - times[0]).abs().detach())
                    solution = programs.solve(
                        self.method, state, grid, times, budget=self.max_evaluations, fallback=solve
                    )
                else:
                    solution = solve()
        monitor.check_end(solution, times)
        return tuple(solution)

    def _by_adjoint(
        self,
        monitor: SolveMonitor,
        state: State,
        times: Tensor,
        parameters: Sequence[Tensor],
        arguments: dict[str, Any],
    ) -> State:
        _, odeint_adjoint = solvers()
        backwards = {**arguments["options"], "norm": "seminorm"}
        if monitor.kind == "adaptive":
            backwards["everywhere"] = True
        solution = odeint_adjoint(
            monitor, state, times, **arguments, adjoint_options=backwards, adjoint_params=parameters
        )
        return monitor.backward_once(solution)

    def _solve_hidden(self, monitor: SolveMonitor, state: State, times: Tensor) -> State:
        """Solve on a fixed grid, without torchdiffeq's branches on numbers and in-place writes."""
        step = one_step(self.method, monitor, like=state[0])
        span = (times[-1] - times[0]).abs().detach()
        seen = [state]
        for start, end in itertools.pairwise(times):
            for t0, t1 in itertools.pairwise(self._grid(torch.stack([start, end]), span)):
                state, _ = step(t0, t1, state, ())
            seen.append(state)
        return tuple(map(torch.stack, zip(*seen, strict=True)))

    def _check_transformed(
        self, kind: str, gradient: Gradient, times: Tensor, *, hidden: bool
    ) -> None:
        """Refuse settings that torch.func and torch.export do not support."""
        remedy = "use ODESolver(method='rk4', steps=..., gradient='backprop')."
        if gradient != "backprop" and (hidden or functions_are_transformed()):
            raise ODEError(
                f"gradient={gradient!r} uses backward passes of its own, which torch.func "
                f"(grad, jacrev, jvp, vmap, ...) and torch.export do not support; {remedy}"
            )
        if hidden and (kind != "fixed" or is_multistep(self.method)):
            raise ODEError(
                f"method {self.method!r} branches on numbers, which torch.vmap and torch.export "
                f"hide; {remedy}"
            )
        if len(times) > 2 and is_hidden(times):
            raise ODEError(
                "a trajectory at times that torch.vmap or torch.export hide has no grid."
            )

    def _check(self, kind: str, state: State, times: Tensor) -> None:
        """Refuse a solve known to need more precision, memory or evaluations than there is."""
        dtype, spans = state[0].dtype, len(times) - 1
        resolution = torch.finfo(dtype).eps
        if kind == "adaptive" and max(self.rtol, self.atol) < resolution:
            raise ValueError(
                f"rtol and atol must not both be below the rounding of {dtype}, {resolution:.1e}; "
                f"got {self.rtol} and {self.atol}. Loosen them, or use float64."
            )
        if state[0].numel() == 0:
            return
        if spans > 1:
            numbers = len(times) * sum(part.numel() for part in state)
            remedy = "Ask for fewer times, or fewer rows at once."
            check_fits("times", f"{len(times)} of them", numbers, like=state[0], remedy=remedy)
        # Only a fixed grid, and adaptive methods without dense output, step to each of the times.
        if kind == "external" or self.method == "dopri5" or (kind == "adaptive" and spans == 1):
            return
        steps = spans if self.steps is None else max(self.steps, spans)
        needed = steps * evaluations_per_step(self.method)
        if needed > self.max_evaluations:
            raise ODEError(
                f"the solve with {self.method} needs at least {needed} evaluations, for {steps} "
                f"steps, more than max_evaluations={self.max_evaluations}; take fewer steps or "
                "times, or raise max_evaluations."
            )

    def _arguments(self, monitor: SolveMonitor, times: Tensor) -> dict[str, Any]:
        """Return the other arguments of torchdiffeq."""
        options: dict[str, Any] = {"norm": partial(_largest_rms, monitor.controlled)}
        if monitor.kind == "adaptive":
            # Dense output is as accurate as the steps with dopri5 only, and checkpoint recomputes
            # only steps.
            options["everywhere"] = self.method != "dopri5" or self.gradient == "checkpoint"
            options["on_trial"] = monitor.keep_errors
            options["first_step"] = self.first_step
        elif monitor.kind == "fixed":
            span = (times[-1] - times[0]).abs().detach()
            options["grid_constructor"] = lambda _f, _y, t: self._grid(t, span)
        return {"method": self.method, "rtol": self.rtol, "atol": self.atol, "options": options}

    def _grid(self, times: Tensor, span: Tensor) -> Tensor:
        """Return a grid through all `times`, with about `steps` equal steps in `span`."""
        assert self.steps is not None  # noqa: S101 - for mypy: checked when self was made
        pieces = [times[:1]]
        for start, end in itertools.pairwise(times):
            # Hidden times are only two.
            share = 1.0 if is_hidden(times) else float((end - start).abs().detach() / span)
            count = max(1, math.ceil(self.steps * share - 1e-4))
            fraction = torch.linspace(0, 1, count + 1, dtype=times.dtype, device=times.device)[1:]
            pieces.append(torch.cat([start + (end - start) * fraction[:-1], end[None]]))
        return torch.cat(pieces)


def _without_rows(state: State, times: Tensor, dependencies: Sequence[Tensor]) -> State:
    """Return a state without rows at each time, with the graph of a state with rows."""
    nothing = sum(tensor.sum() for tensor in (times, *dependencies)) * 0
    return tuple(part.expand(len(times), *part.shape) + nothing for part in state)


@torch.no_grad()
def _largest_rms(count: int | None, parts: State) -> Tensor:
    """Norm of a state for torchdiffeq: the largest root mean square of its tensors.

    It has no graph, so step sizes are constants in backprop.
    """
    return torch.stack([part.square().mean().sqrt() for part in parts[:count]]).max()
