"""Race of starts: from standardised columns, or from their normal scores too."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnf._checks import NotFiniteError
from cnf.flows.flow import Flow
from cnf.manifolds import OnManifold
from cnf.ode import ODEError, ODESolver
from cnf.training import TrainingError
from cnf.transforms import Chain, NormalScores, Standardize, Transform

RACE_STEPS = 200
"""Steps of flow matching of each start: on tables of 8 to 43 columns, the better of two after so
many was the better in the end, or as good."""
_SHARE = 0.2
"""Share of the steps of flow matching that a race may take."""
_LEAST_COMPARED = 100
_MOST_COMPARED = 1000
"""Validation rows to compare starts by."""
_MARGIN = 0.1
"""Nats by which a start must be better than the given one."""
_MOST_ROWS = 10_000
"""Rows that set a start, as in `fit`."""


def starts(
    transforms: Sequence[Transform], x: Tensor, weight: Tensor | None, *, steps: int, validated: int
) -> list[list[Transform]]:
    """Return chains to start from, the given one first; others only if a race is worth its time.

    Args:
        transforms: A chain that standardises rows.
        x: Training rows.
        weight: Their weights.
        steps: Steps of flow matching that follow.
        validated: Number of validation rows.
    """
    given = list(transforms)
    can_race = given and isinstance(given[-1], Standardize) and validated >= _LEAST_COMPARED
    can_race = can_race and not isinstance(Chain(given).codomain, OnManifold)
    if not can_race or steps * _SHARE < 2 * RACE_STEPS:
        return [given]
    index = evenly(len(x), _MOST_ROWS)
    generator = torch.Generator().manual_seed(0)
    standardised = Flow(given).double().to_base(x[index], generator=generator)
    weight = None if weight is None else weight[index]
    return [given, [*given, NormalScores.from_data(standardised, weight=weight)]]


def evenly(count: int, most: int) -> Tensor:
    """Return the indices of at most so many rows, at even distances."""
    some = min(count, most)
    return torch.arange(some) * count // max(1, some)


@torch.no_grad()
def winner(
    chains: Sequence[list[Transform]],
    train: Callable[[list[Transform]], Flow],
    x: Tensor,
    context: Tensor | None,
    weight: Tensor | None,
) -> list[Transform]:
    """Return the chain whose flow, after a short training, is the best density of validation rows.

    The first wins unless another is better by 0.1 nats: beyond the range of the training rows, the
    slope of normal scores can be steep, and a density by them falls fast.

    Args:
        chains: Chains to start from; a single one wins without a race.
        train: Returns a flow with a chain, trained for a short time.
        x: Validation rows.
        context: Their contexts.
        weight: Their weights.
    """
    if len(chains) == 1:
        return chains[0]
    some = evenly(len(x), _MOST_COMPARED)
    context = None if context is None else context[some]
    shares = torch.ones_like(x[some, 0]) if weight is None else weight[some].to(x)

    def worth(chain: list[Transform]) -> float:
        generator = torch.Generator().manual_seed(0)
        try:
            flow = train(chain).using(solver=ODESolver())
            log_prob = flow.log_prob(x[some], context, generator=generator)
        except (NotFiniteError, ODEError, TrainingError):
            return -math.inf
        return float((shares / shares.sum()) @ log_prob)

    first, *others = map(worth, chains)
    best = max(others)
    return chains[1 + others.index(best)] if best > first + _MARGIN else chains[0]
