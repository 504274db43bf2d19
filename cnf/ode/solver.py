"""Solver of ordinary differential equations, with the methods of torchdiffeq."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

_ROUNDING = 1e-4
"""Part of a step that is due to rounding."""

Gradient = Literal["adjoint", "backprop", "checkpoint"]
ErrorNorm = Literal["largest", "points_and_ladj", "points"]


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
        'backprop'
    """

    method: str = "dopri5"
    """Any method of torchdiffeq; `methods()` lists them. Its Adams methods are of high order, and
    stable for small steps only: check them against another method."""
    rtol: float = 1e-3
    """Relative tolerance of every part of the state, ladj included; for adaptive methods."""
    atol: float = 1e-3
    """Absolute tolerance of every part of the state; for adaptive methods."""
    error_norm: ErrorNorm = "largest"
    """Error that sets the steps of an adaptive method: the "largest" of any number in any row, so
    that each keeps the tolerance; or a root mean square over all rows, of "points_and_ladj" apart
    or of the "points" alone, for fewer steps where a few rows may be less precise."""
    first_step: float | None = None
    """First step of an adaptive method, in units of time, reduced if too large; None to choose it
    by one more evaluation, which gives a tiny step for a zero field."""
    steps: int | None = None
    """Number of equal steps of a fixed-step method."""
    times: Sequence[float] | None = None
    """Starts and ends of the uneven steps of a fixed-step method, from 0 to 1: shares of the way
    from base to data, or of the time of another solve. In place of `steps`."""
    accuracy: float | None = None
    """Accuracy of a log-density, in nats, for a solver with `times`: a row gets steps of half the
    size until it is reached. None for `times` as they are. `Flow.calibrate` chooses both."""
    gain: float = 1.0
    """How much smaller the error of a row is than its change from steps of twice the size, for
    `accuracy`. `Flow.calibrate` measures it."""
    gradient: Gradient = "backprop"
    """Method of gradients. "backprop" differentiates the steps, exactly and the fastest, with
    memory for every step; "checkpoint" does the same but recomputes one step at a time, with memory
    for the graph of one step; the "adjoint" solves a second ODE backwards, with constant memory and
    an error of its own, which needs a tighter tolerance, such as 1e-5."""
    max_evaluations: int = 10_000
    """Largest number of evaluations of a solve, and of a backward pass; more raise an `ODEError`,
    before the solve if they are known to be needed."""

    def __post_init__(self) -> None:
        kinds = methods()
        check_choice("method", self.method, kinds)
        for name in ("rtol", "atol", "first_step", "accuracy"):
            value = getattr(self, name)
            if value is not None or name in ("rtol", "atol"):
                number = check_number(name, value, "positive and finite", is_positive)
                object.__setattr__(self, name, number)
        check_choice("gradient", self.gradient, get_args(Gradient))
        check_choice("error_norm", self.error_norm, get_args(ErrorNorm))
        budget = check_count("max_evaluations", self.max_evaluations)
        object.__setattr__(self, "max_evaluations", budget)
        gain = check_number("gain", self.gain, "at least 1 and finite", _is_gain)
        object.__setattr__(self, "gain", gain)
        self._check_kind(kinds[self.method])
        self._check_times()

    def _check_times(self) -> None:
        if self.times is not None and is_multistep(self.method):
            raise ValueError(
                f"method {self.method!r} is for equal steps; give steps= in place of times=, or "
                "use 'rk4'."
            )
        if self.accuracy is not None and (self.method != "rk4" or len(self.times or ()) % 2 == 0):
            raise ValueError(
                "accuracy is for method='rk4' with times of an even number of steps, as "
                f"flow.calibrate(x) finds them; got method={self.method!r} and times={self.times}. "
                "Leave accuracy out, or give such times."
            )

    def _check_kind(self, kind: str) -> None:
        if kind == "fixed":
            if (self.steps is None) == (self.times is None):
                raise ValueError(
                    f"method {self.method!r} takes fixed steps; give steps= or times=."
                )
            if self.steps is not None:
                object.__setattr__(self, "steps", check_count("steps", self.steps))
            if self.times is not None:
                object.__setattr__(self, "times", _checked_times(self.times))
        elif self.steps is not None or self.times is not None:
            name = "steps" if self.times is None else "times"
            raise ValueError(
                f"method {self.method!r} chooses its own steps; got {name}={getattr(self, name)}. "
                f"Leave {name} out, or choose a fixed-step method such as 'rk4'."
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

    @property
    def is_adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return self.steps is None and self.times is None

    @property
    def evaluations(self) -> int | None:
        """Evaluations of a solve with fixed steps; None for other methods."""
        if self.is_adaptive:
            return None
        return (self.steps or len(self.times or ()) - 1) * evaluations_per_step(self.method)

    def coarser(self) -> "ODESolver":
        """Return the solver with every second of its `times` and the last, without `accuracy`.

        Raises:
            ValueError: If it has no `times`.
        """
        if self.times is None:
            raise ValueError("a solver without times has no coarser ones; give times=.")
        return replace(self, times=(*self.times[:-1:2], self.times[-1]), accuracy=None)

    def halved(self) -> "ODESolver":
        """Return the solver with steps of half the size.

        Raises:
            ValueError: If the method chooses its own steps.
        """
        if self.steps is not None:
            return replace(self, steps=2 * self.steps)
        if self.times is None:
            raise ValueError(
                f"method {self.method!r} chooses its own steps; tighten rtol and atol."
            )
        middles = ((start + end) / 2 for start, end in itertools.pairwise(self.times))
        pairs = zip(self.times, middles, strict=False)
        return replace(self, times=(*itertools.chain.from_iterable(pairs), 1.0))

    def solve(
        self,
        rhs: RightHandSide,
        state: State,
        times: Float[Tensor, " times"],
        *,
        way: tuple[float, float] = (0.0, 1.0),
        dependencies: Callable[[], Sequence[Tensor]] = tuple,
        controlled: int | None = None,
        programs: FieldSteps | None = None,
    ) -> State:
        """Solve dstate/dt = rhs(t, state) through the given times.

        Args:
            rhs: Function of a 0-dim time and the state that returns the derivative of each tensor.
            state: State at ``times[0]``: tensors, the first with rows ``(*batch, features)``.
            times: At least two times, strictly increasing or decreasing.
            way: Shares of the way from base to data at the first and the last time, for a solver
                with `times`.
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
        dtypes = [part.dtype for part in state]
        if kind == "fixed":
            rhs, state = _summed_in_double(rhs, state)
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
        grid = partial(self._grid, times=times, way=way)
        arguments = self._arguments(monitor, grid)
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
                    solution = self._solve_hidden(monitor, state, times, grid)
                elif programs is not None and programs.is_active_for(self.method):
                    solution = programs.solve(
                        self.method,
                        state,
                        grid(times),
                        times,
                        dtype=dtypes[0],
                        budget=self.max_evaluations,
                        fallback=solve,
                    )
                else:
                    solution = solve()
        solution = tuple(part.to(dtype) for part, dtype in zip(solution, dtypes, strict=True))
        monitor.check_end(solution, times)
        return solution

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
        if monitor.kind == "fixed" and times[-1] < times[0]:
            # torchdiffeq solves with negated times, and does not negate them here.
            grid = arguments["options"]["grid_constructor"]
            backwards["grid_constructor"] = lambda rhs, state, t: -grid(rhs, state, -t)
        solution = odeint_adjoint(
            monitor, state, times, **arguments, adjoint_options=backwards, adjoint_params=parameters
        )
        return monitor.backward_once(solution)

    def _solve_hidden(
        self, monitor: SolveMonitor, state: State, times: Tensor, grid: Callable[[Tensor], Tensor]
    ) -> State:
        """Solve on a fixed grid, without torchdiffeq's branches on numbers and in-place writes."""
        step = one_step(self.method, monitor, like=state[0])
        seen = [state]
        for start, end in itertools.pairwise(times):
            for t0, t1 in itertools.pairwise(grid(torch.stack([start, end]))):
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
        own = self.steps or len(self.times or ()) - 1
        steps = max(own, spans)
        needed = steps * evaluations_per_step(self.method)
        if needed > self.max_evaluations:
            raise ODEError(
                f"the solve with {self.method} needs at least {needed} evaluations, for {steps} "
                f"steps, more than max_evaluations={self.max_evaluations}; take fewer steps or "
                "times, or raise max_evaluations."
            )

    def _arguments(self, monitor: SolveMonitor, grid: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the other arguments of torchdiffeq."""
        norm = _largest if self.error_norm == "largest" else _largest_rms
        options: dict[str, Any] = {"norm": partial(norm, monitor.controlled)}
        if monitor.kind == "adaptive":
            # Dense output is as accurate as the steps with dopri5 only, and checkpoint recomputes
            # only steps.
            options["everywhere"] = self.method != "dopri5" or self.gradient == "checkpoint"
            options["on_trial"] = monitor.keep_errors
            options["first_step"] = self.first_step
        elif monitor.kind == "fixed":
            options["grid_constructor"] = lambda _f, _y, t: grid(t)
        return {"method": self.method, "rtol": self.rtol, "atol": self.atol, "options": options}

    def _grid(self, stops: Tensor, *, times: Tensor, way: tuple[float, float]) -> Tensor:
        """Return a grid through all `stops`, some of the `times` of a solve, along its way."""
        pieces = [stops[:1]]
        for start, end in itertools.pairwise(stops):
            # Hidden times are only two.
            first, last = (0.0, 1.0) if is_hidden(times) else _shares(times, start, end)
            rounding = 8 * torch.finfo(stops.dtype).eps * _magnitude(times)
            inner = stops.new_tensor(self._inner_steps(first, last, way, rounding))
            pieces.append(torch.cat([start + (end - start) * inner, end[None]]))
        return torch.cat(pieces)

    def _inner_steps(
        self, start: float, end: float, way: tuple[float, float], rounding: float
    ) -> list[float]:
        """Return the ends of steps between two shares of a solve, as shares of their distance.

        Times within `rounding` of the two are left out.
        """
        if self.times is None:
            assert self.steps is not None  # noqa: S101 - for mypy: checked when self was made
            count = max(1, math.ceil(self.steps * abs(end - start) - _ROUNDING))
            return [step / count for step in range(1, count)]
        first, last = (way[0] + share * (way[1] - way[0]) for share in (start, end))
        low, high = min(first, last) + rounding, max(first, last) - rounding
        between = (time for time in self.times if low < time < high)
        return sorted((time - first) / (last - first) for time in between)


def _is_gain(number: float) -> bool:
    return 1 <= number < math.inf


def _checked_times(times: Sequence[float]) -> tuple[float, ...]:
    """Refuse anything but increasing numbers from 0 to 1; return Python floats."""
    if isinstance(times, str) or not isinstance(times, Sequence):
        remedy = " Try times.tolist()." if hasattr(times, "tolist") else ""
        raise TypeError(f"times must be numbers from 0 to 1; got {type(times).__name__}.{remedy}")
    numbers = tuple(
        check_number("each of times", time, "from 0 to 1", lambda number: 0 <= number <= 1)
        for time in times
    )
    increasing = all(start < end for start, end in itertools.pairwise(numbers))
    if not increasing or numbers[:1] != (0.0,) or numbers[-1:] != (1.0,):
        raise ValueError(f"times must increase from 0 to 1; got {numbers}.")
    return numbers


def _magnitude(times: Tensor) -> float:
    """Return the size of the times in their span, by which rounding errors of shares are larger."""
    if is_hidden(times):
        return 1.0
    span = float((times[-1] - times[0]).detach().abs())
    return max(1.0, float(times.detach().abs().max()) / span)


def _shares(times: Tensor, start: Tensor, end: Tensor) -> tuple[float, float]:
    """Return how far along the times of a solve two of its stops are, from 0 to 1."""
    first, span = times[0].detach(), (times[-1] - times[0]).detach()
    return float((start.detach() - first) / span), float((end.detach() - first) / span)


def _without_rows(state: State, times: Tensor, dependencies: Sequence[Tensor]) -> State:
    """Return a state without rows at each time, with the graph of a state with rows."""
    nothing = sum(tensor.sum() for tensor in (times, *dependencies)) * 0
    return tuple(part.expand(len(times), *part.shape) + nothing for part in state)


def _summed_in_double(rhs: RightHandSide, state: State) -> tuple[RightHandSide, State]:
    """Return the same right-hand side for a state of float64, so that steps add up unrounded.

    Without it each step rounds the state, a flow to a narrow density magnifies this, and finer
    steps make it worse: on a trained table log-densities were off by 2e-3 nats in float32.
    """
    if state[0].device.type == "mps":  # it has no float64
        return rhs, state
    dtypes = [part.dtype for part in state]

    def in_its_dtypes(t: Tensor, state: State) -> State:
        parts = tuple(part.to(dtype) for part, dtype in zip(state, dtypes, strict=True))
        return rhs(t.to(dtypes[0]), parts)

    return in_its_dtypes, tuple(part.double() for part in state)


@torch.no_grad()
def _largest(count: int | None, parts: State) -> Tensor:
    """Norm of a state for torchdiffeq: the largest of its numbers.

    It has no graph, so step sizes are constants in backprop.
    """
    return torch.stack([part.abs().max() for part in parts[:count]]).max()


@torch.no_grad()
def _largest_rms(count: int | None, parts: State) -> Tensor:
    """Norm of a state for torchdiffeq: the largest root mean square of its tensors."""
    return torch.stack([part.square().mean().sqrt() for part in parts[:count]]).max()
