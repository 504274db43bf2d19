"""Fit, score and sample the density of a table."""

import itertools
import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._building import Building
from cnf._checks import check_number, check_widths, is_positive, rows_inside
from cnf._row_names import rows_of_caller
from cnf._warnings import warn
from cnf.bases import GaussianMixtureBase
from cnf.flows.calibration import obstacle_to_calibration
from cnf.flows.chunks import in_chunks, sample_in_chunks
from cnf.flows.cnf import CNF
from cnf.flows.flow import Flow
from cnf.flows.mixture_start import WeightedRows, become_mixture_if_better
from cnf.manifolds import OnManifold
from cnf.ode import ODEError, ODESolver
from cnf.tables.integer_columns import fixed_noise, split_off_noise
from cnf.tables.starts import RACE_STEPS, evenly, starts, winner
from cnf.training import History, Recipe, TrainingConfig, fit
from cnf.training.initialization import by_weight
from cnf.transforms import Chain, ContinuousTransform, Standardize, Transform, Unconstrain
from cnf.vector_fields import MLPField
from cnf.vector_fields.conditioning import context_scalings

GRID_STEPS = 100
"""Equal steps of "rk4" for a density that cannot be calibrated. With an adaptive method, the
log-density of a row would depend on the other rows of its batch."""

_ROWS_AT_ONCE = 4096
_MOST_ROWS = 10_000
"""Most rows that a Gaussian mixture is fitted to, and compared by."""


@dataclass(frozen=True, kw_only=True)
class DensitySettings(Recipe):
    """Settings of the fit of a density of a table.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a setting is out of range.

    Example:
        >>> DensitySettings(matching_steps=100).validation_fraction
        0.1
    """

    hidden_features: Sequence[int] | None = None
    """Widths of the hidden layers of the network; None for the default of `CNF`."""
    validation_fraction: float = 0.1
    """Fraction of the rows held out for validation, to keep the best weights; with 0 the last
    weights are kept."""
    accuracy: float = 1e-2
    """Largest estimated error of the log-density of a row, in nats, for which `Flow.calibrate`
    chooses the steps of the solves after training."""
    seed: int = Recipe.seed
    """Seed of the held-out rows, the initial weights and the training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.hidden_features
        if widths is not None:
            if isinstance(widths, str | torch.Tensor) or not isinstance(widths, Iterable):
                raise TypeError(
                    f"hidden_features must be widths such as (128, 128), or None; got {widths!r}."
                )
            check_widths("hidden_features", tuple(widths))
        check_number(
            "validation_fraction", self.validation_fraction, "in [0, 1)", lambda part: 0 <= part < 1
        )
        check_number("accuracy", self.accuracy, "positive and finite", is_positive)


class TableRows(NamedTuple):
    """Rows of a table, in float64."""

    x: Float[Tensor, "rows features"]
    """Columns of the density."""
    context: Float[Tensor, "rows context_features"] | None = None
    """Context of each row, unscaled."""
    weight: Float[Tensor, " rows"] | None = None
    """Weight of each row, at least 0."""

    def take(self, index: Tensor | slice) -> "TableRows":
        """Return some of the rows."""
        context, weight = (None if part is None else part[index] for part in self[1:])
        return TableRows(self.x[index], context, weight)


def hold_out(rows: TableRows, settings: DensitySettings) -> tuple[TableRows, TableRows | None]:
    """Split off a random `validation_fraction` of the rows; None if that is less than one row."""
    count = int(settings.validation_fraction * len(rows.x))
    if count == 0:
        return rows, None
    order = torch.randperm(len(rows.x), generator=torch.Generator().manual_seed(settings.seed))
    return rows.take(order[count:]), rows.take(order[:count])


@torch.inference_mode(False)  # tensors made in it cannot be trained
def fit_density(
    transforms: Iterable[Transform],
    rows: TableRows,
    validation: TableRows | None = None,
    settings: DensitySettings = DensitySettings(),
    *,
    progress: bool = False,
) -> tuple[Flow, History]:
    """Fit a flow to the rows of a table.

    The transforms compute in float64, and the network in float32 during training: a column of
    large numbers with small differences keeps its digits until it is standardised.

    Args:
        transforms: Transforms that standardise the rows, in float64, such as
            ``[Standardize.from_data(x)]``. If they end so, there are 100 validation rows and 2000
            steps of flow matching, `NormalScores` follow them where the validation rows show,
            after 200 steps each, that this is the better start.
        rows: Training rows.
        validation: Validation rows, to keep the best weights; None to keep the last weights.
        settings: Settings.
        progress: Whether to show a progress bar.

    Returns:
        The flow, in float64 and calibrated for the training rows, and the history, with losses of
        the transformed rows. A `GaussianMixtureBase` replaces the trained field if it is the better
        density of the validation rows, or if these and the training rows are too few to compare
        by. Torch's global random state does not change.

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
    phases = settings.phases(len(rows.x), progress=progress)
    chains = starts(
        list(transforms),
        rows.x,
        rows.weight,
        steps=phases[0].steps if settings.matching_steps != 0 else 0,
        validated=0 if validation is None else len(validation.x),
    )

    def trial(chain: list[Transform]) -> Flow:
        flow = _new_flow(chain, rows, settings)
        _train(flow, rows, None, [replace(phases[0], steps=RACE_STEPS, ema=None, progress=False)])
        return flow

    if validation is not None:
        chains = [winner(chains, trial, *validation)]
    flow = _new_flow(chains[0], rows, settings)
    history = _train(flow, rows, validation, phases)
    if settings.validation_fraction > 0:
        others = None if validation is None else _some(validation)
        become_mixture_if_better(flow, _some(rows), others, refit=False)
    if not isinstance(flow.base, GaussianMixtureBase):  # whose field is zero
        _calibrate(flow, rows, settings.accuracy)
    return flow, history


