r"""Levels by row: each row of a solve gets as many steps as its own accuracy needs.

All rows are solved on every second time of the solver's grid, and on the whole grid. A row whose
two results agree is done; the others go on with steps of half the size, and so on. So a row costs
what it needs, and its result does not depend on the rows beside it. The result is extrapolated from
the two (Richardson 1911), which removes the leading term of the error: the change over 15, for a
method of order 4.

The error in nats of the log-density of a row is estimated from two levels as

.. math:: |\Delta\, \mathrm{ladj}| + |z| \, |\Delta z|

where :math:`|z| |\Delta z|` is the change of a standard normal log-density at z, divided by the
`gain` of the solver: how much smaller errors are than changes, at least 1, and more where steps are
fine enough, as calibration measures. For the points themselves, the gain is 1/2, and :math:`|z|` at
least 1. As one change may be small by chance, the change before counts too: a point at the base
must settle twice in a row, because the way back to the data stretches its error, and the change
before of a point at the data may be 32 times as large. A row that ends at more than ten standard
deviations may have an error in proportion to its log-density, :math:`-|z|^2 / 2`.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cnf._row_names import name_rows
from cnf.ode.monitor import ODEError, State
from cnf.ode.solver import ODESolver

_FAR = 10.0
"""Standard deviations from 0 at the base up to which the error of a row is absolute."""
_SHARE_OF_POINTS = 0.5
"""Part of the accuracy by which points may change, so that there and back keep it."""
_CHANGE_BEFORE = {"density": math.inf, "x": 32.0, "z": 1.0}
"""Limit of the change before, in limits of the change. By steps of half the size, changes fall to a
sixteenth; where one falls to less than half of that, it is small by chance."""
_ROUNDING = 16
"""Rounding errors of the numbers of a row that no finer steps remove."""

Goal = Literal["density", "x", "z"]
"""What is asked of a solve: the log-density, or the points at the data or at the base."""


def solve_by_levels(
    solve: Callable[[ODESolver, Tensor | None], State], solver: ODESolver, goal: Goal
) -> State:
    """Return the moved points and the ladj of rows, by steps as small as each row needs.

    Where a grid is too coarse for a row to stay finite, all rows go on with finer steps.

    Args:
        solve: Solves with a solver from the rows of an index, or from all rows for None; returns
            points ``(rows, features)`` and ladj ``(rows,)``.
        solver: Solver with `times` and `accuracy`, for the second level.
        goal: What the accuracy is of.

    Raises:
        ODEError: If a row needs more evaluations than the solver's budget.
    """
    for_points = goal != "density"
    accuracy = (_SHARE_OF_POINTS if for_points else solver.gain) * (solver.accuracy or 0.0)
    before_accuracy = _CHANGE_BEFORE[goal] * accuracy

    earlier: State | None = None
    if goal == "x" and len(solver.times or ()) > 3:
        with torch.no_grad():
            earlier = _if_finite(solve, solver.coarser().coarser())
    before, now = _if_finite(solve, solver.coarser()), _if_finite(solve, solver)
    while before is None or now is None:
        solver = solver.halved()
        if (solver.evaluations or 0) > solver.max_evaluations:
            solve(solver.coarser(), None)  # raises the error
        earlier, before, now = before, now, _if_finite(solve, solver)
    z, ladj = extrapolated(before, now)
    open_rows = torch.arange(len(ladj), device=ladj.device)
    may_settle = torch.full_like(ladj, not for_points, dtype=torch.bool)
    if earlier is not None:
        may_settle |= ~is_unsettled(earlier, before, before_accuracy, for_points=for_points)
    while True:
        has_moved = is_unsettled(before, now, accuracy, for_points=for_points)
        is_open = has_moved | ~may_settle
        may_settle = ~is_unsettled(before, now, before_accuracy, for_points=for_points)[is_open]
        open_rows = open_rows[is_open]
        if len(open_rows) == 0:
            return z, ladj
        solver = solver.halved()
        if (solver.evaluations or 0) > solver.max_evaluations:
            open_rows = open_rows[has_moved[is_open]]
            if len(open_rows) == 0:  # all have settled once
                return z, ladj
            bad = torch.zeros_like(ladj, dtype=torch.bool).index_fill(0, open_rows, True)
            what = "the point" if for_points else "the log-density"
            raise ODEError(
                f"{what} does not settle within accuracy={solver.accuracy} in "
                f"{name_rows(bad)} by max_evaluations={solver.max_evaluations}. The field may be "
                "rough there: use a larger accuracy or a larger max_evaluations."
            )
        before, now = tuple(part[is_open] for part in now), solve(solver, open_rows)
        found = extrapolated(before, now)
        z, ladj = z.index_copy(0, open_rows, found[0]), ladj.index_copy(0, open_rows, found[1])


def _if_finite(
    solve: Callable[[ODESolver, Tensor | None], State], solver: ODESolver
) -> State | None:
    try:
        return solve(solver, None)
    except ODEError:
        return None


def extrapolated(coarse: State, fine: State) -> State:
    """Return the limit of finer and finer steps, by two levels of a method of order 4."""
    return tuple(now + (now - before) / 15 for before, now in zip(coarse, fine, strict=True))


@torch.no_grad()
def is_unsettled(
    coarse: State, fine: State, accuracy: float, *, for_points: bool = False
) -> Tensor:
    """Return the mask of the rows that change by more than `accuracy`."""
    size = fine[0].norm(dim=-1)
    rounding = _ROUNDING * torch.finfo(size.dtype).eps * (1 + fine[1].abs() + size.square())
    limit = torch.maximum(rounding, accuracy * excess(fine))
    change = log_density_change(coarse, fine, least_size=1.0 if for_points else 0.0)
    return ~(change <= limit)  # NaN too


def excess(state: State) -> Tensor:
    """Return how many times as large an error each row may have, because it ends far out."""
    squares = state[0].square().mean(-1)
    return (squares / _FAR**2).clamp(min=1.0)


@torch.no_grad()
def log_density_change(coarse: State, fine: State, least_size: float = 0.0) -> Tensor:
    """Return by how many nats the log-density of each row changes from one level to the next.

    A point nearer to 0 than `least_size` counts as one at this distance.
    """
    size = fine[0].norm(dim=-1).clamp(min=least_size)
    moved = (fine[0] - coarse[0]).norm(dim=-1)
    change: Tensor = (fine[1] - coarse[1]).abs() + size * moved
    return change
