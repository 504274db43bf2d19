"""The rows that a flow is trained on, checked once and cut into minibatches."""

import itertools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from cnf._checks import check_context, check_events, check_support, reference_tensor
from cnf.flow import Flow
from cnf.training.config import TrainingConfig
from cnf.transforms import ContinuousTransform, Transform, chain

Data = Tensor | tuple[Tensor, Tensor]
"""Rows ``(rows, *event_shape)``, or a pair of rows and contexts ``(rows, context_features)``."""

_ROWS_TRIED = 10_000
_FAR = 20.0


def as_tensors(name: str, data: Data, flow: Flow) -> tuple[Tensor, ...]:
    """Rows, or rows and contexts, checked once before training."""
    x, context = data if isinstance(data, tuple | list) and len(data) == 2 else (data, None)
    like = reference_tensor(flow)
    check_events(name, x, flow.event_shape, like=like)
    if context is None and flow.context_features:
        raise ValueError(
            f"{name} must be a pair of rows and contexts, because the flow is conditional; got "
            f"rows alone. Pass (x, context), with context of shape (rows, {flow.context_features})."
        )
    check_context(context, flow.context_features, like=like)
    if x.ndim != 1 + len(flow.event_shape) or len(x) == 0:
        expected = ", ".join(map(str, ("rows", *flow.event_shape)))
        raise ValueError(f"{name} must have shape ({expected}); got {tuple(x.shape)}.")
    check_support(name, x, flow.support)
    if context is None:
        return (x,)
    if context.shape[:-1] != x.shape[:1]:
        raise ValueError(
            f"{name} must have one context for each row; got {tuple(x.shape)} rows and "
            f"{tuple(context.shape)} contexts."
        )
    return x, context


@torch.no_grad()
def warn_if_far_from_standard(flow: Flow, x: Tensor, context: Tensor | None = None) -> None:
    """Warn if rows reach the first vector field at another scale than it starts from."""
    x, context = x[:_ROWS_TRIED], None if context is None else context[:_ROWS_TRIED]
    discrete = itertools.takewhile(_is_discrete, flow.chain)
    noise = torch.Generator(x.device).manual_seed(0)
    size = chain.to_base(list(discrete), x, context, generator=noise).square().mean(0).sqrt()
    if not (size < _FAR).all():
        warnings.warn(
            f"the data reach the vector field with a root mean square of up to {size.max():.3g}, "
            "where training expects about 1; put Standardize.from_data(x) first among the "
            "transforms, and look for outliers.",
            stacklevel=3,
        )


def _is_discrete(transform: Transform) -> bool:
    return not any(isinstance(part, ContinuousTransform) for part in transform.modules())


def minibatches(data: tuple[Tensor, ...], config: TrainingConfig) -> Iterator[tuple[Tensor, ...]]:
    """Minibatches without end, the rows in a new order each time through."""
    order = torch.Generator().manual_seed(config.seed)
    dataset = TensorDataset(*data)
    size = min(config.batch_size, len(dataset))
    sampler = BatchSampler(RandomSampler(dataset, generator=order), size, drop_last=True)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None, generator=order)
    while True:
        yield from loader
