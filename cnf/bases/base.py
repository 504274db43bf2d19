"""Base class of base distributions."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal, final, get_args

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution, constraints

from cnf._checks import check_count, refuse_overrides
from cnf._shapes import BaseRows, Context, Values

Likelihood = Literal[
    "exact", "estimate", "lower_bound", "biased_estimate", "on_manifold", "not_a_likelihood"
]
"""Kind of log-likelihood, the strongest first: exact up to rounding and solver tolerance; an
unbiased estimate; a lower bound; a biased estimate; the density on the surface that the flow
covers, as if every point were on it; or no likelihood."""

_STRONGEST_FIRST: tuple[Likelihood, ...] = get_args(Likelihood)


def weakest(kinds: Iterable[Likelihood]) -> Likelihood:
    """Return the weakest of some kinds, in the order of `Likelihood`; "exact" for none."""
    return max(kinds, key=_STRONGEST_FIRST.index, default="exact")


_HOOKS = {
    "log_prob": "_log_prob(z, context, generator)",
    "rsample": "_rsample(shape, context, generator)",
    "initialize": ("_initialize(z, context, generator), called while needs_initialization is true"),
}
"""Hooks that a subclass writes in place of final methods."""


class Base(nn.Module, ABC):
    """Base distribution of z, ``(*batch, features)``, perhaps given a context.

    The public methods are final; a subclass writes the hooks `_log_prob` and `_rsample` and, if it
    is initialised from data, `needs_initialization` and `_initialize`. A subclass without full
    support sets `support`.

    Args:
        features: Size of z.
        context_features: Size of the context; 0 for none.

    Raises:
        TypeError: If a size is not an int, or a subclass overrides a final method.
        ValueError: If a size is out of range.

    Example:
        >>> class Uniform(Base):
        ...     support = torch.distributions.constraints.unit_interval
        ...
        ...     def _log_prob(self, z, context, generator):
        ...         return torch.where(((z >= 0) & (z <= 1)).all(-1), 0.0, -torch.inf)
        ...
        ...     def _rsample(self, shape, context, generator):
        ...         return torch.rand(*shape, self.features, generator=generator)
        >>> Uniform(2).log_prob(torch.tensor([0.5, 2.0]))
        tensor(-inf)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that overrides a final method in place of its hook."""
        super().__init_subclass__(**kwargs)
        refuse_overrides(cls, Base, _HOOKS)

    def __init__(self, features: int, context_features: int = 0) -> None:
        super().__init__()
        self.features = check_count("features", features)
        self.context_features = check_count("context_features", context_features, least=0)

    @property
    def support(self) -> constraints.Constraint:
        """Numbers or vectors with a positive density."""
        return constraints.real_vector

    @property
    def likelihood(self) -> Likelihood:
        """Kind of likelihood of `log_prob`: the weakest among the parts."""
        parts: Iterable[Any] = (part for part in self.modules() if part is not self)
        return weakest(part.likelihood for part in parts if hasattr(type(part), "likelihood"))

    @property
    def has_rsample(self) -> bool:
        """Whether `rsample` is differentiable; else it must be called with gradients off."""
        return True

    @property
    def needs_initialization(self) -> bool:
        """Whether `initialize` has yet to set something from data."""
        return False

    @final
    @torch.no_grad()
    def initialize(
        self, z: BaseRows, context: Context | None = None, *, generator: Generator | None = None
    ) -> None:
        """Initialise from these rows, once: later calls change nothing.

        Raises:
            ValueError: If the rows are unsuitable, such as too few.
        """
        if not self.needs_initialization:
            return
        if context is not None and self.context_features:
            context = context.expand(*z.shape[:-1], -1).reshape(-1, self.context_features)
        else:
            context = None
        self._initialize(z.reshape(-1, self.features), context, generator)

    @final
    def log_prob(
        self, z: BaseRows, context: Context | None = None, *, generator: Generator | None = None
    ) -> Values:
        """Return the log-density of `z`, in nats; -inf outside of the support."""
        return self._log_prob(z, context if self.context_features else None, generator)

    @final
    def rsample(
        self,
        shape: torch.Size,
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> BaseRows:
        """Draw with batch shape `shape`, to which the batch axes of the context broadcast.

        Raises:
            ValueError: If they do not.
            NotImplementedError: If gradients are on, and the draws have none.
        """
        if not self.context_features:
            context = None
        if context is not None and not _broadcasts(context.shape[:-1], shape):
            raise ValueError(
                f"shape must end in the batch shape {tuple(context.shape[:-1])} of context, for a "
                f"draw of each; got {tuple(shape)}."
            )
        return self._rsample(shape, context, generator)

    @abstractmethod
    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        """Hook: return the log-density of each row."""

    @abstractmethod
    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        """Hook: draw with batch shape `shape`."""

    def _initialize(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        """Hook: initialise from data."""

    def distribution(
        self, batch_shape: Sequence[int] = (), context: Tensor | None = None
    ) -> Distribution:
        """Return this base as a `torch.distributions.Distribution`.

        Raises:
            NotImplementedError: If there is none.
        """
        raise NotImplementedError(f"{type(self).__name__} is no torch distribution.")


def _broadcasts(batch: torch.Size, shape: torch.Size) -> bool:
    """Return whether a batch shape broadcasts to a shape, and not the other way round."""
    pairs = zip(reversed(batch), reversed(shape), strict=False)
    return len(batch) <= len(shape) and all(size in (1, other) for size, other in pairs)
