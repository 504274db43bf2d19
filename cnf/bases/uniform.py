"""Uniform base on a manifold, and bases side by side."""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution, constraints

from cnf._checks import check_type
from cnf.bases.base import Base
from cnf.bases.distribution import BaseDistribution
from cnf.bases.standard_normal import StandardNormal
from cnf.manifolds import Euclidean, Manifold, OnManifold, Product


class UniformOnManifold(Base):
    """Uniform distribution on a compact manifold: the density is 1 over its volume.

    Args:
        manifold: The manifold, such as ``Sphere(3)``.

    Raises:
        TypeError: If `manifold` is not a `Manifold`.
        ValueError: If it is not compact.

    Example:
        >>> from cnf.manifolds import Sphere
        >>> UniformOnManifold(Sphere(3)).log_prob(torch.tensor([0.0, 1.0, 0.0]))
        tensor(-2.5310)
    """

    def __init__(self, manifold: Manifold) -> None:
        check_type("manifold", manifold, Manifold, "use Sphere(3) or Torus(2)")
        if manifold.log_volume == math.inf:
            raise ValueError(
                f"manifold must be compact; got {manifold}. Use base_on(manifold), which is a "
                "standard normal on Euclidean factors."
            )
        super().__init__(manifold.features)
        self.manifold = manifold
        # Carries dtype and device through .to(); not stored in a state dict.
        self.register_buffer("like", torch.zeros(()), persistent=False)
        self.like: Tensor

    @property
    def support(self) -> constraints.Constraint:
        """The manifold."""
        return self.manifold.support

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        density = z.new_full(z.shape[:-1], -self.manifold.log_volume)
        return density.where(self.manifold.contains(z), -math.inf)

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        return self.manifold.rand(shape, like=self.like, generator=generator)

    def distribution(
        self, batch_shape: Sequence[int] = (), context: Tensor | None = None
    ) -> Distribution:
        """Return this base as a `torch.distributions.Distribution`."""
        return BaseDistribution(self, batch_shape)


class ProductBase(Base):
    """Independent bases side by side: each takes the next columns of z.

    Args:
        bases: Bases without a context, each on a manifold or on all real vectors, from the first to
            the last columns.

    Raises:
        TypeError: If a part is not a `Base`.
        ValueError: If there are none, or one takes a context or has another support.

    Example:
        >>> from cnf.manifolds import Torus
        >>> base = ProductBase([UniformOnManifold(Torus(1)), StandardNormal(2)])
        >>> base.log_prob(torch.zeros(3))
        tensor(-3.6758)
    """

    def __init__(self, bases: Iterable[Base]) -> None:
        parts = list(bases)
        for part in parts:
            check_type("each of bases", part, Base, "use UniformOnManifold or StandardNormal")
            if part.context_features:
                raise ValueError(
                    f"bases must take no context; {type(part).__name__} takes one of "
                    f"{part.context_features}."
                )
        if not parts:
            raise ValueError("bases must hold at least one base; got none.")
        super().__init__(sum(part.features for part in parts))
        self.bases = nn.ModuleList(parts)
        self.manifold = Product([_manifold_of(part) for part in parts])

    @property
    def _parts(self) -> list[Base]:
        return cast("list[Base]", list(self.bases))

    @property
    def support(self) -> constraints.Constraint:
        """Product of the manifolds of the parts."""
        return self.manifold.support

    @property
    def has_rsample(self) -> bool:
        """Whether the draws of every part have gradients."""
        return all(part.has_rsample for part in self._parts)

    @property
    def needs_initialization(self) -> bool:
        """Whether a part has yet to set something from data."""
        return any(part.needs_initialization for part in self._parts)

    def _initialize(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        for base, part in zip(self._parts, self.manifold.split(z), strict=True):
            base.initialize(part, generator=generator)

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        parts = zip(self._parts, self.manifold.split(z), strict=True)
        return torch.stack([base.log_prob(part, generator=generator) for base, part in parts]).sum(
            0
        )

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        return torch.cat([base.rsample(shape, generator=generator) for base in self._parts], -1)

    def distribution(
        self, batch_shape: Sequence[int] = (), context: Tensor | None = None
    ) -> Distribution:
        """Return this base as a `torch.distributions.Distribution`."""
        return BaseDistribution(self, batch_shape)


def base_on(manifold: Manifold) -> Base:
    """Return the usual base on a manifold: uniform, and standard normal on Euclidean factors.

    Example:
        >>> from cnf.manifolds import Sphere
        >>> base_on(Product([Sphere(3), Euclidean(2)]))
        ProductBase(
          (bases): ModuleList(
            (0): UniformOnManifold()
            (1): StandardNormal()
          )
        )
    """
    if isinstance(manifold, Product):
        return ProductBase(map(base_on, manifold.factors))
    if isinstance(manifold, Euclidean):
        return StandardNormal(manifold.features)
    return UniformOnManifold(manifold)


def _manifold_of(base: Base) -> Manifold:
    if isinstance(base.support, OnManifold):
        return base.support.manifold
    if repr(base.support) != repr(constraints.real_vector):  # torch compares by identity
        raise ValueError(
            "each of bases must be on a manifold or on all real vectors; the support of "
            f"{type(base).__name__} is {base.support}."
        )
    return Euclidean(base.features)
