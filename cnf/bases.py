"""Base distributions: where a flow starts, at t = 0."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from cnf._checks import check_count


class Base(nn.Module, ABC):
    """Distribution of z, ``(*batch, features)``.

    Args:
        features: Size of z.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = check_count("features", features)

    @property
    def has_rsample(self) -> bool:
        """Whether `rsample` has the gradient of its draws; else gradients must be off there."""
        return True

    @property
    def awaits_data(self) -> bool:
        """Whether something is still to be set from data by `initialize`."""
        return False

    def initialize(
        self, z: Float[Tensor, "rows features"], *, generator: torch.Generator | None = None
    ) -> None:
        """Set, once, what depends on the data, from the first rows that come; here nothing."""
        del z, generator

    @abstractmethod
    def log_prob(self, z: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch"]:
        """Log-density of `z`, in nats."""

    @abstractmethod
    def rsample(
        self, shape: torch.Size, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch features"]:
        """Draws of batch shape `shape`."""

    @abstractmethod
    def distribution(self, batch_shape: Sequence[int] = ()) -> Distribution:
        """The same as a `torch.distributions.Distribution`."""


class StandardNormal(Base):
    """Independent normal coordinates of mean 0 and variance 1.

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
        # Carries dtype and device through .to(), and nothing into a checkpoint.
        self.register_buffer("loc", torch.zeros(features), persistent=False)
        self.loc: Tensor

    def log_prob(self, z: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch"]:
        """Log-density of `z`, in nats."""
        log_normalizer = 0.5 * self.features * math.log(2 * math.pi)
        return -0.5 * z.square().sum(-1) - log_normalizer

    def rsample(
        self, shape: torch.Size, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch features"]:
        """Draws of batch shape `shape`."""
        return torch.randn(
            *shape,
            self.features,
            generator=generator,
            dtype=self.loc.dtype,
            device=self.loc.device,
        )

    def distribution(self, batch_shape: Sequence[int] = ()) -> Distribution:
        """The same as a `torch.distributions.Distribution`."""
        loc = self.loc.expand(*batch_shape, self.features)
        return Independent(Normal(loc, torch.ones_like(loc), validate_args=False), 1)