def _new_flow(chain: Sequence[Transform], rows: TableRows, settings: DensitySettings) -> Flow:
    """Return a flow of transforms and an ODE of zero velocity, with the context of the rows."""
    widths = settings.hidden_features
    codomain = Chain(chain, rows.x.shape[-1]).codomain
    with Building(seed=settings.seed):
        network = CNF(
            rows.x.shape[-1],
            0 if rows.context is None else rows.context.shape[-1],
            hidden_features=widths if widths is None else tuple(widths),
            manifold=codomain.manifold if isinstance(codomain, OnManifold) else None,
        ).float()
    # Drawn again in float32: the numbers drawn above depend on torch's default dtype.
    with Building(seed=settings.seed):
        for part in network.modules():
            if isinstance(part, MLPField):
                part.reset_parameters()
    # Without its own standardisation: the chain standardises.
    flow = Flow([*chain, network.double().transforms[-1]])
    for scaling in context_scalings(flow):
        scaling.initialize(rows.context, rows.weight)
    return flow


def _some(rows: TableRows) -> WeightedRows:
    some = rows.take(evenly(len(rows.x), _MOST_ROWS))
    return WeightedRows(some.x, some.weight)


@torch.inference_mode(False)
def continue_density(
    flow: Flow,
    rows: TableRows,
    validation: TableRows | None = None,
    settings: DensitySettings = DensitySettings(),
    *,
    progress: bool = False,
) -> tuple[Flow, History]:
    """Train a copy of a flow from `fit_density` further, with the same transforms.

    It takes only the likelihood steps of the settings, at least one. Arguments, results and errors
    are as in `fit_density`.
    """
    if settings.likelihood_steps == 0:
        raise ValueError(
            "likelihood_steps must be at least 1 to train a density further; got 0. Set "
            "likelihood_steps, or fit a new density."
        )
    flow = deepcopy(flow)
    likelihood = settings.phases(len(rows.x), progress=progress)[-1:]
    history = _train(flow, rows, validation, likelihood)
    _calibrate(flow, rows, settings.accuracy)
    return flow, history


def _calibrate(flow: Flow, rows: TableRows, accuracy: float) -> None:
    generator = torch.Generator().manual_seed(0)
    if rows.weight is not None:
        rows = rows.take(by_weight(rows.weight, len(rows.x)))
    if not obstacle_to_calibration(flow.transforms, flow.base):
        try:
            flow.calibrate(rows.x, rows.context, accuracy=accuracy, generator=generator)
        except ODEError as error:
            warn(f"log-densities are computed in {GRID_STEPS} equal steps: {error}")
        else:
            return
    for part in flow.modules():
        if isinstance(part, ContinuousTransform):
            part.solver = ODESolver(method="rk4", steps=GRID_STEPS)


