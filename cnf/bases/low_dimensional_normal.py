"""Base that is drawn from few random numbers, and has no density."""

import itertools
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from cnf._checks import check_count, check_widths
from cnf.bases.base import Base, Likelihood


class LowDimensionalNormal(Base):
    r"""Prior of a dimensionality-reduction flow: :math:`z = g(\epsilon)`, with few normal numbers.

    Draws fill a surface of fewer dimensions than z has features, off which there are none, so that
    a flow with this base has *no* density: its draws can be compared with data, as by an energy
    distance, and `rsample` is differentiable. Bases with a density on and near such a surface are
    `NarrowNormal`, of a `PseudoInvertibleEncoder`, and any base behind a `ConformalEmbedding`.

    Args:
        features: Size of z.
        noise_features: Number of normal numbers, less than `features`.
        hidden_features: Widths of the hidden layers of the network g, with SiLU between them;
            ``()`` for an affine map.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range; and by `log_prob`, always.

    References:
        Das, Abbeel & Spanos (2019), Dimensionality Reduction Flows.

    Example:
        >>> base = LowDimensionalNormal(3, 1)
        >>> base.rsample(torch.Size([5])).shape, base.likelihood
        (torch.Size([5, 3]), 'not_a_likelihood')
    """

    def __init__(
        self, features: int, noise_features: int, *, hidden_features: Sequence[int] = (64, 64)
    ) -> None:
        super().__init__(features)
        self.noise_features = check_count("noise_features", noise_features)
        if self.noise_features >= self.features:
            raise ValueError(
                f"noise_features must be less than the {self.features} features; got "
                f"{self.noise_features}. With as many, use StandardNormal."
            )
        self.hidden_features = check_widths("hidden_features", hidden_features, least=0)
        widths = (self.noise_features, *self.hidden_features)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(widths[-1], self.features)

    def extra_repr(self) -> str:
        """Sizes of z and of the noise."""
        return f"features={self.features}, noise_features={self.noise_features}"

    @property
    def likelihood(self) -> Likelihood:
        """Always "not_a_likelihood"."""
        return "not_a_likelihood"

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        raise ValueError(
            f"base has no log-density: it draws {self.features} features from "
            f"{self.noise_features} numbers. For one, use a PseudoInvertibleEncoder, or a "
            "ConformalEmbedding trained by ManifoldLikelihood."
        )

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        like = self.last.weight
        noise = torch.randn(
            *shape, self.noise_features, generator=generator, dtype=like.dtype, device=like.device
        )
        z: Tensor = self.last(self.layers(noise))
        return z.to(like.dtype)  # autocast lowers the dtype
