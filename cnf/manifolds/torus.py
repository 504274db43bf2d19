"""Torus of angles; of one angle, the circle."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from cnf._checks import check_count
from cnf._shapes import EmbeddedRows, Rows, Times
from cnf.manifolds.base import TOLERANCE, Manifold


@dataclass(frozen=True)
class Torus(Manifold):
    """Angles in radians, from -π to π, one for each of `features`; the circle for one.

    An angle is embedded as a point of the unit circle: cosines first, then sines.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.

    Example:
        >>> torus = Torus(2)
        >>> torus.project(torch.tensor([4.0, -1.0]))
        tensor([-2.2832, -1.0000])
        >>> torus.distance(torch.tensor([3.0, 0.0]), torch.tensor([-3.0, 0.0]))
        tensor(0.2832)
    """

    features: int = 1
    """Number of angles."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", check_count("features", self.features))

    @property
    def embedded_features(self) -> int:
        """A cosine and a sine for each angle."""
        return 2 * self.features

    @property
    def log_volume(self) -> float:
        """Logarithm of 2π for each angle."""
        return self.features * math.log(2 * math.pi)

    def contains(self, x: Rows) -> Tensor:
        """Return the mask of the rows of angles from -π to π, within 1e-4."""
        return (x.abs() <= math.pi + TOLERANCE).all(-1)

    def project(self, x: Rows) -> Rows:
        """Return the same angles, from -π to π."""
        # A multiple of 2π that is subtracted would be rounded, and may leave an angle beyond π.
        return torch.atan2(x.sin(), x.cos())

    def restore(self, moved: Rows, start: Rows) -> Rows:
        """Return `moved` from -π to π."""
        return self.project(moved)

    def embed(self, x: Rows) -> EmbeddedRows:
        """Return cosines and sines."""
        return torch.cat([x.cos(), x.sin()], -1)

    def embed_derivative(self, x: Rows, dx: Tensor) -> Tensor:
        """Return the derivative of cosines and sines."""
        return torch.cat([-x.sin() * dx, x.cos() * dx], -1)

    def tangent(self, x: Rows, u: Tensor) -> Tensor:
        """Return the part of `u` along each circle."""
        across, up = u.chunk(2, -1)
        return x.cos() * up - x.sin() * across

    def tangent_derivative(self, x: Rows, dx: Tensor, u: EmbeddedRows, du: Tensor) -> Tensor:
        """Return the derivative of the velocity of the angles."""
        across, up = u.chunk(2, -1)
        return self.tangent(x, du) - dx * (x.cos() * across + x.sin() * up)

    def normals(self, x: Rows) -> tuple[Tensor, Tensor]:
        """Return the point of each circle, with a curvature of 1."""
        select = torch.eye(self.features, dtype=x.dtype, device=x.device)
        select = torch.cat([select, select], -1).view(-1, *(1,) * (x.ndim - 1), 2 * self.features)
        return select * self.embed(x), x.new_ones(self.features)

    def geodesic(self, t: Times, x0: Rows, x1: Rows) -> tuple[Rows, Rows]:
        """Return point and velocity of the shorter turn of each angle."""
        velocity = self.project(x1 - x0)
        return self.project(x0 + t.unsqueeze(-1) * velocity), velocity

    def rand(
        self, shape: torch.Size, *, like: Tensor, generator: Generator | None = None
    ) -> Tensor:
        """Draw independent uniform angles."""
        size = (*shape, self.features)
        share = torch.rand(size, generator=generator, dtype=like.dtype, device=like.device)
        return math.pi * (2 * share - 1)
