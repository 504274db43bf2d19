"""A chain of transforms, from data to base: what its parts must agree on, and the way through."""

import itertools
from collections.abc import Iterable, Sequence
from typing import get_args

from torch import Generator, Tensor, nn
from torch.distributions import constraints

from cnf._checks import (
    all_finite,
    check_count,
    non_finite_rows,
    reference_tensor,
    refuse_overflow,
)
from cnf._shapes import BaseRows, Context, Costs, Events, Values
from cnf.bases import Base, StandardNormal
from cnf.regularizers import CostRate
from cnf.transforms.base import Likelihood, Transform

_STRONGEST_FIRST: tuple[Likelihood, ...] = get_args(Likelihood)


def as_chain(transforms: Iterable[Transform]) -> list[Transform]:
    """The transforms as a list, if each takes what the one before it gives.

    Raises:
        TypeError: If they are not transforms, or a single one.
        ValueError: If neighbours do not fit.
    """
    if isinstance(transforms, Transform):
        raise TypeError("transforms must be a list; put the single transform in brackets.")
    if isinstance(transforms, str | Tensor) or not isinstance(transforms, Iterable):
        raise TypeError(f"transforms must be a list; got {type(transforms).__name__}.")
    chain = list(transforms)
    for part in chain:
        if not isinstance(part, Transform):
            raise TypeError(f"transforms must be cnf transforms; got {type(part).__name__}.")
    for part, following in itertools.pairwise(chain):
        name, next_name = type(part).__name__, type(following).__name__
        if len(following.event_shape) != 1:
            raise ValueError(
                "only the first of the transforms may take events that are not vectors; "
                f"{next_name} takes {tuple(following.event_shape)} and comes after {name}."
            )
        if part.base_features != following.features:
            raise ValueError(
                "each of the transforms must take as many features as the one before it gives; "
                f"{name} gives {part.base_features} and {next_name} takes {following.features}."
            )
    return chain


def base_for(transforms: Sequence[Transform], base: Base | None) -> Base:
    """`base`, if it fits the end of the chain; for None a standard normal that does.

    Raises:
        TypeError: If `base` is of another type.
        ValueError: If it does not fit, dtypes differ, or neither it nor any transform is given.
    """
    if base is None:
        if not transforms:
            raise ValueError("transforms must not be empty when base is None.")
        like = reference_tensor(nn.ModuleList(transforms))
        base = StandardNormal(transforms[-1].base_features).to(like)
    if not isinstance(base, Base):
        raise TypeError(
            f"base must be a cnf.bases.Base, such as StandardNormal; got {type(base).__name__}."
        )
    if transforms and transforms[-1].base_features != base.features:
        raise ValueError(
            "base must have as many features as the last of the transforms gives; "
            f"{type(transforms[-1]).__name__} gives {transforms[-1].base_features}, and base has "
            f"{base.features}."
        )
    _check_one_dtype([*transforms, base])
    return base


def agreed_context_features(transforms: Sequence[Transform]) -> int:
    """Size of the context that the transforms take; 0 if none takes one.

    Raises:
        ValueError: If they take contexts of different sizes.
    """
    sizes = {transform.context_features for transform in transforms} - {0}
    if len(sizes) > 1:
        raise ValueError(f"transforms must agree on context_features; got {sorted(sizes)}.")
    return sizes.pop() if sizes else 0


def context_for(part: Transform, context: Tensor | None) -> Tensor | None:
    """The context, if this part of a conditional chain takes one."""
    return context if part.context_features else None


def weakest_likelihood(transforms: Sequence[Transform]) -> Likelihood:
    """The weakest kind among the transforms, in the order of `Likelihood`."""
    kinds = [transform.likelihood for transform in transforms]
    return max(kinds, key=_STRONGEST_FIRST.index, default="exact")


def likelihoods(transforms: Sequence[Transform]) -> set[Likelihood]:
    """Every kind among the transforms and their parts."""
    parts = [part for transform in transforms for part in transform.modules()]
    return {part.likelihood for part in parts if isinstance(part, Transform)}


def check_importance_samples(transforms: Sequence[Transform], importance_samples: int) -> None:
    """Refuse more than one importance sample where the mean of weights is no better bound.

    Raises:
        TypeError: If `importance_samples` is not an int.
        ValueError: If it is less than 1, or more although the likelihood is no lower bound or has
            a part that is an estimate.
    """
    check_count("importance_samples", importance_samples)
    kinds = likelihoods(transforms)
    if importance_samples > 1 and "lower_bound" not in kinds:
        raise ValueError(
            "importance_samples must be 1 unless the likelihood is a lower bound; "
            f"got {importance_samples} for one that is {weakest_likelihood(transforms)!r}."
        )
    if importance_samples > 1 and kinds & {"estimate", "biased_estimate"}:
        raise ValueError(
            "importance_samples must be 1 where a part of the likelihood is an estimate, for the "
            f"mean of such weights is no bound; got {importance_samples}. "
            "Perhaps use flow.using(divergence=Exact()), or log_det=ExactLogDet()."
        )


