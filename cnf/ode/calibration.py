r"""Calibration: the times of the steps of a solve, chosen once, from rows.

The error of a step is measured by two steps of half the size from the same states. In a method of
order p it is proportional to :math:`h^{p+1}` for a step of size h, so steps in proportion to
:math:`e(t)^{-1/(p+1)}` have equal errors. As this law holds for small steps only, errors are
measured anew with the steps found, some times over: steps near a narrow density get a hundred times
smaller than others. A twentieth of the density of steps is uniform in time, for what these rows do
not show.

The number of steps and the gain are those with which `solve_by_levels` takes the fewest evaluations
for these rows, while the results that it would accept are as accurate as asked: 99 of 100 within
the accuracy, and all within a few times as much. A gain above 4 must be right for all rows, also
for those that it would not accept.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnf.ode.levels import excess, extrapolated, is_unsettled, log_density_change
from cnf.ode.monitor import ODEError, RightHandSide, State
from cnf.ode.solver import ODESolver
from cnf.ode.torchdiffeq_door import evaluations_per_step, one_step

_ORDER = 4
_INTERVALS = 32
_ROUNDS = 3
"""Times that the density of steps is measured."""
_UNIFORM = 0.05
_LARGE_ERROR = 0.95
"""Quantile over the rows of the error of a step."""
_LARGEST = 1e300
_LEAST_STEPS = (4, 5, 6, 7)
_MOST_STEPS = 1024
_FEW = 0.02
"""Share of the rows that may be left open; of 20 rows or more, one may."""
_GAINS = tuple(2 ** (step / 2) for step in range(13))
"""Gains to try, from 1 to 64. For small steps the change is 15 times the error of the finer ones,
which extrapolation makes smaller still."""
_SAFE_GAIN = 4
"""A larger gain must be right for all rows, and not only for those that it lets through: where
steps are not small, errors are as large as changes, and some rows are let through by chance."""
_LEAST_ROWS = 50
"""Rows from which a gain can be learnt."""
_LEAST_BY_GAIN = 10
"""Rows that a gain must let through, to be known to be right."""
_MOST = 0.99
"""Share of the rows that are most of them."""
_MARGIN, _LARGEST_FACTOR = 0.6, 3
"""Errors of most of these rows, and the largest one, in accuracies; other rows' are larger."""

Solve = Callable[[ODESolver, Tensor], State]
"""Returns points and ladj at each of some times."""


@torch.no_grad()
def calibrated(
    solver: ODESolver, accuracy: float, rhs: RightHandSide, solve: Solve, ends: Tensor
) -> ODESolver:
    """Return the solver with the best times for an accuracy of points and ladj.

    Args:
        solver: Solver of a fixed-step method of order 4.
        accuracy: Error of a log-density, in nats, that a row may have.
        rhs: Right-hand side of the solve.
        solve: Solves with a solver through some times, from `ends[0]` to `ends[1]`.
        ends: Times of the data and of the base.

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
    grid = _grid(solver, rhs, solve, ends)
    true: State | None = None
    is_known = torch.ones(0)
    found, least = solver, math.inf
    for first in _LEAST_STEPS:
        solvers, pairs = _levels(solver, accuracy, grid, first, lambda by: solve(by, ends), true)
        last = pairs[-1] if pairs else None
        if last is not None:
            if true is None:
                true, is_known = extrapolated(*last), ~is_unsettled(*last, accuracy)
            best, cost = _cheapest(solvers, pairs, true, is_known, accuracy)
            if cost < least:
                found, least = best, cost
    if math.isinf(least):
        raise ODEError(
            f"calibration does not reach accuracy={accuracy} with {_most_steps(solver)} steps of "
            f"{solver.method} for all but {_FEW:.0%} of the rows. Ask for a larger accuracy, use "
            "float64, or train with kinetic_energy and jacobian_frobenius."
        )
    return found


def _are_few(open_rows: Tensor) -> bool:
    return int(open_rows.sum()) <= max(len(open_rows) >= 20, _FEW * len(open_rows))


def _most_steps(solver: ODESolver) -> int:
    return min(_MOST_STEPS, solver.max_evaluations // evaluations_per_step(solver.method))


Grid = Callable[[int], list[float]]
"""Returns the times of a number of steps, from base to data."""


def _grid(solver: ODESolver, rhs: RightHandSide, solve: Solve, ends: Tensor) -> Grid:
    """Return grids on which the errors of all steps are equal."""
    shares = np.linspace(0, 1, _INTERVALS + 1)
    for last in range(_ROUNDS):
        errors = _errors_of_steps(solver, rhs, solve, ends, shares)
        sizes = np.diff(shares)
        density = errors ** (1 / (_ORDER + 1))
        density = density / density.sum() if density.any() else sizes
        density = (1 - _UNIFORM) * density + _UNIFORM * sizes
        reached = np.concatenate([[0], density.cumsum()])
        reached[-1] = 1
        if last < _ROUNDS - 1:
            shares = np.interp(np.linspace(0, 1, _INTERVALS + 1), reached, shares)
    return lambda steps: np.interp(np.linspace(0, 1, steps + 1), reached, shares).tolist()


def _errors_of_steps(
    solver: ODESolver,
    rhs: RightHandSide,
    solve: Solve,
    ends: Tensor,
    shares: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the error of a step between each two shares of the way from base to data."""
    middles = (shares[:-1] + shares[1:]) / 2
    halves = replace(solver, steps=None, times=np.sort(np.append(shares, middles)).tolist())
    times = ends[1] + torch.from_numpy(shares[::-1].copy()).to(ends) * (ends[0] - ends[1])
    states = solve(halves, times)
    step = one_step(solver.method, rhs, like=states[0])
    errors = []
    for i, (start, end) in enumerate(itertools.pairwise(times)):
        found, _ = step(start, end, tuple(part[i] for part in states), ())
        change = log_density_change(found, tuple(part[i + 1] for part in states))
        largest = change.cpu().double().nan_to_num(_LARGEST, posinf=_LARGEST).quantile(_LARGE_ERROR)
        errors.append(min(float(largest), _LARGEST))
    return np.asarray(errors[::-1])


