"""How an ordinary differential equation is solved; the only module that talks to torchdiffeq."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_count, name_rows, non_finite_rows

State = tuple[Tensor, ...]
RightHandSide = Callable[[Tensor, State], State]

_GRADIENTS = ("adjoint", "backprop")


class ODEError(RuntimeError):
    """A solve failed: the message says when, after how many evaluations, for which rows and why."""


@dataclass(frozen=True, kw_only=True)
class ODESolver:
    """How the ODE is solved: settings that can be shared, compared and saved.

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
    """Any method name of the installed torchdiffeq; `methods()` lists them. Its Adams methods are
    of high order and stable for small steps only: check them against another."""
    rtol: float = 1e-5
    """Relative tolerance of every part of the state, ladj included; for adaptive methods."""
    atol: float = 1e-5
    """Absolute tolerance, likewise."""
    steps: int | None = None
    """Number of equal steps; for fixed-step methods, which need it, only."""
    gradient: Literal["adjoint", "backprop"] = "adjoint"
    """"adjoint" solves a second ODE backwards: memory does not grow with the evaluations, and the
    gradient has an error of the order of the tolerance. "backprop" differentiates the steps taken:
    exact for them and faster, with memory for every evaluation."""
    max_evaluations: int = 10_000
    """Budget of one solve, its backward pass included; spending it raises an `ODEError`."""

    def __post_init__(self) -> None:
        kinds = methods()
        if self.method not in kinds:
            raise ValueError(f"method must be one of {', '.join(kinds)}; got {self.method!r}.")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {value}.")
        if self.gradient not in _GRADIENTS:
            raise ValueError(f"gradient must be one of {_GRADIENTS}; got {self.gradient!r}.")
        check_count("max_evaluations", self.max_evaluations)
        self._check_kind(kinds[self.method])

    def _check_kind(self, kind: str) -> None:
        if kind == "fixed":
            if self.steps is None:
                raise ValueError(f"method {self.method!r} takes fixed steps; give steps=.")
            check_count("steps", self.steps)
        elif self.steps is not None:
            raise ValueError(
                f"method {self.method!r} chooses its own steps; got steps={self.steps}. "
                "Leave steps out, or choose a fixed-step method such as 'rk4'."
            )
        if kind == "external" and self.gradient == "backprop":
            raise ValueError(
                f"method {self.method!r} leaves torch, which backprop cannot follow; "
                "use gradient='adjoint'."
            )

    def solve(
        self,
        rhs: RightHandSide,
        state: State,
        times: Float[Tensor, " times"],
        *,
        parameters: Sequence[Tensor] = (),
    ) -> State:
        """Follow dstate/dt = rhs(t, state) through the given times.

        Args:
            rhs: Takes a 0-dim time and the state, returns the derivative of each of its tensors.
            state: The state at ``times[0]``: tensors; the first holds rows, ``(*batch, features)``.
            times: At least two times, strictly increasing or decreasing.
            parameters: Every tensor, other than the state and times, that `rhs` depends on and
                that may need a gradient. The adjoint gives none to a tensor not named here.

        Returns:
            The state at each time: tensors with a first axis of ``len(times)`` more.

        Raises:
            ODEError: If the solve fails.
        """
        from torchdiffeq import odeint, odeint_adjoint

        watch = _Watch(rhs, self)
        arguments: dict[str, Any] = {
            "method": self.method,
            "rtol": self.rtol,
            "atol": self.atol,
            "options": self._options(times, stops=times[1:]),
        }
        needs_gradient = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*state, times, *parameters)
        )
        if self.gradient == "adjoint" and needs_gradient:
            # torchdiffeq negates decreasing times, but not the options of the adjoint.
            sign = 1 if times[0] < times[-1] else -1
            options = self._options(times, stops=sign * times[:-1].flip(0))
            solution = odeint_adjoint(
                watch,
                state,
                times,
                **arguments,
                adjoint_options={**options, "norm": "seminorm"},
                adjoint_params=tuple(parameters),
            )
            solution = tuple(map(_FirstOrderOnly.apply, solution))
        else:
            # Where nothing needs a gradient, a field in reverse mode would leave a graph all the
            # same, because it differentiates with respect to x.
            with torch.set_grad_enabled(needs_gradient):
                solution = odeint(watch, state, times, **arguments)
        watch.check_end(solution, times)
        return tuple(solution)

    def _options(self, times: Tensor, stops: Tensor) -> dict[str, Any]:
        kind = methods()[self.method]
        if kind == "adaptive":
            # Land on each time: left alone, torchdiffeq steps past it and interpolates, which
            # costs accuracy and, at the end, evaluates the field outside [0, 1].
            return {"step_t": stops.detach()}
        if kind == "fixed":
            span = (times[-1] - times[0]).abs().detach()
            return {"grid_constructor": lambda _f, _y, t: self._grid(t, span)}
        return {}

    def _grid(self, times: Tensor, span: Tensor) -> Tensor:
        """Equal steps through `times`, as many as `steps` makes of `span`, that meet each time."""
        assert self.steps is not None  # noqa: S101 - for mypy: checked when self was made
        pieces = [times[:1]]
        for start, end in itertools.pairwise(times):
            share = float((end - start).abs().detach() / span)
            count = max(1, math.ceil(self.steps * share - 1e-4))
            fraction = torch.linspace(0, 1, count + 1, dtype=times.dtype, device=times.device)[1:]
            pieces.append(torch.cat([start + (end - start) * fraction[:-1], end[None]]))
        return torch.cat(pieces)


