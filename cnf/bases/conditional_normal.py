"""Diagonal Gaussian whose mean and standard deviation depend on a context."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from cnf._checks import check_count, check_number, check_widths, is_positive
from cnf.bases.base import Base


class ConditionalNormal(Base):
    """Gaussian with independent features, given a context.

    A network maps the context to the means, and the logarithms of the standard deviations behind
    them. It sees the context as it comes; transforms that hold such a base scale theirs. A new one
    is standard normal.

    Args:
        features: Size of z.
        context_features: Size of the context.
        hidden_features: Widths of the hidden layers, with SiLU between them; ``()`` for an affine
            map.
        conditioner: Module in place of that network, with ``2 * features`` outputs, such as
            `cnf.transforms.ConvConditioner`.
        bound: Bound c on the logarithms s of the standard deviations, ``s = c tanh(r / c)``, so
            that draws do not explode far from the data; None for no bound.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range.

    Example:
        >>> base = ConditionalNormal(2, 3, hidden_features=(8,))
        >>> base.log_prob(torch.zeros(2), torch.ones(3)).item()  # -log(2 pi)
        -1.837877...
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        hidden_features: Sequence[int] = (64, 64),
        conditioner: nn.Module | None = None,
        bound: float | None = None,
    ) -> None:
        super().__init__(features, check_count("context_features", context_features))
        self.hidden_features = check_widths("hidden_features", hidden_features, least=0)
        self.conditioner = conditioner
        self.bound = bound
        if bound is not None:
            expected = "positive and finite, or None"
            self.bound = check_number("bound", bound, expected, is_positive)
        self.network: nn.Module | None = None
        if conditioner is None:
            self.network = self._make_network()

    def extra_repr(self) -> str:
        """Sizes of z and of the context."""
        return f"features={self.features}, context_features={self.context_features}"

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        mean, log_std = self._mean_and_log_std(context, z)
        noise = (z - mean) * (-log_std).exp()
        return (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        mean, log_std = self._mean_and_log_std(context, context)
        noise = torch.randn(
            *shape, self.features, generator=generator, dtype=mean.dtype, device=mean.device
        )
        return mean + log_std.exp() * noise

    def _mean_and_log_std(
        self, context: Tensor | None, like: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if context is None or like is None:
            raise ValueError(
                f"context must have shape (*batch, {self.context_features}) for a "
                "ConditionalNormal; got None."
            )
        network = self.conditioner if self.network is None else self.network
        # Autocast lowers the dtype.
        mean, log_std = network(context).to(like.dtype).chunk(2, -1)  # type: ignore[misc]
        if self.bound is not None:
            log_std = self.bound * (log_std / self.bound).tanh()
        return mean, log_std

    def _make_network(self) -> nn.Sequential:
        widths = [self.context_features, *self.hidden_features]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        last = nn.Linear(widths[-1], 2 * self.features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(*layers, last)
