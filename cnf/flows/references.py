"""Reference solvers, by which the error of a flow's own solvers is measured.

A finer solve of the same kind may repeat an error. Adaptive steps jump over a short pulse of the
velocity at any tolerance, because the errors of the steps before it say nothing of it; and a field
that was trained on a fixed grid may be rough between the times of the grid.
"""

from dataclasses import replace

import torch

from cnf._checks import reference_tensor
from cnf.flows.flow import Flow
from cnf.ode import ODESolver
from cnf.transforms import ContinuousTransform

LARGEST_ERROR = 0.05
"""Largest error of a log-density, in nats, for a solver without a stated accuracy."""

_HALF = 53
"""Half of the least number of reference steps; a prime, so that few grids share their times."""
_ACCURACY = 0.01
"""Accuracy of the reference steps, in nats."""
_TIGHT = 1e-7
_ROUNDINGS = 8


def by_reference(flow: Flow, *, finer: bool = False) -> Flow:
    """Return the flow with reference solvers: of another kind than its own or, if asked, finer.

    For an adaptive solver they are a fixed grid, and a tenth of its tolerances; for a fixed grid an
    adaptive solver with tight tolerances, and a finer grid. The fixed grid has 106 equal steps, or
    more than twice as many as the solver itself, and shares no time with equal steps of the solver
    but the middle. In `log_prob`, rows that it does not settle to a hundredth of a nat get steps of
    half the size, and so on, until 10 000 evaluations.
    """
    resolution = torch.finfo(reference_tensor(flow).dtype).eps

    def with_reference(part: ContinuousTransform) -> ContinuousTransform:
        solver = part.solver
        if solver.is_adaptive:
            return part.using(solver=_tenth(solver, resolution) if finer else _grid(solver))
        return part.using(solver=_grid(solver) if finer else _tight(solver, resolution))

    return flow.map_continuous(with_reference)


def _tenth(solver: ODESolver, resolution: float) -> ODESolver:
    rtol, atol = (max(value / 10, resolution) for value in (solver.rtol, solver.atol))
    return replace(solver, rtol=rtol, atol=atol, max_evaluations=10 * solver.max_evaluations)


def _tight(solver: ODESolver, resolution: float) -> ODESolver:
    tolerance = max(_TIGHT, _ROUNDINGS * resolution)
    budget = max(ODESolver.max_evaluations, solver.max_evaluations)
    return ODESolver(rtol=tolerance, atol=tolerance, max_evaluations=budget)


def _grid(solver: ODESolver) -> ODESolver:
    own_steps = solver.steps or len(solver.times or ()) - 1
    steps = 2 * max(_HALF, own_steps + 1)
    times = [step / steps for step in range(steps + 1)]
    budget = max(ODESolver.max_evaluations, 16 * steps)  # at least once with twice the steps
    return ODESolver(method="rk4", times=times, accuracy=_ACCURACY, max_evaluations=budget)