def _train(
    flow: Flow, rows: TableRows, validation: TableRows | None, phases: Sequence[TrainingConfig]
) -> History:
    """Train a flow in place; the only call of `fit`."""
    fixed = list(itertools.takewhile(_is_fixed, flow.transforms))
    exact, noisy = _split(fixed)
    # A copy: single precision would round the buffers of the transforms.
    learnt = Flow([*deepcopy(noisy), *flow.transforms[len(fixed) :]], deepcopy(flow.base))
    learnt = learnt.using(solver=ODESolver())

    scalings = context_scalings(flow)

    @torch.no_grad()
    def data(rows: TableRows) -> dict[str, Tensor]:
        x = rows.x
        if exact:
            chain = Flow(exact).double()
            x = in_chunks(
                lambda index: chain.to_base(rows.x[index]),
                torch.empty_like(x),
                chunk_size=_ROWS_AT_ONCE,
                progress=False,
            )
        x = x.float()
        parts = {"x": x, "weight": rows.weight}
        if rows.context is not None:
            parts["context"] = (scalings[0](rows.context) if scalings else rows.context).float()
        return {name: part for name, part in parts.items() if part is not None}

    held_out = None if validation is None else data(validation)
    training = data(rows)
    moments = [(scaling.mean.clone(), scaling.log_std.clone()) for scaling in scalings]
    for scaling in scalings:  # contexts were scaled above, before they were rounded
        scaling.set(torch.zeros_like(scaling.mean), torch.ones_like(scaling.mean))
    learnt.float()  # also the network of `flow`, which shares its parameters
    try:
        return fit(learnt, training, phases, validation=held_out, accuracy=None)
    finally:
        learnt.double()
        for scaling, (mean, log_std) in zip(scalings, moments, strict=True):
            scaling.set(mean, log_std.exp())


def _is_fixed(transform: Transform) -> bool:
    """Return whether training does not change the transform."""
    return not any(parameter.requires_grad for parameter in transform.parameters())


def _split(fixed: Sequence[Transform]) -> tuple[list[Transform], list[Transform]]:
    """Split into transforms to apply once, in double precision, and to apply at each step."""
    match fixed:
        case [Unconstrain() as first, Standardize() as second, *others] if not first.is_bijective:
            exact, noisy = split_off_noise(first, second)
            return exact, [*noisy, *others]
    exact = list(itertools.takewhile(attrgetter("is_bijective"), fixed))
    return exact, list(fixed[len(exact) :])


@torch.no_grad()
def log_prob(flow: Flow, rows: TableRows, *, progress: bool = False) -> Float[Tensor, " rows"]:
    """Return the log-density of each row in nats, computed in chunks.

    With integer columns, it is the log of the mean over points that stand for the dequantization
    noise, the same for every row, so that no row depends on the others.

    Raises:
        ValueError: If the rows do not fit the flow.
        ODEError: If the solve fails.
    """
    transforms, noises = fixed_noise(flow.transforms)
    noiseless = Flow(transforms, flow.base)
    generator = torch.Generator().manual_seed(0)  # for other transforms that draw

    def evaluate(index: slice) -> Tensor:
        part = rows.take(index)
        with rows_of_caller(lambda row: row[-1:]):  # all points of a row in one solve
            points = part.x + noises.unsqueeze(1)
            each = noiseless.log_prob(points, part.context, generator=generator)
        log_prob = each.logsumexp(0) - math.log(len(each))
        return log_prob.where(rows_inside(part.x, flow.support), -math.inf)

    scores = rows.x.new_empty(len(rows.x))
    return in_chunks(evaluate, scores, chunk_size=_ROWS_AT_ONCE, progress=progress)


def sample(
    flow: Flow,
    count: int,
    context: Float[Tensor, " context_features"] | None = None,
    *,
    seed: int,
    progress: bool = False,
) -> Float[Tensor, "count features"]:
    """Draw rows in chunks, with one context for all.

    Raises:
        ValueError: If `context` does not fit the flow.
        ODEError: If the solve fails.
    """
    generator = torch.Generator().manual_seed(seed)
    return sample_in_chunks(
        flow, count, context, chunk_size=_ROWS_AT_ONCE, generator=generator, progress=progress
    )
