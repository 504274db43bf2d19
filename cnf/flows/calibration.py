"""Calibration of a flow: the steps of its solves, chosen once from rows, for a stated accuracy."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from cnf.bases import Base, ProductBase, StandardNormal, UniformOnManifold
from cnf.ode import ODESolver, RightHandSide, State
from cnf.ode.calibration import calibrated
from cnf.ode.compiled_steps import FieldSteps
from cnf.transforms import Chain, ContinuousTransform, FactorOut, Permute, Squeeze
from cnf.transforms.continuous import map_continuous


@dataclass(frozen=True, kw_only=True)
class _CalibratingSolver(ODESolver):
    """Solver that chooses its times in its first solve."""

    goal: float
    """Accuracy to calibrate for, in nats."""
    found: list[ODESolver] = field(default_factory=list)
    """The solver with these times, once there is one."""

    def solve(
        self,
        rhs: RightHandSide,
        state: State,
        times: Tensor,
        *,
        way: tuple[float, float] = (0.0, 1.0),
        dependencies: Callable[[], Sequence[Tensor]] = tuple,
        controlled: int | None = None,
        programs: FieldSteps | None = None,
    ) -> State:
        """Calibrate, and solve with the times found."""
        if way != (1.0, 0.0):
            raise ValueError(
                "calibrate needs every ODE to be solved from data to base; one is solved the other "
                "way. Choose its solver by hand, with using(solver=...)."
            )

        def solve(solver: ODESolver, times: Tensor) -> State:
            return solver.solve(
                rhs, state, times, way=way, dependencies=dependencies, programs=programs
            )

        plain = ODESolver(
            method=self.method,
            steps=1,
            gradient=self.gradient,
            max_evaluations=self.max_evaluations,
        )
        self.found[:] = [calibrated(plain, self.goal, rhs, solve, times)]
        return solve(replace(self.found[0], accuracy=None), times)


@torch.no_grad()
def calibrate(
    chain: Chain, x: Tensor, context: Tensor | None, accuracy: float, generator: Generator | None
) -> None:
    """Choose the times of each continuous transform in a chain, nested ones too.

    Raises:
        ValueError: If an ODE is not solved from data to base.
        ODEError: If the accuracy is out of reach.
    """
    solvers: dict[ContinuousTransform, _CalibratingSolver] = {}

    def listening(part: ContinuousTransform) -> ContinuousTransform:
        solvers[part] = _CalibratingSolver(
            method="rk4",
            steps=1,
            goal=accuracy,
            gradient=part.solver.gradient,
            max_evaluations=part.solver.max_evaluations,
        )
        return part.using(solver=solvers[part])

    map_continuous(chain, listening).to_base_and_ladj(x, context, generator=generator)
    if not all(solver.found for solver in solvers.values()):
        raise ValueError(
            "calibrate needs every ODE to be solved from data to base; one is not. Choose its "
            "solver by hand, with using(solver=...)."
        )
    for part, solver in solvers.items():
        part.solver = solver.found[0]


def obstacle_to_calibration(chain: Chain, base: Base) -> str | None:
    """Return why the error of the end of an ODE is not the error of the log-density, or None."""
    parts = [part for part in base.modules() if isinstance(part, Base)]
    known = StandardNormal | UniformOnManifold | ProductBase
    if not all(isinstance(part, known) for part in parts):
        return (
            "calibrate estimates errors at a StandardNormal or UniformOnManifold base; got "
            f"{type(base).__name__}. Choose a solver by hand, with using(solver=...)."
        )
    ode = False
    for part in chain:
        if ode and not isinstance(part, ContinuousTransform | FactorOut | Permute | Squeeze):
            return (
                "calibrate takes the end of an ODE for a point of a standard normal base; behind "
                f"it there is {type(part).__name__}. Put it before the ODE, or choose solvers by "
                "hand, with using(solver=...)."
            )
        ode = ode or any(isinstance(inner, ContinuousTransform) for inner in part.modules())
    return None if ode else "flow must have a ContinuousTransform to calibrate; got none."


@functools.cache
def _defaults() -> dict[str, ODESolver]:
    """Return the default solvers, of this version and of the files of older ones, by gradient."""
    older = ODESolver(rtol=1e-5, atol=1e-5, error_norm="points_and_ladj", gradient="adjoint")
    return {solver.gradient: solver for solver in (ODESolver(), older)}


def has_solver_by_hand(chain: Chain) -> bool:
    """Return whether a solver is neither a default one nor from a calibration."""
    solvers = [part.solver for part in chain.modules() if isinstance(part, ContinuousTransform)]
    return any(is_by_hand(solver) for solver in solvers)


def is_by_hand(solver: ODESolver) -> bool:
    """Return whether a solver is neither a default one nor from a calibration."""
    return before_calibration(solver) not in _defaults().values()


def before_calibration(solver: ODESolver) -> ODESolver:
    """Return the default solver that a calibration replaced; another solver as it is."""
    return solver if solver.accuracy is None else _defaults().get(solver.gradient, ODESolver())
