"""The density of a table: a flow fitted to its rows, and scored so that no row sees another."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._building import Building
from cnf._checks import check_count, check_number, rows_inside
from cnf.flows.chunks import in_chunks, sample_in_chunks
from cnf.flows.cnf import CNF
from cnf.flows.flow import Flow
from cnf.ode import ODESolver
from cnf.tables.integer_columns import centred, fixed_noise
from cnf.training import History, Recipe, TrainingConfig, fit
from cnf.transforms import Standardize, Transform, Unconstrain
from cnf.vector_fields import MLPField
from cnf.vector_fields.conditioning import context_scalings

GRID_STEPS = 100
"""Equal steps of "rk4" in which a fitted density is evaluated. An adaptive method takes the steps
that the worst row of a batch needs, and so makes a row's number depend on the rows beside it."""

NOISES = 8
"""Draws of the noise of whole numbers, over which the probability of a row is averaged."""

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class DensitySettings(Recipe):
    """How the density of a table is fitted.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a setting is out of range.

    Example:
        >>> DensitySettings(matching_steps=100).validation_fraction
        0.1
    """

    hidden_features: Sequence[int] = (128, 128)
    """Widths of the hidden layers of the network; two keep the density exact and fast."""
    validation_fraction: float = 0.1
    """Share of the rows held out of training; the weights that are best on them are kept. 0 holds
    out none, and keeps the last weights."""
    seed: int = Recipe.seed
    """Seed of the rows held out, the initial weights and the training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.hidden_features
        if isinstance(widths, str | torch.Tensor) or not isinstance(widths, Iterable):
            raise TypeError(
                f"hidden_features must be widths such as (128, 128); got {self.hidden_features!r}."
            )
        for width in self.hidden_features:
            check_count("each of hidden_features", width)
        if not len(self.hidden_features):
            raise ValueError("hidden_features must have at least one width; got none.")
        check_number(
            "validation_fraction", self.validation_fraction, "in [0, 1)", lambda part: 0 <= part < 1
        )


class TableRows(NamedTuple):
    """Rows of a table, in float64."""

    x: Float[Tensor, "rows features"]
    """What the density is of."""
    context: Float[Tensor, "rows context_features"] | None = None
    """What each row is conditioned on, as it is: the flow scales it."""
    weight: Float[Tensor, " rows"] | None = None
    """How often each row counts; not negative."""

    def take(self, index: Tensor | slice) -> "TableRows":
        """Some of the rows."""
        return self.map(itemgetter(index))

    def map(self, change: Callable[[Tensor], Tensor]) -> "TableRows":
        """What `change` makes of each part."""
        context, weight = (None if part is None else change(part) for part in self[1:])
        return TableRows(change(self.x), context, weight)


def hold_out(rows: TableRows, settings: DensitySettings) -> tuple[TableRows, TableRows | None]:
    """Rows to train on and, unless the share is less than one row, rows to validate on."""
    count = int(settings.validation_fraction * len(rows.x))
    if count == 0:
        return rows, None
    order = torch.randperm(len(rows.x), generator=torch.Generator().manual_seed(settings.seed))
    return rows.take(order[count:]), rows.take(order[:count])


@torch.inference_mode(False)  # whose tensors could not be trained
def fit_density(
    transforms: Iterable[Transform],
    rows: TableRows,
    validation: TableRows | None = None,
    settings: DensitySettings = DensitySettings(),
    *,
    progress: bool = False,
) -> tuple[Flow, History]:
    """Fit a flow to the rows of a table.

    The transforms see float64 and the network, while it is trained, float32: a column of large
    numbers that differ little keeps its digits until it is standardised.

    Args:
        transforms: From the rows to numbers of mean 0 and standard deviation 1, in float64, such
            as ``[Standardize.from_data(x)]``.
        rows: Rows to train on.
        validation: Rows that choose the weights that are kept; None for the last weights.
        settings: Settings.
        progress: Whether to show a progress bar.

    Returns:
        The flow, in float64 and solved in `GRID_STEPS` steps, and the record of the training, whose
        losses are those of the transformed rows. Torch's global random state is left alone.

    Raises:
        ValueError: If the rows do not fit the transforms.
        TrainingError: If training cannot go on.

    Example:
        >>> from cnf import Standardize
        >>> x = 5 + torch.randn(200, 2, dtype=torch.float64)
        >>> settings = DensitySettings(matching_steps=3, likelihood_steps=1)
        >>> flow, history = fit_density([Standardize.from_data(x)], TableRows(x), settings=settings)
        >>> flow.log_prob(x).shape
        torch.Size([200])
    """
    with Building(seed=settings.seed):
        network = CNF(
            rows.x.shape[-1],
            0 if rows.context is None else rows.context.shape[-1],
            hidden_features=tuple(settings.hidden_features),
            solver=ODESolver(method="rk4", steps=GRID_STEPS),
        ).float()
    # Drawn anew: torch's default dtype is anyone's to set, and in another one, others are drawn.
    with Building(seed=settings.seed):
        for part in network.modules():
            if isinstance(part, MLPField):
                part.reset_parameters()
    _, *continuous = network.double().chain  # the transforms given do its work
    flow = Flow([*transforms, *continuous])
    for scaling in context_scalings(flow):
        scaling.initialize(rows.context, rows.weight)
    return flow, _train(flow, rows, validation, settings.phases(len(rows.x), progress=progress))


@torch.inference_mode(False)
def continue_density(
    flow: Flow,
    rows: TableRows,
    validation: TableRows | None = None,
    settings: DensitySettings = DensitySettings(),
    *,
    progress: bool = False,
) -> tuple[Flow, History]:
    """Train a copy of what `fit_density` gave further, its transforms as they are.

    It takes the likelihood steps of the settings alone, of which there must be some. Arguments,
    results and errors are those of `fit_density`.
    """
    if settings.likelihood_steps == 0:
        raise ValueError(
            "likelihood_steps must be at least 1 to train a density further; got 0. Fit a new one, "
            "or allow some."
        )
    flow = deepcopy(flow)
    likelihood = settings.phases(len(rows.x), progress=progress)[-1:]
    return flow, _train(flow, rows, validation, likelihood)


def _train(
    flow: Flow, rows: TableRows, validation: TableRows | None, phases: Sequence[TrainingConfig]
) -> History:
    """Train a flow in place; the only call of the training loop."""
    given = list(itertools.takewhile(_is_given, flow.chain))
    exact, noisy = _parted(given)
    # A copy: single precision would round the numbers that the transforms hold.
    learnt = Flow([*deepcopy(noisy), *flow.chain[len(given) :]]).using(solver=ODESolver())

    scalings = context_scalings(flow)

    @torch.no_grad()
    def data(rows: TableRows) -> dict[str, Tensor]:
        x = (Flow(exact).double().to_base(rows.x) if exact else rows.x).float()
        parts = {"x": x, "weight": rows.weight}
        if rows.context is not None:
            parts["context"] = (scalings[0](rows.context) if scalings else rows.context).float()
        return {name: part for name, part in parts.items() if part is not None}

    held_out = None if validation is None else data(validation)
    training = data(rows)
    moments = [(scaling.mean.clone(), scaling.log_std.clone()) for scaling in scalings]
    for scaling in scalings:  # done above, before contexts were rounded
        scaling.set(torch.zeros_like(scaling.mean), torch.ones_like(scaling.mean))
    learnt.float()  # and with it the network of `flow`, whose parameters these are
    try:
        return fit(learnt, training, phases, validation=held_out)
    finally:
        learnt.double()
        for scaling, (mean, log_std) in zip(scalings, moments, strict=True):
            scaling.set(mean, log_std.exp())


def _is_given(transform: Transform) -> bool:
    """Whether the transform stays as it is in training."""
    return not any(parameter.requires_grad for parameter in transform.parameters())


def _parted(given: Sequence[Transform]) -> tuple[list[Transform], list[Transform]]:
    """The transforms to apply once, in double precision, and those to apply anew at each step."""
    match given:
        case [Unconstrain() as first, Standardize() as second, *others] if not first.is_bijective:
            exact, noisy = centred(first, second)
            return exact, [*noisy, *others]
    exact = list(itertools.takewhile(attrgetter("is_bijective"), given))
    return exact, list(given[len(exact) :])


@torch.no_grad()
def log_prob(flow: Flow, rows: TableRows, *, progress: bool = False) -> Float[Tensor, " rows"]:
    """Log-density of each row in nats, in chunks, so that memory does not grow with their number.

    Where whole numbers make it a lower bound, it is the log of the mean over `NOISES` draws of
    their noise, the same for every row, so that no row's number depends on the others.

    Raises:
        ValueError: If the rows do not fit the flow.
        ODEError: If the solve fails.
    """
    transforms, noises = fixed_noise(flow.chain, NOISES)
    noiseless = Flow(transforms, flow.base)
    generator = torch.Generator().manual_seed(0)  # of other transforms that draw

    def of_part(index: slice) -> Tensor:
        part = rows.take(index)
        found = [
            noiseless.log_prob(part.x + noise, part.context, generator=generator)
            for noise in noises
        ]
        log_prob = torch.stack(found).logsumexp(0) - math.log(len(found))
        return log_prob.where(rows_inside(part.x, flow.support), -math.inf)

    scores = rows.x.new_empty(len(rows.x))
    return in_chunks(of_part, scores, chunk_size=_ROWS_AT_ONCE, progress=progress)


def sample(
    flow: Flow,
    count: int,
    context: Float[Tensor, " context_features"] | None = None,
    *,
    seed: int,
    progress: bool = False,
) -> Float[Tensor, "count features"]:
    """Draw rows, all given one context, in chunks.

    Raises:
        ValueError: If `context` does not fit the flow.
        ODEError: If the solve fails.
    """
    generator = torch.Generator().manual_seed(seed)
    return sample_in_chunks(
        flow, count, context, chunk_size=_ROWS_AT_ONCE, generator=generator, progress=progress
    )
