"""Normal base of a code and a narrow remainder."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, Independent, Normal

from cnf._checks import check_count, check_number, is_positive
from cnf.bases.base import Base


class NarrowNormal(Base):
    """Normal distribution, standard in the first features and narrow in the others.

    The first features are a code, and the others a remainder that is near zero, so that little is
    lost without it: see `cnf.flows.PseudoInvertibleEncoder`.

    Args:
        features: Size of z.
        code_features: Number of the first features, with standard deviation 1.
        std: Standard deviation of the others.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size or `std` is out of range.

    References:
        Beitler, Sosnovik & Smeulders (2018), PIE: Pseudo-Invertible Encoder.
        https://arxiv.org/abs/2111.00619

    Example:
        >>> base = NarrowNormal(3, code_features=2, std=0.1)
        >>> base.log_prob(torch.tensor([1.0, 0.0, 0.1])).item()  # -1.5 log(2 pi) + log(10) - 1
        -1.45423...
    """

    def __init__(self, features: int, code_features: int, *, std: float = 0.1) -> None:
        super().__init__(features)
        self.code_features = check_count("code_features", code_features, most=self.features - 1)
        self.std = check_number("std", std, "positive and finite", is_positive)
        scale = torch.ones(features)
        scale[code_features:] = std
        # Carries dtype and device through .to(); not stored in a state dict.
        self.register_buffer("_scale", scale, persistent=False)
        self._scale: Tensor

    def extra_repr(self) -> str:
        """Sizes of code and remainder, and the standard deviation."""
        return f"{self.features}, code_features={self.code_features}, std={self.std}"

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        log_normalizer = 0.5 * self.features * math.log(2 * math.pi) + self._scale.log().sum()
        return -0.5 * (z / self._scale).square().sum(-1) - log_normalizer

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        like = self._scale
        noise = torch.randn(
            *shape, self.features, generator=generator, dtype=like.dtype, device=like.device
        )
        return noise * like

    def distribution(
        self, batch_shape: Sequence[int] = (), context: Tensor | None = None
    ) -> Distribution:
        """Return this base as a `torch.distributions.Distribution`."""
        scale = self._scale.expand(*batch_shape, self.features)
        return Independent(Normal(torch.zeros_like(scale), scale, validate_args=False), 1)
