"""Standard normal base."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, Independent, Normal

from cnf.bases.base import Base


class StandardNormal(Base):
    """Standard normal distribution: independent features of mean 0 and variance 1.

    Args:
        features: Size of z.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.

    Example:
        >>> StandardNormal(2).log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        # Carries dtype and device through .to(); not stored in a state dict.
        self.register_buffer("loc", torch.zeros(features), persistent=False)
        self.loc: Tensor

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        log_normalizer = 0.5 * self.features * math.log(2 * math.pi)
        return -0.5 * z.square().sum(-1) - log_normalizer

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        like = self.loc
        return torch.randn(
            *shape, self.features, generator=generator, dtype=like.dtype, device=like.device
        )

    def distribution(
        self, batch_shape: Sequence[int] = (), context: Tensor | None = None
    ) -> Distribution:
        """Return this base as a `torch.distributions.Distribution`."""
        loc = self.loc.expand(*batch_shape, self.features)
        return Independent(Normal(loc, torch.ones_like(loc), validate_args=False), 1)
