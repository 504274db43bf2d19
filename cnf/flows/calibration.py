"""Calibration of a flow: the steps of its solves, chosen once from rows, for a stated accuracy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from cnf.ode import ODESolver, RightHandSide, State
from cnf.ode.calibration import calibrated
from cnf.ode.compiled_steps import FieldSteps
from cnf.transforms import Chain, ContinuousTransform
from cnf.transforms.continuous import map_continuous


@dataclass(frozen=True, kw_only=True)
class CalibratingSolver(ODESolver):
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
        plain = ODESolver(
            method=self.method,
            steps=1,
            gradient=self.gradient,
            max_evaluations=self.max_evaluations,
        )

        def solve(solver: ODESolver, times: Tensor) -> State:
            return solver.solve(
                rhs, state, times, way=(1.0, 0.0), dependencies=dependencies, programs=programs
            )

        self.found[:] = [calibrated(plain, self.goal, rhs, solve, times)]
        fine = replace(self.found[0], accuracy=None)
        return fine.solve(rhs, state, times, way=way, dependencies=dependencies, programs=programs)


@torch.no_grad()
def calibrate(
    chain: Chain, x: Tensor, context: Tensor | None, accuracy: float, generator: Generator | None
) -> None:
    """Choose the times of each continuous transform in a chain, nested ones too."""
    solvers: dict[ContinuousTransform, CalibratingSolver] = {}

    def listening(part: ContinuousTransform) -> ContinuousTransform:
        solvers[part] = CalibratingSolver(
            method="rk4",
            steps=1,
            goal=accuracy,
            gradient=part.solver.gradient,
            max_evaluations=part.solver.max_evaluations,
        )
        return part.using(solver=solvers[part])

    map_continuous(chain, listening).to_base_and_ladj(x, context, generator=generator)
    for part, solver in solvers.items():
        part.solver = solver.found[0]
