"""Monitoring of a solve: its evaluation budget, and explanations of failures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from cnf._checks import all_finite, holds, non_finite_rows
from cnf._row_names import name_rows

State = tuple[Tensor, ...]
RightHandSide = Callable[[Tensor, State], State]


class ODEError(RuntimeError):
    """A solve failed: the message says when, after how many evaluations, for which rows and why."""


@dataclass(eq=False)
class SolveMonitor:
    """Monitored right-hand side of an ODE."""

    rhs: RightHandSide
    """Takes a 0-dim time and the state, returns the derivative of each of its tensors."""
    dependencies: Callable[[], Sequence[Tensor]]
    """Returns every other tensor that `rhs` depends on."""
    _: KW_ONLY
    method: str
    """Name of the method, for messages."""
    kind: str
    """Kind of the method: "adaptive", "fixed" or "external"."""
    gradient: str
    """Gradient method: "adjoint", "backprop" or "checkpoint"."""
    budget: int
    """Largest number of evaluations, forward and again in each backward pass."""
    controlled: int | None = None
    """Number of leading tensors of the state that control the steps; None for all."""
    evaluations: int = 0
    in_backward: bool = False
    first: State | None = None
    last: State | None = None
    bad_gradient: Tensor | None = None
    errors: Tensor | None = None
    """Squared error of each number in the last step, in units of the error norm of all."""
    all_errors: Tensor | None = None
    """The sum of `errors` over all steps, because each costs the same number of evaluations."""

    def __call__(self, t: Tensor, state: State) -> State:
        """Return the rates at a time; raise an `ODEError` beyond the budget."""
        if self.evaluations >= self.budget:
            raise self.error(t, f"spent its budget of max_evaluations={self.budget}")
        self.evaluations += 1
        if self.in_backward:
            state = _MonitoredGradient.apply(self, t, *state)  # type: ignore[no-untyped-call]
        # Autocast lowers the dtype of the rates.
        rates = tuple(
            rate.to(part.dtype) for rate, part in zip(self.rhs(t, state), state, strict=True)
        )
        self.last = tuple(part.detach() for part in (*state, *rates))
        self.first = self.last if self.first is None else self.first
        return rates

    def backward_once(self, solution: State) -> State:
        """Return the solution, with a monitored backward pass that evaluates the field again."""
        seen = [(tensor, _version(tensor)) for tensor in self.dependencies()]

        def begin() -> None:
            now = self.dependencies()
            if len(now) != len(seen) or any(
                tensor is not then or _version(tensor) != version
                for tensor, (then, version) in zip(now, seen, strict=True)
            ):
                raise RuntimeError(
                    "the parameters, buffers or context of the vector field were replaced or "
                    "changed between a solve and its backward pass (torch.func.functional_call "
                    f"does so), which needs them again with gradient={self.gradient!r}; use "
                    "gradient='backprop'."
                )
            self.in_backward = True
            self.evaluations = 0
            self.first = self.last = self.bad_gradient = self.errors = self.all_errors = None

        monitored: State = _BackwardPass.apply(  # type: ignore[no-untyped-call]
            self.gradient, begin, *solution
        )
        return monitored

    def keep_errors(self, errors: Tensor, norm: Tensor) -> None:
        """Keep the errors of an attempted step, which set the size of the next one.

        Args:
            errors: Error of each number of the solver's state, in units of the tolerance.
            norm: Error norm of all of them.
        """
        if not holds(norm.isfinite() & (norm > 0)):
            errors = errors.nan_to_num(nan=math.inf)
            norm = errors.abs().max()
            if norm.isinf():
                errors, norm = errors.isinf().to(errors), torch.ones_like(norm)
        self.errors = (errors / norm.clamp(min=torch.finfo(norm.dtype).tiny)).square()
        self.all_errors = self.errors if self.all_errors is None else self.all_errors + self.errors

    def error_at_start(self, state: State) -> ODEError:
        """Return an error for an initial state that is not finite."""
        bad = _bad_rows(tuple(part.detach() for part in state))
        return ODEError(
            f"the solve with {self.method} starts from NaN or inf in {name_rows(bad)}: the "
            "transforms before it overflow the dtype. Standardise the data, or use float64."
        )

    def check_end(self, solution: State, times: Tensor) -> None:
        """Refuse a solution that stopped early or is not finite."""
        if len(solution[0]) != len(times):
            raise self.error(times[-1], "stopped early")
        if not all_finite(solution):
            raise self.error(times[-1], "reached NaN or inf")

    def check_gradient(self, t: Tensor, gradient: Tensor) -> None:
        """Refuse a gradient that is not finite, unless a smaller step may avoid it."""
        if all_finite((gradient,)):
            return
        self.bad_gradient = non_finite_rows(gradient)
        if self.kind == "adaptive" and self.gradient == "adjoint":
            return  # the step is rejected, and a smaller one may succeed
        raise self.error(t, "reached a gradient of NaN or inf")

    def error(self, t: Tensor, what: str) -> ODEError:
        """Return an error with the time, the number of evaluations, the rows and the reason."""
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
        # The first evaluation first: one bad row in it makes the first step NaN, and so every row.
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
        """Name the rows that limit the step size, as far as known."""
        errors = self.all_errors if self.evaluations >= self.budget else self.errors
        if errors is None:  # no step has ended, or the method has no error estimate
            return "it is not known which rows limit the steps"
        shares = self._shares_of_rows(errors)
        largest = shares >= 0.5 * shares.max()
        return (
            f"{float(shares[largest].sum()):.0%} of the error that sets the steps is in "
            f"{name_rows(largest)}"
        )

    def _shares_of_rows(self, errors: Tensor) -> Tensor:
        """Return the share of each row in the squared errors that control the steps."""
        assert self.last is not None  # noqa: S101 - for mypy: `_diagnosis` sees to it
        state = self.last[: len(self.last) // 2]
        sizes = [part.numel() for part in state]
        rows = state[0].shape[:-1]
        # The state of the adjoint: a time, the state, its gradients, and parameters' gradients.
        copies = errors[1:].split(sum(sizes))[:2] if self.in_backward else (errors,)
        found = [
            part.reshape(*rows, -1).sum(-1) / part.numel()
            for copy in copies
            for part in copy.split(sizes)[: self.controlled]
        ]
        shares = torch.stack(found).sum(0)
        return shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)


class SteppingMonitor(SolveMonitor):
    """`SolveMonitor` that torchdiffeq calls before each step, forward and backward."""

    def callback_step(self, t: Tensor, state: Any, dt: Tensor) -> None:
        """Refuse a step that does not advance the time, or starts from NaN or inf."""
        if holds(~(t.abs() + dt.abs() > t.abs())):
            # torchdiffeq takes a step of 0 if the computed size is not finite.
            too_small = "needs steps too small for the time to advance"
            raise self.error(t, "reached NaN or inf" if dt == 0 else too_small)
        if not all_finite(state):
            raise self.error(t, "reached NaN or inf")

    callback_step_adjoint = callback_step


class _BackwardPass(torch.autograd.Function):
    """Identity whose backward calls `begin`, and refuses to be differentiated."""

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
    """Identity on the state whose backward passes its gradient to the monitor."""

    @staticmethod
    def forward(ctx: Any, monitor: SolveMonitor, t: Tensor, *state: Tensor) -> State:
        ctx.monitor, ctx.t = monitor, t.detach()
        return tuple(part.view_as(part) for part in state)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.monitor.check_gradient(ctx.t, gradients[0])
        return None, None, *gradients


def _bad_rows(evaluation: State) -> Tensor:
    """Return the mask of the rows in which a state or its rate is not finite."""
    rows = evaluation[0].shape[:-1]
    return non_finite_rows(torch.cat([part.reshape(*rows, -1) for part in evaluation], -1))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
