"""What of a flow starts from the data, and the scale at which they reach the vector field."""

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from cnf.flow import Flow
from cnf.training.rows import Rows
from cnf.transforms import ContinuousTransform, Standardize, Transform, chain

_ROWS_TRIED = 10_000
_ROWS_MEASURED = 100_000
_FAR = 20.0


@contextlib.contextmanager
def standardised_first(flow: Flow, rows: Rows) -> Iterator[None]:
    """Put a `Standardize` of the data in front if the flow is of vectors and begins with an ODE.

    It is taken out again if what follows in the context fails.
    """
    first = next(iter(flow.chain), None)
    if not isinstance(first, ContinuousTransform):
        yield
        return
    x = cast(Tensor, rows.some(_ROWS_MEASURED).inputs[0])
    flow.transforms.insert(0, Standardize.from_data(x))
    try:
        yield
    except BaseException:
        del flow.transforms[0]
        raise


def initialize(flow: Flow, rows: Rows | None) -> None:
    """Set what starts from data, such as `ActNorm`, unless the flow is trained without."""
    if rows is None or rows.contexts:
        return
    if not any(part.awaits_data for part in (*flow.chain, flow.base)):
        return
    x, context = rows.some(_ROWS_TRIED).inputs
    flow.initialize(x, context, generator=torch.Generator(x.device).manual_seed(0))


@torch.no_grad()
def warn_if_far_from_standard(flow: Flow, rows: Rows | None) -> None:
    """Warn if the data reach the first vector field at another scale than it starts from."""
    if rows is None or rows.contexts:
        return
    x, context = rows.some(_ROWS_TRIED).inputs
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
