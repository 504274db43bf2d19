"""Half-normal base, on the numbers of at least 0."""

import math

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf.bases.base import Base


class HalfNormal(Base):
    """Absolute values of a standard normal: independent features of at least 0.

    It fits behind a transform whose results are not negative, such as `cnf.transforms.Abs`.

    Args:
        features: Size of z.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.

    Example:
        >>> HalfNormal(2).log_prob(torch.tensor([[0.0, 0.0], [0.0, -1.0]]))
        tensor([-0.4516,    -inf])
    """

    support = constraints.independent(constraints.nonnegative, 1)

    def __init__(self, features: int) -> None:
        super().__init__(features)
        # Carries dtype and device through .to(); not stored in a state dict.
        self.register_buffer("loc", torch.zeros(features), persistent=False)
        self.loc: Tensor

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        log_normalizer = 0.5 * self.features * math.log(math.pi / 2)
        log_prob = -0.5 * z.square().sum(-1) - log_normalizer
        return torch.where((z >= 0).all(-1), log_prob, -math.inf)

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        like = self.loc
        return torch.randn(
            *shape, self.features, generator=generator, dtype=like.dtype, device=like.device
        ).abs()
