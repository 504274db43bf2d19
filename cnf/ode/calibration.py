r"""Calibration: the times of the steps of a solve, chosen once, from rows.

The error of a step at time t is measured by equal steps: each is compared with two steps of half
the size from the same states. In a method of order p it is proportional to :math:`h^{p+1}` for a
step of size h, so steps in proportion to :math:`e(t)^{-1/(p+1)}` have equal errors. A tenth of the
density of steps is uniform, for what these rows do not show. The number of steps is the one with
which `solve_by_levels` takes the fewest evaluations.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnf.ode.levels import is_unsettled, log_density_change
from cnf.ode.monitor import ODEError, RightHandSide, State
from cnf.ode.solver import ODESolver
from cnf.ode.torchdiffeq_door import evaluations_per_step, one_step

_ORDER = 4
_INTERVALS = 32
_UNIFORM = 0.1
_LARGE_ERROR = 0.9
"""Quantile over the rows of the error of a step."""
_LARGEST = 1e300
_LEAST_STEPS = (8, 12)
_MOST_STEPS = 1024
_FEW = 0.02
"""Share of the rows that may be left open; of 20 rows or more, one may."""

Solve = Callable[[ODESolver, Tensor], State]
"""Returns points and ladj at each of some times."""


@torch.no_grad()
def calibrated(
    solver: ODESolver, accuracy: float, rhs: RightHandSide, solve: Solve, ends: Tensor, rows: int
) -> ODESolver:
    """Return the solver with the best times for an accuracy of points and ladj.

    Args:
        solver: Solver of a fixed-step method of order 4.
        accuracy: Error of a log-density, in nats, that a row may have.
        rhs: Right-hand side of the solve.
        solve: Solves with a solver through some times, from `ends[0]` to `ends[1]`.
        ends: Times of the data and of the base.
        rows: Number of rows of the solve.

    Raises:
        ValueError: If the budget of evaluations is too small.
        ODEError: If the accuracy is not reached, or a solve fails.
    """
    least_budget = 2 * _INTERVALS * evaluations_per_step(solver.method)
    if solver.max_evaluations < least_budget:
        raise ValueError(
            f"max_evaluations must be at least {least_budget} to calibrate; got "
            f"{solver.max_evaluations}."
        )
    density = _density_of_steps(solver, rhs, solve, ends)
    best, least = solver, math.inf
    for first in _LEAST_STEPS:
        levels, changes = _levels(
            solver, accuracy, density, first, lambda by: solve(by, ends), rows
        )
        if changes and _are_few(changes[-1]):
            start, cost = _cheapest(levels, torch.stack(changes))
            if cost < least:
                best, least = replace(levels[start + 1], accuracy=accuracy), cost
    if math.isinf(least):
        raise ODEError(
            f"calibration does not reach accuracy={accuracy} with {_most_steps(solver)} steps of "
            f"{solver.method} for all but {_FEW:.0%} of the rows. Ask for a larger accuracy, use "
            "float64, or train with kinetic_energy and jacobian_frobenius."
        )
    return best


def _are_few(open_rows: Tensor) -> bool:
    return int(open_rows.sum()) <= max(len(open_rows) >= 20, _FEW * len(open_rows))


def _most_steps(solver: ODESolver) -> int:
    return min(_MOST_STEPS, solver.max_evaluations // evaluations_per_step(solver.method))


def _density_of_steps(
    solver: ODESolver, rhs: RightHandSide, solve: Solve, ends: Tensor
) -> npt.NDArray[np.float64]:
    """Return the density of steps on equal intervals from base to data; it sums to 1."""
    share = torch.linspace(0, 1, _INTERVALS + 1, dtype=ends.dtype, device=ends.device)
    times = ends[0] + share * (ends[1] - ends[0])
    halves = replace(solver, steps=2 * _INTERVALS, times=None)
    states = solve(halves, times)
    step = one_step(solver.method, rhs, like=states[0])
    errors = []
    for i, (start, end) in enumerate(itertools.pairwise(times)):
        found, _ = step(start, end, tuple(part[i] for part in states), ())
        change = log_density_change(found, tuple(part[i + 1] for part in states))
        largest = change.double().nan_to_num(_LARGEST, posinf=_LARGEST).quantile(_LARGE_ERROR)
        errors.append(min(float(largest), _LARGEST))
    density: npt.NDArray[np.float64] = np.asarray(errors[::-1]) ** (1 / (_ORDER + 1))
    uniform = np.full(_INTERVALS, 1 / _INTERVALS)
    if density.sum() == 0:
        return uniform
    mixed: npt.NDArray[np.float64] = (1 - _UNIFORM) * density / density.sum() + _UNIFORM * uniform
    return mixed


def _levels(
    solver: ODESolver,
    accuracy: float,
    density: npt.NDArray[np.float64],
    first: int,
    solve: Callable[[ODESolver], State],
    rows: int,
) -> tuple[list[ODESolver], list[Tensor]]:
    """Return solvers with `first` steps, and twice as many each time; and which rows change.

    The mask of each level but the first has the rows that change more than they may.
    """
    share = np.linspace(0, 1, _INTERVALS + 1)
    reached = np.concatenate([[0], density.cumsum()])
    reached[-1] = 1
    levels: list[ODESolver] = []
    results: list[State | None] = []
    changes: list[Tensor] = []
    steps = first
    while steps <= _most_steps(solver):
        times = np.interp(np.linspace(0, 1, steps + 1), reached, share)
        levels.append(replace(solver, steps=None, times=times.tolist()))
        try:
            results.append(tuple(part[-1] for part in solve(levels[-1])))
        except ODEError:  # too coarse for these rows
            results.append(None)
        if len(results) > 1:
            before, now = results[-2:]
            if before is None or now is None:
                changes.append(torch.ones(rows, dtype=torch.bool))
            else:
                changes.append(is_unsettled(before, now, accuracy).cpu())
            if _are_few(changes[-1]):
                break
        steps *= 2
    return levels, changes


def _cheapest(levels: list[ODESolver], changes: Tensor) -> tuple[int, float]:
    """Return the level to start from, and its number of steps for each row."""
    sizes = torch.tensor([len(level.times or ()) - 1 for level in levels], dtype=torch.float64)
    costs = []
    for start in range(len(levels) - 1):
        still_open = changes[start:-1].cumprod(0).double().mean(-1)
        further = (still_open * sizes[start + 2 :]).sum()
        costs.append(float(sizes[start] + sizes[start + 1] + further))
    start = min(range(len(costs)), key=costs.__getitem__)
    return start, costs[start]
