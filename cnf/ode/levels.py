r"""Levels by row: each row of a solve gets as many steps as its own accuracy needs.

All rows are solved on every second time of the solver's grid, and on the whole grid. A row whose
two results agree is done; the others go on with steps of half the size, and so on. So a row costs
what it needs, and its result does not depend on the rows beside it.

The error in nats of the log-density of a row is estimated from two levels as

.. math:: \tfrac14 \left( |\Delta\, \mathrm{ladj}| + |z| \, |\Delta z| \right)

where :math:`|z| |\Delta z|` is the change of a standard normal log-density at z. The change of a
method of fourth order is about 15 times its error at the finer level; the factor 4 leaves a margin
where steps are too coarse for this.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cnf._row_names import name_rows
from cnf.ode.monitor import ODEError, State
from cnf.ode.solver import ODESolver

SAFETY = 4.0


def solve_by_levels(solve: Callable[[ODESolver, Tensor | None], State], solver: ODESolver) -> State:
    """Return the moved points and the ladj of rows, each within the accuracy of the solver.

    Args:
        solve: Solves with a solver from the rows of an index, or from all rows for None; returns
            points ``(rows, features)`` and ladj ``(rows,)``.
        solver: Solver with `times` and `accuracy`, for the second level.

    Raises:
        ODEError: If a row needs more evaluations than the solver's budget.
    """
    limit = SAFETY * (solver.accuracy or 0.0)
    coarse, (z, ladj) = solve(solver.coarser(), None), solve(solver, None)
    open_rows = (log_density_change(coarse, (z, ladj)) > limit).nonzero().flatten()
    while len(open_rows):
        solver = solver.halved()
        if (solver.evaluations or 0) > solver.max_evaluations:
            bad = torch.zeros_like(ladj, dtype=torch.bool).index_fill(0, open_rows, True)
            raise ODEError(
                f"the log-density does not settle within accuracy={solver.accuracy} in "
                f"{name_rows(bad)} by max_evaluations={solver.max_evaluations}. The field may be "
                "rough there, or rounding too large: use float64, a larger accuracy or a larger "
                "max_evaluations."
            )
        coarse, fine = (z[open_rows], ladj[open_rows]), solve(solver, open_rows)
        z, ladj = z.index_copy(0, open_rows, fine[0]), ladj.index_copy(0, open_rows, fine[1])
        open_rows = open_rows[log_density_change(coarse, fine) > limit]
    return z, ladj


@torch.no_grad()
def log_density_change(coarse: State, fine: State) -> Tensor:
    """Return by how many nats the log-density of each row changes from one level to the next."""
    size, moved = fine[0].norm(dim=-1), (fine[0] - coarse[0]).norm(dim=-1)
    change: Tensor = (fine[1] - coarse[1]).abs() + size * moved
    return change
