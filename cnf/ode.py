"""How an ordinary differential equation is solved; the only module that talks to torchdiffeq."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_count
from cnf._watch import ODEError, RightHandSide, State, SteppingWatch, Watch

__all__ = ["ODEError", "ODESolver", "RightHandSide", "State", "methods"]

_GRADIENTS = ("adjoint", "backprop")


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
    """How gradients are made. The "adjoint" solves a second ODE backwards, so that memory does not
    grow with the evaluations and the gradient has an error of the order of the tolerance;
    "backprop" differentiates the steps taken, exactly and faster, with memory for each of them."""
    max_evaluations: int = 10_000
    """Budget of a solve, and again of each backward pass by the adjoint; spending it raises an
    `ODEError`."""

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
        dependencies: Callable[[], Sequence[Tensor]] = tuple,
        controlled: int | None = None,
    ) -> State:
        """Follow dstate/dt = rhs(t, state) through the given times.

        Args:
            rhs: Takes a 0-dim time and the state, returns the derivative of each of its tensors.
            state: The state at ``times[0]``: tensors; the first holds rows, ``(*batch, features)``.
            times: At least two times, strictly increasing or decreasing.
            dependencies: Returns every other tensor that `rhs` depends on. The adjoint gives no
                gradient to a tensor not named here.
            controlled: How many tensors of the state, from the first, the error control of an
                adaptive method looks at; None for all.

        Returns:
            The state at each time, in tensors with a first axis of ``len(times)`` more. For a
            state without rows, `rhs` is not called.

        Raises:
            ValueError: If the tolerances are finer than the dtype of the state can tell.
            ODEError: If the solve fails.
        """
        from torchdiffeq import odeint, odeint_adjoint

        kind = methods()[self.method]
        self._check_precision(kind, state[0].dtype)
        if state[0].numel() == 0:
            return _nowhere(state, times, dependencies())
        watch = (Watch if kind == "external" else SteppingWatch)(
            rhs, dependencies, method=self.method, kind=kind, budget=self.max_evaluations
        )
        arguments: dict[str, Any] = {
            "method": self.method,
            "rtol": self.rtol,
            "atol": self.atol,
            "options": self._options(kind, times, times[1:]),
        }
        if controlled is not None:
            arguments["options"]["norm"] = lambda parts: _largest_rms(parts[:controlled])
        parameters = tuple(dependencies())
        needs_gradient = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*state, times, *parameters)
        )
        if self.gradient == "adjoint" and needs_gradient:
            # torchdiffeq negates decreasing times, but not the options of the adjoint.
            sign = 1 if times[0] < times[-1] else -1
            options = self._options(kind, times, sign * times[:-1].flip(0), backward=True)
            solution = odeint_adjoint(
                watch,
                state,
                times,
                **arguments,
                adjoint_options={**options, "norm": "seminorm"},
                adjoint_params=parameters,
            )
            solution = watch.backward_once(solution)
        else:
            # Where nothing needs a gradient, a field in reverse mode would leave a graph all the
            # same, because it differentiates with respect to x.
            with torch.set_grad_enabled(needs_gradient):
                solution = odeint(watch, state, times, **arguments)
        watch.check_end(solution, times)
        return tuple(solution)

    def _check_precision(self, kind: str, dtype: torch.dtype) -> None:
        resolution = torch.finfo(dtype).eps
        if kind == "adaptive" and max(self.rtol, self.atol) < resolution:
            raise ValueError(
                f"rtol and atol must not both be finer than {dtype} can tell, {resolution:.1e}; "
                f"got {self.rtol} and {self.atol}. Loosen them, or use float64."
            )

    def _options(
        self, kind: str, times: Tensor, stops: Tensor, *, backward: bool = False
    ) -> dict[str, Any]:
        if kind == "adaptive":
            # Land on the end: left alone, torchdiffeq steps past it, evaluates the field outside
            # [0, 1] and interpolates. Its interpolant is as accurate as the steps of dopri5 only.
            everywhere = backward or self.method != "dopri5"
            return {"step_t": (stops if everywhere else stops[-1:]).detach()}
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


def _nowhere(state: State, times: Tensor, dependencies: Sequence[Tensor]) -> State:
    """A state without rows at each time; its graph reaches what it does for other states."""
    nothing = sum(tensor.sum() for tensor in (times, *dependencies)) * 0
    return tuple(part.expand(len(times), *part.shape) + nothing for part in state)


def _largest_rms(parts: State) -> Tensor:
    """Norm of a state as torchdiffeq takes it: the largest root mean square of its tensors."""
    return torch.stack([part.square().mean().sqrt() for part in parts]).max()


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