def joint_support(transforms: Sequence[Transform]) -> constraints.Constraint:
    """Which x the first transform may be given, as a constraint of whole events."""
    stated = (part.support for part in transforms if part.support is not None)
    support = next(stated, constraints.real_vector)
    more_axes = _event_dim(transforms) - 1
    return constraints.independent(support, more_axes) if more_axes else support


def initialize(
    transforms: Sequence[Transform],
    x: Events,
    context: Context | None,
    *,
    generator: Generator | None,
) -> None:
    """Set what depends on data in each part from what the parts before it make of the rows."""
    last = max((i for i, part in enumerate(transforms) if part.awaits_data), default=-1)
    for i, part in enumerate(transforms[: last + 1]):
        given = context_for(part, context)
        part.initialize(x, given, generator=generator)
        if i < last:
            x = part.to_base(x, given, generator=generator)


def to_base(
    transforms: Sequence[Transform],
    x: Events,
    context: Context | None,
    *,
    generator: Generator | None,
) -> BaseRows:
    """From data to base."""
    for part in transforms:
        x = part.to_base(x, context_for(part, context), generator=generator)
    _refuse_overflow("x", x, event_dim=1)
    return x


def to_data(
    transforms: Sequence[Transform],
    z: BaseRows,
    context: Context | None,
    *,
    generator: Generator | None,
) -> Events:
    """From base to data."""
    for part in reversed(transforms):
        z = part.to_data(z, context_for(part, context), generator=generator)
    _refuse_overflow("z", z, event_dim=_event_dim(transforms))
    return z


def to_base_and_ladj(
    transforms: Sequence[Transform],
    x: Events,
    context: Context | None,
    *,
    generator: Generator | None,
) -> tuple[BaseRows, Values]:
    """From data to base: z and ladj, in nats."""
    total = x.new_zeros(x.shape[: x.ndim - _event_dim(transforms)])
    for part in transforms:
        x, ladj = part.to_base_and_ladj(x, context_for(part, context), generator=generator)
        total = total + ladj
    _refuse_overflow("x", x, total, event_dim=1)
    return x, total


def to_data_and_ladj(
    transforms: Sequence[Transform],
    z: BaseRows,
    context: Context | None,
    *,
    generator: Generator | None,
) -> tuple[Events, Values]:
    """From base to data: x and ladj, in nats."""
    total = z.new_zeros(z.shape[:-1])
    for part in reversed(transforms):
        z, ladj = part.to_data_and_ladj(z, context_for(part, context), generator=generator)
        total = total + ladj
    _refuse_overflow("z", z, total, event_dim=_event_dim(transforms))
    return z, total


def to_base_with_costs(
    transforms: Sequence[Transform],
    x: Events,
    context: Context | None,
    *,
    regularizers: Sequence[CostRate],
    generator: Generator | None,
) -> tuple[BaseRows, Values, Costs]:
    """From data to base: z, ladj in nats, and the cost of the path by each regularizer."""
    ladj = x.new_zeros(x.shape[: x.ndim - _event_dim(transforms)])
    costs = x.new_zeros(len(regularizers), *ladj.shape)
    for part in transforms:
        x, further, spent = part.to_base_with_costs(
            x, context_for(part, context), regularizers=regularizers, generator=generator
        )
        ladj, costs = ladj + further, costs + spent
    _refuse_overflow("x", x, ladj, event_dim=1)
    return x, ladj, costs


def _refuse_overflow(
    name: str, moved: Tensor, ladj: Tensor | None = None, *, event_dim: int
) -> None:
    """Refuse rows that were moved out of the range of their dtype.

    A ladj may be infinite: a surjection to the data has the density 0 of what it drops.
    """
    if all_finite((moved,) if ladj is None else (moved, ladj)):
        return
    bad = non_finite_rows(moved.detach(), event_dim)
    refuse_overflow(name, bad, "what the flow makes of it", moved.dtype)
    if ladj is not None:
        refuse_overflow(name, ladj.detach().isnan(), "the ladj", moved.dtype)


def _event_dim(transforms: Sequence[Transform]) -> int:
    return len(transforms[0].event_shape) if transforms else 1


def _check_one_dtype(parts: Sequence[nn.Module]) -> None:
    tensors = itertools.chain(*((*part.parameters(), *part.buffers()) for part in parts))
    dtypes = {str(tensor.dtype) for tensor in tensors if tensor.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(
            f"transforms and base must have one dtype; got {', '.join(sorted(dtypes))}. Convert "
            "a part with part.to(torch.float32), or the data that Standardize.from_data is given."
        )
