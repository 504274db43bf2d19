"""The methods of the installed torchdiffeq, and one step of those that need no earlier ones.

This, `cnf.ode` and `cnf.ode.runge_kutta` are the only modules that talk to torchdiffeq.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnf.ode.checkpointing import Step
from cnf.ode.monitor import RightHandSide, State
from cnf.ode.runge_kutta import LeanSteps, tableau, take_step


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


@functools.cache
def solvers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Torchdiffeq's `odeint` and `odeint_adjoint`, whose adaptive methods take our `LeanSteps`.

    torchdiffeq takes a method by its name in a table of its own, which is others' too. These are
    functions of second copies of its two modules, so that the table of the copies is ours.
    """
    theirs = "torchdiffeq._impl"
    first, second = (_copy_of(f"{theirs}.{name}") for name in ("odeint", "adjoint"))
    kinds = methods()
    first.SOLVERS = second.SOLVERS = {
        name: type(name, (LeanSteps, solver), {}) if kinds[name] == "adaptive" else solver
        for name, solver in first.SOLVERS.items()
    }
    second.odeint = first.odeint
    return first.odeint, second.odeint_adjoint


def _copy_of(name: str) -> Any:
    """A module that is loaded anew, and is not where others find theirs."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018 - for mypy
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_multistep(method: str) -> bool:
    """Whether a step of the method depends on those before it."""
    from torchdiffeq._impl.fixed_adams import AdamsBashforthMoulton
    from torchdiffeq._impl.odeint import SOLVERS

    return issubclass(SOLVERS[method], AdamsBashforthMoulton)


@functools.cache
def evaluations_per_step(method: str) -> int:
    """How many evaluations a step takes after the first; of a multistep method, at the least."""
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
    """A step of a method, of given size, with the arithmetic of torchdiffeq.

    Args:
        method: A method that is "fixed" and no multistep method, or "adaptive".
        rhs: The right-hand side.
        like: A tensor of the dtype and device of the state.
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
    """Carries over its last stage, which is the first of the next step."""
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
