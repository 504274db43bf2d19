"""Monitors a solve from the inside: keeps to its budget and explains how it failed."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnf._checks import all_finite, holds, non_finite_rows
from cnf._row_names import name_rows

State = tuple[Tensor, ...]
RightHandSide = Callable[[Tensor, State], State]


class ODEError(RuntimeError):
    """A solve failed: the message says when, after how many evaluations, for which rows and why."""


class SolveMonitor:
    """The right-hand side of an ODE, monitored.

    Args:
        rhs: Takes a 0-dim time and the state, returns the derivative of each of its tensors.
        dependencies: Returns every other tensor that `rhs` depends on.
        method: Name of the method, for messages.
        kind: "adaptive", "fixed" or "external".
        gradient: "adjoint", "backprop" or "checkpoint".
        budget: Largest number of evaluations, forward and again in each backward pass.
        controlled: How many tensors of the state, from the first, choose the steps; None for all.
    """

    def __init__(
        self,
        rhs: RightHandSide,
        dependencies: Callable[[], Sequence[Tensor]],
        *,
        method: str,
        kind: str,
        gradient: str,
        budget: int,
        controlled: int | None = None,
    ) -> None:
        self.rhs = rhs
        self.dependencies = dependencies
        self.method = method
        self.kind = kind
        self.gradient = gradient
        self.budget = budget
        self.controlled = controlled
        self.evaluations = 0
        self.in_backward = False
        self.first: State | None = None
        self.last: State | None = None
        self.bad_gradient: Tensor | None = None
        self.errors: Tensor | None = None
        self.has_rejected = False

    def __call__(self, t: Tensor, state: State) -> State:
        """The rates at a time, if there is budget left for an evaluation."""
        if self.evaluations >= self.budget:
            raise self.error(t, f"spent its budget of max_evaluations={self.budget}")
        self.evaluations += 1
        if self.in_backward:
            state = _MonitoredGradient.apply(self, t, *state)  # type: ignore[no-untyped-call]
        # Under autocast a network returns what is coarser than the state of the ODE may be.
        rates = tuple(
            rate.to(part.dtype) for rate, part in zip(self.rhs(t, state), state, strict=True)
        )
        self.last = tuple(part.detach() for part in (*state, *rates))
        self.first = self.last if self.first is None else self.first
        return rates

    def backward_once(self, solution: State) -> State:
        """The solution of a solve whose backward pass evaluates anew, with a monitor over each."""
        seen = [(tensor, _version(tensor)) for tensor in self.dependencies()]

        def begin() -> None:
            now = self.dependencies()
            if len(now) != len(seen) or any(
                tensor is not then or _version(tensor) != version
                for tensor, (then, version) in zip(now, seen, strict=True)
            ):
                raise RuntimeError(
                    "the parameters, buffers or context of the vector field were exchanged or "
                    "changed between a solve and its backward pass (torch.func.functional_call "
                    f"does so), where gradient={self.gradient!r} needs them again; use "
                    "gradient='backprop'."
                )
            self.in_backward = True
            self.evaluations = 0
            self.first = self.last = self.bad_gradient = self.errors = None
            self.has_rejected = False

        monitored: State = _BackwardPass.apply(  # type: ignore[no-untyped-call]
            self.gradient, begin, *solution
        )
        return monitored

    def keep_errors(self, errors: Tensor, *, rejected: bool) -> None:
        """Keep the errors of the last step that was rejected; before there is one, of the last.

        Args:
            errors: Of each number of the solver's state, in units of the tolerance.
            rejected: Whether they were too large.
        """
        if rejected or not self.has_rejected:
            self.errors = errors
            self.has_rejected = rejected

    def check_start(self, state: State) -> None:
        """Refuse a state that is not finite before anything is made of it."""
        if not all_finite(state):
            bad = _bad_rows(tuple(part.detach() for part in state))
            raise ODEError(
                f"the solve with {self.method} starts from NaN or inf in {name_rows(bad)}: what "
                "stands before it has left the range of the dtype. Standardise the data, or use "
                "float64."
            )

    def check_end(self, solution: State, times: Tensor) -> None:
        """Refuse a solution that stopped early or is not finite."""
        if len(solution[0]) != len(times):
            raise self.error(times[-1], "stopped early")
        if not all_finite(solution):
            raise self.error(times[-1], "reached NaN or inf")

    def check_gradient(self, t: Tensor, gradient: Tensor) -> None:
        """Refuse a gradient that is not finite, unless a smaller step may do."""
        if all_finite((gradient,)):
            return
        self.bad_gradient = non_finite_rows(gradient)
        if self.kind == "adaptive" and self.gradient == "adjoint":
            return  # the step is rejected, and a smaller one may do
        raise self.error(t, "reached a gradient of NaN or inf")

    def error(self, t: Tensor, what: str) -> ODEError:
        """An error that says when, after how many evaluations, in which rows and why."""
        name = "the backward solve" if self.in_backward else "the solve"
        return ODEError(
            f"{name} with {self.method} {what}, at t = {abs(float(t.detach())):.6g} after "
            f"{self.evaluations} evaluations; {self._diagnosis()}"
        )

    def _diagnosis(self) -> str:
        if self.bad_gradient is not None:
            return (
                f"the gradient of the field is not finite in {name_rows(self.bad_gradient)}: look "
                "for a square root, norm, logarithm or quotient without a floor."
            )
        if self.first is None or self.last is None:
            return "the vector field was not evaluated."
        # The first is asked first: bad in one row, it makes the first step NaN, and so every row.
        bad = _bad_rows(self.first)
        if not bad.any():
            bad = _bad_rows(self.last)
        if bad.any():
            return (
                f"the state, velocity or divergence is not finite in {name_rows(bad)}. The field "
                "may be undefined there or grow without bound: bound its output, standardise the "
                "data, or lower the learning rate."
            )
        if self.kind == "fixed":
            return "take fewer steps, or raise max_evaluations."
        return (
            f"{self._slowest()}. The field may be stiff, rough or random: loosen rtol and atol, "
            "raise max_evaluations, use float64, or take a fixed-step method; in training, lower "
            "the learning rate or regularise."
        )

    def _slowest(self) -> str:
        """Which rows force the steps, as far as it is known."""
        assert self.last is not None  # noqa: S101 - for mypy: `_diagnosis` sees to it
        state = self.last[: len(self.last) // 2]
        if self.errors is None:  # before the first step, or the method tells no errors
            speed = self.last[len(state)].abs().amax(-1)
            return (
                f"the velocity is largest, {float(speed.max()):.3g}, in "
                f"{name_rows(speed >= 0.5 * speed.max())}"
            )
        error = self._error_of_rows(self.errors.nan_to_num(nan=math.inf, posinf=math.inf), state)
        return (
            f"the error of a step is largest, {float(error.max()):.3g} times the tolerance, in "
            f"{name_rows(error >= 0.5 * error.max())}"
        )

    def _error_of_rows(self, errors: Tensor, state: State) -> Tensor:
        """The largest error in each row of what chooses the steps."""
        sizes = [part.numel() for part in state]
        rows = state[0].shape[:-1]
        # The state of the adjoint is a time, our state, its gradients, and those of parameters.
        copies = errors[1:].split(sum(sizes))[:2] if self.in_backward else (errors,)
        found = [
            part.abs().reshape(*rows, -1).amax(-1)
            for copy in copies
            for part in copy.split(sizes)[: self.controlled]
        ]
        return torch.stack(found).amax(0)


class SteppingMonitor(SolveMonitor):
    """A `SolveMonitor` that torchdiffeq calls before each step, forward and backward."""

    def callback_step(self, t: Tensor, state: Any, dt: Tensor) -> None:
        """Refuse a step that does not advance the time, or starts from NaN or inf."""
        if holds(~(t.abs() + dt.abs() > t.abs())):
            # torchdiffeq takes a step of 0 where the size that it computes is not finite.
            too_small = "needs steps too small for the time to advance"
            raise self.error(t, "reached NaN or inf" if dt == 0 else too_small)
        if not all_finite(state):
            raise self.error(t, "reached NaN or inf")

    callback_step_adjoint = callback_step


class _BackwardPass(torch.autograd.Function):
    """Identity whose backward announces a backward pass, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: str, begin: Callable[[], None], *solution: Tensor) -> State:
        ctx.gradient, ctx.begin = gradient, begin
        return tuple(part.view_as(part) for part in solution)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"gradient={ctx.gradient!r} gives first derivatives only, and create_graph=True "
                "asks for more; use ODESolver(gradient='backprop')."
            )
        ctx.begin()
        return None, None, *gradients


class _MonitoredGradient(torch.autograd.Function):
    """Identity on the state whose backward shows its gradient to the monitor."""

    @staticmethod
    def forward(ctx: Any, monitor: SolveMonitor, t: Tensor, *state: Tensor) -> State:
        ctx.monitor, ctx.t = monitor, t.detach()
        return tuple(part.view_as(part) for part in state)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.monitor.check_gradient(ctx.t, gradients[0])
        return None, None, *gradients


def _bad_rows(evaluation: State) -> Tensor:
    """Mask of the rows in which a state or its rate, as the monitor keeps them, is not finite."""
    rows = evaluation[0].shape[:-1]
    return non_finite_rows(torch.cat([part.reshape(*rows, -1) for part in evaluation], -1))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
