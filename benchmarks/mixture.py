"""A density of any dimension, and the training of a field that carries a normal to it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_COMPONENTS = 8


class Mixture:
    """Normals around random centres, with correlated features: each of about unit variance."""

    def __init__(self, features: int, generator: torch.Generator) -> None:
        self.features = features
        self.generator = generator
        self._centres = self._normal(_COMPONENTS)
        self._scales = torch.arange(1, features + 1) ** -0.5
        self._rotation = torch.linalg.qr(self._normal(features)).Q

    def bridge(self, rows: int, t: Tensor) -> tuple[Tensor, Tensor]:
        """Points at time t on straight lines from a standard normal to here, and x1 - x0."""
        x0 = self._normal(rows)
        chosen = torch.randint(_COMPONENTS, (rows,), generator=self.generator)
        spread = (self._normal(rows) * self._scales) @ self._rotation.T
        x1 = (self._centres[chosen] + spread) / 2**0.5
        return torch.lerp(x0, x1, t.unsqueeze(-1)), x1 - x0

    def sample(self, rows: int) -> Tensor:
        """Points of the density."""
        return self.bridge(rows, torch.tensor(1.0))[0]

    def _normal(self, rows: int) -> Tensor:
        return torch.randn(rows, self.features, generator=self.generator)


def train(
    velocity: Callable[[Tensor, Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    mixture: Mixture,
    *,
    steps: int,
    rows: int,
) -> None:
    """Regress ``velocity(t, x)`` on the velocities of straight lines."""
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for _ in range(steps):
        t = torch.rand(rows, generator=mixture.generator)
        x, wanted = mixture.bridge(rows, t)
        loss = (velocity(t, x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
