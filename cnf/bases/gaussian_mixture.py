"""Gaussian mixture as a base."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal

from cnf._checks import check_count
from cnf._moments import check_rows_and_weight
from cnf._shapes import BaseRows
from cnf.bases.base import Base
from cnf.bases.mixture_fit import Mixture, fit_mixture

_NUMBERS_AT_ONCE = 4_000_000

AnyMixture = TypeVar("AnyMixture", bound="GaussianMixtureBase")


class GaussianMixtureBase(Base):
    """Gaussian mixture with full covariances, set from rows, once, and not trained.

    `from_data` combines mixtures of several sizes, and a single Gaussian, by their cross-validated
    likelihoods: see `cnf.bases.mixture_fit`. `initialize`, which `fit` calls, does the same for a
    base with 0 components, a standard normal until then.

    Args:
        features: Size of z.
        components: Number of components, for a state dict to be loaded; 0 for `initialize`.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> z = torch.randn(200, 2, generator=generator)
        >>> z[100:] += 5
        >>> base = GaussianMixtureBase.from_data(z)
        >>> bool(base.log_prob(z).mean() > -3.6)
        True
    """

    def __init__(self, features: int, components: int = 0) -> None:
        super().__init__(features)
        count = check_count("components", components, least=0)
        self.register_buffer("log_weights", torch.zeros(count).log_softmax(0))
        self.register_buffer("means", torch.zeros(count, self.features))
        self.register_buffer("scale_trils", torch.eye(self.features).repeat(count, 1, 1))
        self.log_weights: Tensor
        """Logarithm of the weight of each component, ``(components,)``."""
        self.means: Tensor
        """Mean of each component, ``(components, features)``."""
        self.scale_trils: Tensor
        """Cholesky factor of each covariance, ``(components, features, features)``."""

    @classmethod
    def from_data(
        cls: type[AnyMixture],
        z: BaseRows,
        *,
        weight: Float[Tensor, " rows"] | None = None,
        generator: Generator | None = None,
    ) -> AnyMixture:
        """Return the mixture for the rows of `z`, in their dtype and on their device.

        Args:
            z: Finite rows, ``(rows, features)``, at least two; 5000 of them are used, evenly from
                first to last.
            weight: Weight of each row, on any scale; None for equal weights.
            generator: Source of the initial components, on the CPU; None for a fixed seed.

        Raises:
            TypeError: If `z` is not a tensor.
            ValueError: If `z` is not a finite floating tensor of shape ``(rows, features)``, there
                are less than two rows of positive weight, or a feature is constant.
        """
        check_rows_and_weight("z", z, weight)
        base = cls(z.shape[-1]).to(z)
        base._set(fit_mixture(z, weight, generator))
        return base

    @property
    def components(self) -> int:
        """Number of components; 0 for a standard normal."""
        return len(self.log_weights)

    def extra_repr(self) -> str:
        """Number of features and components."""
        return f"{self.features}, components={self.components}"

    @property
    def needs_initialization(self) -> bool:
        """Whether there are no components yet."""
        return self.components == 0

    def _initialize(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        self._set(fit_mixture(z))

    def _set(self, mixture: Mixture) -> None:
        for name, value in mixture._asdict().items():
            setattr(self, name, value.to(self.means))

    def _mixture(self) -> Mixture:
        if self.components:
            return Mixture(self.log_weights, self.means, self.scale_trils)
        like = self.means
        eye = torch.eye(self.features, dtype=like.dtype, device=like.device)
        return Mixture(like.new_zeros(1), like.new_zeros(1, self.features), eye.unsqueeze(0))

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        # torch solves no linear systems in half precision.
        dtype = z.dtype if z.dtype == torch.float64 else torch.float32
        mixture = Mixture(*(part.to(dtype) for part in self._mixture()))
        log_prob = mixture.log_prob(z.reshape(-1, self.features).to(dtype))
        return log_prob.to(z.dtype).reshape(z.shape[:-1])

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        mixture = self._mixture()
        size = (*shape, self.features)
        like = self.means
        noise = torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)
        if noise.numel() == 0:
            return noise
        weights = mixture.log_weights.exp()
        number = noise.numel() // self.features
        chosen = torch.multinomial(weights, number, replacement=True, generator=generator)
        rows = max(1, _NUMBERS_AT_ONCE // self.features**2)
        parts = zip(
            chosen.split(rows), noise.reshape(-1, self.features, 1).split(rows), strict=True
        )
        moved = torch.cat([mixture.scale_trils[index] @ part for index, part in parts])
        return (mixture.means[chosen] + moved.squeeze(-1)).reshape(size)

    def distribution(
        self, batch_shape: Sequence[int] = (), context: Tensor | None = None
    ) -> Distribution:
        """Return this base as a `torch.distributions.Distribution`."""
        log_weights, means, scale_trils = self._mixture()
        parts = MultivariateNormal(means, scale_tril=scale_trils, validate_args=False)
        choice = Categorical(logits=log_weights, validate_args=False)
        one = MixtureSameFamily(choice, parts, validate_args=False)
        mixtures: Distribution = one.expand(torch.Size(batch_shape))
        return mixtures

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}log_weights")
        if found is not None and found.ndim == 1 and len(found) != self.components:
            empty = GaussianMixtureBase(self.features, len(found)).to(self.means)
            self._set(empty._mixture() if len(found) else Mixture(*empty.buffers()))
        super()._load_from_state_dict(state_dict, prefix, *args)