Pair = tuple[State, State] | None
"""Points and ladj with some steps and with twice as many; None if a row needs more."""


def _levels(
    solver: ODESolver,
    accuracy: float,
    grid: Grid,
    first: int,
    solve: Callable[[ODESolver], State],
    true: State | None,
) -> tuple[list[ODESolver], list[Pair]]:
    """Return solvers with `first` steps, and twice as many each time, and pairs of their results.

    The last is the first pair that is settled, or true, for all but few rows; there are no pairs if
    there is none.
    """
    solvers: list[ODESolver] = []
    pairs: list[Pair] = []
    before: State | None = None
    steps = first
    while steps <= _most_steps(solver):
        solvers.append(replace(solver, steps=None, times=grid(steps)))
        try:
            now = tuple(part[-1].cpu() for part in solve(solvers[-1]))
        except ODEError:
            now = None
        if steps > first:
            pairs.append(None if before is None or now is None else (before, now))
        if before is not None and now is not None:
            compared = (before, now) if true is None else (extrapolated(before, now), true)
            if _are_few(is_unsettled(*compared, accuracy)):
                return solvers, pairs
        before, steps = now, 2 * steps
    return solvers, []


def _cheapest(
    solvers: list[ODESolver], pairs: list[Pair], true: State, is_known: Tensor, accuracy: float
) -> tuple[ODESolver, float]:
    """Return the calibrated solver that takes the fewest steps, and their number for a row.

    The true state is known for the rows of a mask.
    """
    zero = torch.zeros(true[1].shape, dtype=torch.float64)
    # Beyond the last level all rows are done.
    errors = is_known * torch.stack(
        [zero if pair is None else _error(extrapolated(*pair), true) for pair in pairs] + [zero]
    )

    safe = [
        0.0 if pair is None else _gain_of_all(pair, error, accuracy)
        for pair, error in zip(pairs, errors[:-1], strict=True)
    ]

    def settled(gain: float) -> Tensor:
        """Return the levels at which each row is done."""
        found = [
            zero > 0 if pair is None else ~is_unsettled(*pair, gain * accuracy) for pair in pairs
        ]
        return torch.stack([*found, zero == 0])

    sizes = zero.new_tensor([len(solver.times or ()) - 1 for solver in solvers])
    sizes = torch.cat([sizes, 2 * sizes[-1:]])
    by_change = settled(gain=1.0)
    found, least = solvers[-1], math.inf
    for gain in _GAINS if len(zero) >= _LEAST_ROWS else _GAINS[:1]:
        by_error = settled(gain)
        for start in range(len(pairs)):
            level = by_error[start:].int().argmax(0, keepdim=True)  # the first
            cost = float((sizes[start] + sizes[start + 1 :].cumsum(0)[level]).mean())
            error = errors[start:].gather(0, level)[0]
            by_gain = error[~by_change[start:].gather(0, level)[0]]
            are_too_few = gain > 1 and 0 < len(by_gain) < _LEAST_BY_GAIN
            if are_too_few or gain > max(_SAFE_GAIN, safe[start]):
                continue
            if cost < least and _are_accurate(error, accuracy) and _are_accurate(by_gain, accuracy):
                found, least = replace(solvers[start + 1], accuracy=accuracy, gain=gain), cost
    return found, least


def _gain_of_all(pair: tuple[State, State], error: Tensor, accuracy: float) -> float:
    """Return how many times smaller than its change each error is, also of rows that go on."""
    change = log_density_change(*pair) / excess(pair[1])
    gains = (change.double() / error)[error > _MARGIN * accuracy]
    return float(gains.min()) if len(gains) else math.inf


def _are_accurate(errors: Tensor, accuracy: float) -> bool:
    if len(errors) == 0:
        return True
    most = errors.quantile(_MOST) <= _MARGIN * accuracy
    return bool(most and errors.max() <= _LARGEST_FACTOR * accuracy)


def _error(state: State, best: State) -> Tensor:
    """Return the error of the log-density of each row, divided by its `excess`."""
    log_densities = (part[1] - 0.5 * part[0].double().square().sum(-1) for part in (state, best))
    return (next(log_densities) - next(log_densities)).abs() / excess(best)
