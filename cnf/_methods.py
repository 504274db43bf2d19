"""The methods of the installed torchdiffeq, and one step of those that need no earlier ones.

This and `cnf.ode` are the only modules that talk to torchdiffeq.
"""

import torch
from torch import Tensor

from cnf._steps import Step
from cnf._watch import RightHandSide, State


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


def is_multistep(method: str) -> bool:
    """Whether a step of the method depends on those before it."""
    from torchdiffeq._impl.fixed_adams import AdamsBashforthMoulton
    from torchdiffeq._impl.odeint import SOLVERS

    return issubclass(SOLVERS[method], AdamsBashforthMoulton)


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
    from torchdiffeq import odeint

    def step(t0: Tensor, t1: Tensor, state: State, rates: State) -> tuple[State, State]:
        ends = odeint(rhs, state, torch.stack([t0, t1]), method=method)
        return tuple(part[-1] for part in ends), rates

    return step


def _embedded_step(method: str, rhs: RightHandSide, like: Tensor) -> Step:
    """Carries over its last stage, which is the first of the next step."""
    from torchdiffeq._impl.misc import Perturb
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.rk_common import _runge_kutta_step

    tableau = SOLVERS[method](func=rhs, y0=like, rtol=0.0, atol=0.0, norm=None).tableau

    def step(t0: Tensor, t1: Tensor, state: State, rates: State) -> tuple[State, State]:
        def flat_rhs(t: Tensor, flat: Tensor, *, perturb: Perturb) -> Tensor:
            if perturb is Perturb.PREV:  # just before the end, as in a solve
                before = torch.nextafter(t.detach(), t0.detach().to(t))
                t = t + (before - t.detach())
            return _flattened(rhs(t, _unflattened(flat, state)))

        first = rates or rhs(t0.to(like), state)
        end, last, _, _ = _runge_kutta_step(
            flat_rhs, _flattened(state), _flattened(first), t0, t1 - t0, t1, tableau=tableau
        )
        return _unflattened(end, state), _unflattened(last, state)

    return step


def _flattened(parts: State) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _unflattened(flat: Tensor, like: State) -> State:
    pieces = flat.split([part.numel() for part in like])
    return tuple(piece.view_as(part) for piece, part in zip(pieces, like, strict=True))
