"""Methods of the installed torchdiffeq, and single steps of its one-step methods.

This is the only module that imports torchdiffeq.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnf.ode.checkpointing import Step
from cnf.ode.monitor import RightHandSide, State
from cnf.ode.runge_kutta import Tableau, constant, moved, tableau, take_step


@functools.cache
def methods() -> dict[str, str]:
    """Return the methods of the installed torchdiffeq: name -> "adaptive", "fixed" or "external".

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


@functools.cache
def solvers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return torchdiffeq's `odeint` and `odeint_adjoint`, with `LeanSteps` in adaptive methods.

    torchdiffeq looks a method up in a global table, which other code shares. These are functions of
    second copies of its two modules, with a table of their own.
    """
    theirs = "torchdiffeq._impl"
    first, second = (_copy_of(f"{theirs}.{name}") for name in ("odeint", "adjoint"))
    kinds = methods()
    first.SOLVERS = second.SOLVERS = {
        name: type(name, (LeanSteps, solver), {"method": tableau(solver)})
        if kinds[name] == "adaptive"
        else solver
        for name, solver in first.SOLVERS.items()
    }
    second.odeint = first.odeint
    return first.odeint, second.odeint_adjoint


class LeanSteps:
    """Mixin of torchdiffeq's adaptive solvers, with the cheaper arithmetic of `runge_kutta`.

    Args:
        everywhere: Whether a step ends at each of the times; else at the last, beyond which the
            field must not be evaluated.
        on_trial: Called for each attempted step, with the errors of all numbers, in units of the
            tolerance, and their norm.
        options: Options of torchdiffeq's solvers.
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
    method: Tableau

    def __init__(self, *, everywhere: bool, on_trial: Callable[..., None], **options: Any) -> None:
        super().__init__(**options)
        self.everywhere = everywhere
        self.on_trial = on_trial

    def _before_integrate(self, t: Tensor) -> None:
        super()._before_integrate(t)  # type: ignore[misc]
        self.rk_state = self.rk_state._replace(dt=_without_derivatives(self.rk_state.dt))
        self.stops = t[1:] if self.everywhere else t[-1:]

    def _advance(self, next_t: Tensor) -> Tensor:
        """Return the state at a time, after as many steps as necessary."""
        from torchdiffeq._impl.interp import _interp_evaluate, _interp_fit

        while next_t > self.rk_state.t1:
            self.rk_state = self._adaptive_step(self.rk_state)
        y1, _, t0, t1, _, (y0, stages) = self.rk_state
        if next_t == t1:
            end: Tensor = y1
            return end
        size = (t1 - t0).to(y0)
        y_mid = moved(y0, size, self.method.middle, stages)
        curve = _interp_fit(y0, y1, y_mid, stages[0], stages[-1], size)
        inside: Tensor = _interp_evaluate(curve, t0, t1, next_t)
        return inside

    def _adaptive_step(self, state: Any) -> Any:
        """Try one step; return the start and the size of the next one."""
        from torchdiffeq._impl.misc import _optimal_step_size

        y0, f0, _, t0, size, _ = state
        if not size.isfinite():
            size = torch.zeros_like(size)  # the callback refuses it
        self.func.callback_step(t0, y0, size)
        t1 = t0 + size
        stop = self.stops[torch.searchsorted(self.stops.detach(), t0.detach(), right=True)]
        if t1 >= stop:
            t1, size = stop, stop - t0
        # Not `func` itself, which only adds a pass over the state for its dtype.
        y1, stages = take_step(self.func.base_func, y0, f0, t0, t1, self.method)
        with torch.no_grad():
            error = moved(torch.zeros_like(y0), constant(size.detach()), self.method.error, stages)
            errors = error / (self.atol + self.rtol * torch.max(y0.abs(), y1.abs()))
            ratio = self.norm(errors).abs()
            limits = (self.safety, self.ifactor, self.dfactor)
            next_size = _optimal_step_size(size.detach(), ratio, *limits, self.order)
            next_size = _without_derivatives(next_size)
        self.on_trial(errors, ratio)
        if not ratio <= 1:
            self.func.callback_reject_step(t0, y0, size)
            return state._replace(dt=next_size)
        self.func.callback_accept_step(t0, y0, size)
        return type(state)(y1, stages[-1], t0, t1, next_size, (y0, stages))


def _without_derivatives(size: Tensor) -> Tensor:
    """Return a step size as a constant, for forward-mode differentiation too."""
    return torch.full((), float(size), dtype=size.dtype, device=size.device)


def _copy_of(name: str) -> Any:
    """Load a second copy of a module, outside of `sys.modules`."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018 - for mypy
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_multistep(method: str) -> bool:
    """Return whether the method is a multistep method."""
    from torchdiffeq._impl.fixed_adams import AdamsBashforthMoulton
    from torchdiffeq._impl.odeint import SOLVERS

    return issubclass(SOLVERS[method], AdamsBashforthMoulton)


@functools.cache
def evaluations_per_step(method: str) -> int:
    """Return the evaluations of a step after the first; for a multistep method the least number."""
    from torchdiffeq._impl.odeint import SOLVERS

    if methods()[method] == "adaptive":
        return len(tableau(SOLVERS[method]).alpha)
    if methods()[method] == "external" or is_multistep(method):
        return 1
    calls = []

    def rhs(t: Tensor, state: State) -> State:
        calls.append(t)
        return state

    nowhere = torch.zeros(1)
    one_step(method, rhs, like=nowhere)(torch.tensor(0.0), torch.tensor(1.0), (nowhere,), ())
    return len(calls)


def one_step(method: str, rhs: RightHandSide, *, like: Tensor) -> Step:
    """Return a function for one step of a one-step method, with the arithmetic of torchdiffeq.

    `like` is a tensor with the dtype and device of the state.
    """
    if methods()[method] == "adaptive":
        return _embedded_step(method, rhs, like)
    return _fixed_step(method, rhs)


def _fixed_step(method: str, rhs: RightHandSide) -> Step:
    from torchdiffeq._impl.odeint import SOLVERS

    def step(t0: Tensor, t1: Tensor, state: State, rates: State) -> tuple[State, State]:
        def flat_rhs(t: Tensor, flat: Tensor, **_: object) -> Tensor:
            return _flattened(rhs(t.to(flat), _unflattened(flat, state)))

        flat = _flattened(state)
        solver = SOLVERS[method](func=flat_rhs, y0=flat, rtol=0.0, atol=0.0)
        change, _ = solver._step_func(flat_rhs, t0, t1 - t0, t1, flat)
        return _unflattened(flat + change, state), rates

    return step


def _embedded_step(method: str, rhs: RightHandSide, like: Tensor) -> Step:
    """Return an embedded step; it carries over its last stage as first stage of the next step."""
    from torchdiffeq._impl.odeint import SOLVERS

    coefficients = tableau(SOLVERS[method])

    def step(t0: Tensor, t1: Tensor, state: State, rates: State) -> tuple[State, State]:
        def flat_rhs(t: Tensor, flat: Tensor) -> Tensor:
            return _flattened(rhs(t, _unflattened(flat, state)))

        first = _flattened(rates or rhs(t0.to(like), state))
        end, stages = take_step(flat_rhs, _flattened(state), first, t0, t1, coefficients)
        return _unflattened(end, state), _unflattened(stages[-1], state)

    return step


def _flattened(parts: State) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _unflattened(flat: Tensor, like: State) -> State:
    pieces = flat.split([part.numel() for part in like])
    return tuple(piece.view_as(part) for piece, part in zip(pieces, like, strict=True))
