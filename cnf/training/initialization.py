"""Initialisation of a flow from training rows, and checks of the rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from cnf._moments import column_moments
from cnf._warnings import warn
from cnf.data.cells import Table
from cnf.data.degeneracy import check_columns
from cnf.data.table_files import warn_of_fill_values
from cnf.flows.flow import Flow
from cnf.training.data import TrainingData
from cnf.transforms import ContinuousTransform
from cnf.transforms.from_data.base import DataTransform
from cnf.vector_fields.conditioning import context_scalings

_ROWS = 10_000
_FAR = 20.0
_MOST_OF_ALL = 0.95


class Sample(NamedTuple):
    """Training rows, repeated by weight; `rows` holds each once. No rows without data."""

    x: Tensor | None = None
    context: Tensor | None = None
    rows: Tensor | None = None


def sample_of(rows: TrainingData | None) -> Sample:
    """Return training rows for statistics, evenly from first to last."""
    if rows is None:
        return Sample()
    x, context, weight, _ = rows.some(_ROWS)
    if x is None:
        return Sample(context=context)
    if weight is None or bool((weight == weight[0]).all()):
        return Sample(x, context, rows=x)
    share = weight.max() / weight.sum()
    if share > _MOST_OF_ALL:
        raise ValueError(
            f"the weights of {rows.name} must not be nearly all in a single row; one has "
            f"{share:.4%} of the total, and the best density of a single row is infinite at it."
        )
    index = by_weight(weight, _ROWS)
    return Sample(x[index], None if context is None else context[index], rows=x[index.unique()])


def by_weight(weight: Tensor, count: int) -> Tensor:
    """Return the indices of so many rows, evenly from first to last, each as often as it counts."""
    passed = weight.to("cpu", torch.float64).cumsum(0)
    places = passed[-1] * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.searchsorted(passed, places).clamp(max=len(weight) - 1).to(weight.device)


def initialize(flow: Flow, sample: Sample) -> None:
    """Initialise `Standardize` and the like from training rows, and warn of badly scaled ones.

    Without data, `Standardize` and the like stay the identity; contexts are scaled all the same.
    """
    x, context = sample.x, sample.context
    if x is None:
        for scaling in context_scalings(flow):
            scaling.initialize(context)
        for part in flow.modules():
            if isinstance(part, DataTransform):
                part.keep_identity()
    elif flow.transforms.needs_initialization or flow.base.needs_initialization:
        if any(parameter.grad is not None for parameter in flow.parameters()):
            warn(
                "the flow has been trained, or at least differentiated, before it was initialised "
                "from data. fit initialises it now, which changes the meaning of weights that were "
                "trained before: call flow.initialize(x, context) before a training loop of your "
                "own."
            )
        flow.initialize(x, context, generator=torch.Generator(x.device).manual_seed(0))
    warn_if_far_from_standard(flow, sample)


def check_sample(name: str, flow: Flow, sample: Sample) -> None:
    """Refuse columns that are constant up to rounding, and warn of repeated and fill values."""
    if sample.context is not None and len(sample.context) > 1:
        column_moments("context", sample.context)
    if sample.rows is None or len(flow.event_shape) != 1 or len(sample.rows) < 2:
        return
    support = flow.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    columns = getattr(support, "cseq", [support] * flow.features)
    real = [i for i, column in enumerate(columns) if not column.is_discrete]
    if real:
        rows, names = sample.rows[:, real], [f"column {i}" for i in real]
        check_columns(name, rows, names)
        warn_of_fill_values(Table(rows.numpy(force=True).astype(float), tuple(names)), name)


@torch.no_grad()
def warn_if_far_from_standard(flow: Flow, sample: Sample) -> None:
    """Warn if the data have a root mean square far from 1 at the first vector field."""
    x, context = sample.x, sample.context
    if x is None:
        return
    noise, least = torch.Generator(x.device).manual_seed(0), 0.0
    for part in flow.transforms:
        if any(isinstance(inner, ContinuousTransform) for inner in part.modules()):
            least = 1 / _FAR
            break
        x = part.to_base(x, context if part.context_features else None, generator=noise)
    size = x.square().mean(0).sqrt()
    if not ((size >= least) & (size < _FAR)).all():
        warn(
            "the data reach the vector field with a root mean square of "
            f"{size.min():.3g} to {size.max():.3g}, where training expects about 1; put "
            f"Standardize({flow.features}) first among the transforms, which fit then sets from "
            "the data, and look for outliers."
        )
