"""Torch distribution of a base that torch does not have."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from cnf.bases.base import Base


class BaseDistribution(Distribution):
    """Base without a context as a torch distribution of independent draws.

    Args:
        base: The base.
        batch_shape: Batch shape.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own form

    def __init__(self, base: Base, batch_shape: Sequence[int] = ()) -> None:
        self.base = base
        self.has_rsample = base.has_rsample
        super().__init__(torch.Size(batch_shape), torch.Size([base.features]), validate_args=False)

    def expand(
        self, batch_shape: Sequence[int], _instance: "BaseDistribution | None" = None
    ) -> "BaseDistribution":
        """Return the distribution for another batch shape."""
        del _instance
        return BaseDistribution(self.base, batch_shape)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the base."""
        return self.base.support

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of `value`, in nats."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.base.log_prob(value).expand(shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw."""
        return self.base.rsample(torch.Size(sample_shape) + self.batch_shape)