def methods() -> dict[str, str]:
    """The methods that the installed torchdiffeq offers: name -> "adaptive", "fixed" or "external".

    Example:
        >>> methods()["dopri5"]
        'adaptive'
    """
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
    from torchdiffeq._impl.solvers import FixedGridODESolver

    def kind(solver: type) -> str:
        if issubclass(solver, RKAdaptiveStepsizeODESolver):
            return "adaptive"
        return "fixed" if issubclass(solver, FixedGridODESolver) else "external"

    return {name: kind(solver) for name, solver in SOLVERS.items()}


class _FirstOrderOnly(torch.autograd.Function):
    """Identity that refuses a second derivative: torchdiffeq's adjoint would lose it silently."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the adjoint gives first derivatives only, and create_graph=True asks for more; "
                "use ODESolver(gradient='backprop')."
            )
        return gradient


class _Watch:
    """The right-hand side, watched: keeps to the budget and explains a failure.

    The callbacks run at the start of each step, forward and in the adjoint's backward pass, and
    so before torchdiffeq asserts or goes on with NaN.
    """

    def __init__(self, rhs: RightHandSide, solver: ODESolver) -> None:
        self.rhs = rhs
        self.solver = solver
        self.evaluations = 0
        self.first: State | None = None
        self.last: State | None = None
        if methods()[solver.method] != "external":
            self.callback_step = self.callback_step_adjoint = self._before_step

    def __call__(self, t: Tensor, state: State) -> State:
        if self.evaluations >= self.solver.max_evaluations:
            budget = f"max_evaluations={self.solver.max_evaluations}"
            raise self.error(t, f"spent its budget of {budget}")
        self.evaluations += 1
        rates = self.rhs(t, state)
        self.last = tuple(part.detach() for part in (*state, *rates))
        self.first = self.last if self.first is None else self.first
        return rates

    def _before_step(self, t: Tensor, state: Any, dt: Tensor) -> None:
        if not t.abs() + dt.abs() > t.abs():
            # torchdiffeq takes a step of 0 where the size that it computes is not finite.
            too_small = "needs steps too small for the time to advance"
            raise self.error(t, "reached NaN or inf" if dt == 0 else too_small)
        if not all(part.isfinite().all() for part in state):
            raise self.error(t, "reached NaN or inf")

    def check_end(self, solution: State, times: Tensor) -> None:
        if len(solution[0]) != len(times):
            raise self.error(times[-1], "stopped early")
        if not all(part.isfinite().all() for part in solution):
            raise self.error(times[-1], "reached NaN or inf")

    def error(self, t: Tensor, what: str) -> ODEError:
        time = abs(float(t.detach()))  # torchdiffeq negates decreasing times
        return ODEError(
            f"the solve with {self.solver.method} {what}, at t = {time:.6g} after "
            f"{self.evaluations} evaluations; {self._diagnosis()}"
        )

    def _diagnosis(self) -> str:
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
        velocity = self.last[len(self.last) // 2]
        speed = velocity.abs().amax(-1)
        fastest = speed >= 0.5 * speed.max()
        return (
            f"the velocity is largest, {float(speed.max()):.3g}, in {name_rows(fastest)}. The "
            "field may be stiff: loosen rtol and atol, raise max_evaluations, use float64, or "
            "take a fixed-step method; in training, lower the learning rate or regularise."
        )


def _bad_rows(evaluation: State) -> Tensor:
    """Mask of the rows in which a state or its rate, as the watch keeps them, is not finite."""
    rows = evaluation[0].shape[:-1]
    return non_finite_rows(torch.cat([part.reshape(*rows, -1) for part in evaluation], -1))
