"""Chain of transforms, from data to base, with the checks that its parts fit together."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import cast, overload

import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints

from cnf._checks import all_finite, check_count, non_finite_rows, reference_tensor, refuse_overflow
from cnf.bases import Base, Likelihood, StandardNormal, base_on, weakest
from cnf.bases.ordered_normal import OrderedVector
from cnf.manifolds import OnManifold
from cnf.regularizers import CostRate
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.reshape import Flatten, Rearrangement
from cnf.transforms.support.constraints import covers, is_symmetric


class Chain(Transform):
    """Composition of transforms, from data to base: a transform, and a sequence of transforms.

    The transforms are its children ``0``, ``1``, …; ``chain[0]`` is next to the data, and
    ``chain[1:]`` is a chain of the others. All conditional transforms get the same context.

    Args:
        transforms: From data to base; each takes as many features as the one before it gives.
        features: Size of x, for a chain without transforms, the identity.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the transforms do not fit together, or differ from `features`; or if there
            are none and `features` is None.

    Example:
        >>> from cnf.transforms import Affine, Permute
        >>> chain = Chain([Affine(2), Permute([1, 0])])
        >>> chain.to_base(torch.tensor([1.0, 2.0])).tolist()
        [2.0, 1.0]
        >>> len(chain), len(chain[1:])
        (2, 1)
    """

    base_features: int = 0
    """Number of entries of z."""
    event_shape: torch.Size = torch.Size()
    """Shape of a single x."""
    support: constraints.Constraint | None = None
    """Constraint on x, by the first transform with a support; None if there is none."""
    codomain: constraints.Constraint | None = None
    """Constraint on z, by the last transform with a codomain; None if there is none."""

    def __init__(self, transforms: Iterable[Transform], features: int | None = None) -> None:
        parts = as_list(transforms)
        _check_neighbours(parts)
        if features is None:
            if not parts:
                raise ValueError("transforms must hold at least one transform; got none.")
            features = parts[0].features
        elif parts and features != parts[0].features:
            raise ValueError(
                f"features must be the {parts[0].features} that the first of the transforms "
                f"takes; got {features}."
            )
        super().__init__(features, agreed_context_features(parts))
        for place, part in enumerate(parts):
            self.add_module(str(place), part)
        if parts:
            self.event_shape = parts[0].event_shape
            self.base_features = parts[-1].base_features
        else:
            self.event_shape = torch.Size([self.features])
            self.base_features = self.features
        self.support = next((part.support for part in parts if part.support is not None), None)
        self.codomain = _codomain(parts)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Transform]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    @overload
    def __getitem__(self, index: int) -> Transform: ...

    @overload
    def __getitem__(self, index: slice) -> "Chain": ...

    def __getitem__(self, index: int | slice) -> "Transform | Chain":
        if not isinstance(index, slice):
            return self.transforms[index]
        chosen = self.transforms[index]
        if chosen:
            return Chain(chosen)
        start, _, _ = index.indices(len(self))
        return Chain([], [*(part.features for part in self), self.base_features][start])

    @property
    def transforms(self) -> list[Transform]:
        """Transforms as a list, from data to base."""
        return cast("list[Transform]", list(self._modules.values()))

    @property
    def likelihood(self) -> Likelihood:
        """Weakest kind among the transforms, in the order of `Likelihood`."""
        return weakest(part.likelihood for part in self)

    @property
    def likelihoods(self) -> set[Likelihood]:
        """All kinds among the transforms and their parts."""
        return {part.likelihood for part in self.modules() if isinstance(part, Transform)}

    @property
    def onto_surface(self) -> "Chain":
        """Transforms up to the last that covers a surface alone; all, if every one covers space."""
        flat = [place for place, part in enumerate(self) if part.likelihood == "on_manifold"]
        return self[: flat[-1] + 1] if flat else self

    @property
    def stochastic_to_base(self) -> bool:
        """Whether a transform draws on the way to the base."""
        return any(part.stochastic_to_base for part in self)

    @property
    def stochastic_to_data(self) -> bool:
        """Whether a transform draws on the way to the data."""
        return any(part.stochastic_to_data for part in self)

    @property
    def is_bijective(self) -> bool:
        """Whether all transforms are bijective."""
        return all(part.is_bijective for part in self)

    @property
    def needs_initialization(self) -> bool:
        """Whether a transform needs initialisation."""
        return any(part.needs_initialization for part in self)

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        # Each transform is initialised from the rows as the transforms before it map them.
        last = max(i for i, part in enumerate(self) if part.needs_initialization)
        for i, part in enumerate(self):
            given = context if part.context_features else None
            part.initialize(x, given, generator=generator)
            if i == last:
                return
            x = part.to_base(x, given, generator=generator)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        total = x.new_zeros(x.shape[: x.ndim - len(self.event_shape)])
        for part in self.transforms:
            x, ladj = part._to_base(x, context if part.context_features else None, generator)
            total = _sum(total, ladj, part, x.ndim - 1)
        _refuse_overflow("x", x, total, event_dim=1)
        return x, total

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        total = z.new_zeros(z.shape[:-1])
        for part in reversed(self.transforms):
            z, ladj = part._to_data(z, context if part.context_features else None, generator)
            total = _sum(total, ladj, part, z.ndim - len(part.event_shape))
        _refuse_overflow("z", z, total, event_dim=len(self.event_shape))
        return z, total

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        total = torch.zeros_like(x)
        for part in self:
            given = context if part.context_features else None
            total = part._rearranged(total) + part._contributions(x, given)
            x = part._to_base_value(x, given, None)
        return total

    def _rearranged(self, numbers: Tensor) -> Tensor:
        for part in self:
            numbers = part._rearranged(numbers)
        return numbers

    def _to_base_value(
        self, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        for part in self:
            x = part._to_base_value(x, context if part.context_features else None, generator)
        _refuse_overflow("x", x, event_dim=1)
        return x

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        for part in reversed(self.transforms):
            z = part._to_data_value(z, context if part.context_features else None, generator)
        _refuse_overflow("z", z, event_dim=len(self.event_shape))
        return z

    def _to_base_with_costs(
        self,
        x: Tensor,
        context: Tensor | None,
        generator: Generator | None,
        regularizers: Sequence[CostRate],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ladj = x.new_zeros(x.shape[: x.ndim - len(self.event_shape)])
        costs = x.new_zeros(len(regularizers), *ladj.shape)
        for part in self:
            x, further, spent = part.to_base_with_costs(
                x,
                context if part.context_features else None,
                regularizers=regularizers,
                generator=generator,
            )
            ladj, costs = ladj + further, costs + spent
        _refuse_overflow("x", x, ladj, event_dim=1)
        return x, ladj, costs


def as_list(transforms: Iterable[Transform]) -> list[Transform]:
    """Return a checked list of transforms."""
    if isinstance(transforms, Chain):
        return transforms.transforms
    if isinstance(transforms, Transform):
        raise TypeError("transforms must be a list; put the single transform in brackets.")
    if isinstance(transforms, str | Tensor) or not isinstance(transforms, Iterable):
        raise TypeError(f"transforms must be a list; got {type(transforms).__name__}.")
    parts = list(transforms)
    for part in parts:
        if not isinstance(part, Transform):
            raise TypeError(f"transforms must be cnf transforms; got {type(part).__name__}.")
    return parts


def base_for(transforms: Sequence[Transform], base: Base | None) -> Base:
    """Return `base`, after checks that it fits; for None a standard normal, or `base_on`."""
    if base is None:
        if not transforms:
            raise ValueError("transforms must not be empty when base is None.")
        like = reference_tensor(nn.ModuleList(transforms))
        codomain = _codomain(transforms)
        if isinstance(codomain, OnManifold):
            base = base_on(codomain.manifold).to(like)
        else:
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
    if transforms:
        check_covered(transforms, "base", base.support)
        _refuse_moved(transforms, "base", base.support)
        _refuse_stretched(base, transforms)
    agreed_context_features([*transforms, base])
    _check_one_dtype([*transforms, base])
    return base


def check_covered(parts: Sequence[Transform], name: str, support: constraints.Constraint) -> None:
    """Refuse parts whose codomain does not cover a support, and would lose density.

    If z is drawn, the likelihood is still a lower bound.
    """
    codomain = _codomain(parts)
    last = next((part for part in reversed(parts) if part.codomain is not None), parts[-1])
    if codomain is None or last.stochastic_to_base or covers(codomain, support):
        return
    raise ValueError(
        f"{name} must have its density within the codomain of {type(last).__name__}, {codomain}; "
        f"it is on {support}, so some would be lost. {_remedy(codomain)}"
    )


def _remedy(codomain: constraints.Constraint) -> str:
    """Return what may follow a transform with this codomain."""
    if isinstance(codomain, OrderedVector):
        return "Choose OrderedNormal as base, or put LogGaps between them."
    base = "a base with that support"
    if covers(codomain, constraints.nonnegative) and not covers(codomain, constraints.real):
        base += ", such as HalfNormal"
    return (
        f"Choose {base}, or put a transform between them that maps the codomain to the real "
        "numbers, such as Logit, Unconstrain, or FromTorch of a torch transform."
    )


def check_importance_samples(kinds: set[Likelihood], importance_samples: int) -> None:
    """Refuse several importance samples if the parts of these kinds give no tighter bound."""
    check_count("importance_samples", importance_samples)
    if importance_samples == 1:
        return
    if "lower_bound" not in kinds:
        raise ValueError(
            "importance_samples must be 1 unless the likelihood is a lower bound; "
            f"got {importance_samples} for one that is {weakest(kinds)!r}."
        )
    if kinds - {"exact", "lower_bound"}:
        raise ValueError(
            "importance_samples must be 1 where a part of the likelihood is an estimate: the "
            f"mean of such weights is no bound; got {importance_samples}. "
            "Perhaps use flow.using(divergence=Exact()), or log_det=ExactLogDet()."
        )


def _check_neighbours(parts: Sequence[Transform]) -> None:
    for part, following in itertools.pairwise(parts):
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
    for place, part in enumerate(parts):
        _refuse_stretched(part, parts[:place])
    for place, part in enumerate(parts[1:], start=1):
        if part.support is not None:
            check_covered(parts[:place], type(part).__name__, part.support)
            _refuse_moved(parts[:place], type(part).__name__, part.support)


def _refuse_stretched(part: Transform | Base, before: Sequence[Transform]) -> None:
    """Refuse a part onto a surface behind others, which would stretch its surface."""
    stretching = [other for other in before if not isinstance(other, Rearrangement)]
    if stretching and part.likelihood == "on_manifold":
        raise ValueError(
            f"{type(part).__name__} must stand first of the transforms, or behind Flatten and "
            "Permute alone, because others stretch its surface by a factor that is not their "
            f"ladj; got {type(stretching[0]).__name__} before it. Prepare the data with it, "
            "or learn a Similarity within a ConformalEmbedding."
        )


def _refuse_moved(parts: Sequence[Transform], name: str, support: constraints.Constraint) -> None:
    """Refuse parts that pass a support on, but move features that it tells apart."""
    for part in reversed(parts):
        if part.support is not None:
            return
        if isinstance(part, Chain):
            _refuse_moved(part.transforms, name, support)
        elif not (
            isinstance(part, Flatten)
            or is_symmetric(support, together=getattr(part, "point_features", 1))
        ):
            raise ValueError(
                f"{name} must have the same support in all features behind {type(part).__name__}, "
                f"which moves them; got {support}. Put {type(part).__name__} behind it, or behind "
                "a transform to the real numbers."
            )


def _codomain(parts: Sequence[Transform]) -> constraints.Constraint | None:
    """Return the codomain of the last part that has one."""
    return next((part.codomain for part in reversed(parts) if part.codomain is not None), None)


def agreed_context_features(parts: Sequence[Transform | Base]) -> int:
    """Return the size of the context that the parts take, 0 for none; refuse different sizes."""
    sizes = {part.context_features for part in parts} - {0}
    if len(sizes) > 1:
        raise ValueError(
            f"transforms and base must agree on context_features; got {sorted(sizes)}."
        )
    return sizes.pop() if sizes else 0


def _sum(total: Tensor, ladj: Tensor, part: Transform, batch_axes: int) -> Tensor:
    """Add the ladj of a part, unless it would broadcast rows against rows."""
    if ladj.ndim > batch_axes:
        raise ValueError(
            f"{type(part).__name__} must return a ladj for each row, with {batch_axes} axes; got "
            f"shape {tuple(ladj.shape)}."
        )
    return total + ladj


def _refuse_overflow(
    name: str, moved: Tensor, ladj: Tensor | None = None, *, event_dim: int
) -> None:
    """Refuse rows that overflowed their dtype.

    A ladj may be infinite, if a surjection drops features of density 0.
    """
    if all_finite((moved,) if ladj is None else (moved, ladj)):
        return
    bad = non_finite_rows(moved.detach(), event_dim)
    refuse_overflow(name, bad, "the result of the flow", moved.dtype)
    if ladj is not None:
        refuse_overflow(name, ladj.detach().isnan(), "the ladj", moved.dtype)


def _check_one_dtype(parts: Sequence[nn.Module]) -> None:
    tensors = itertools.chain(*((*part.parameters(), *part.buffers()) for part in parts))
    dtypes = {str(tensor.dtype) for tensor in tensors if tensor.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(
            f"transforms and base must have one dtype; got {', '.join(sorted(dtypes))}. Convert "
            "a part with part.to(torch.float32), or the data that Standardize.from_data is given."
        )
