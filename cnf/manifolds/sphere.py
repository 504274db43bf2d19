"""Unit sphere."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from cnf._checks import check_count
from cnf._shapes import EmbeddedRows, Rows, Times
from cnf.manifolds.base import TOLERANCE, Manifold


@dataclass(frozen=True)
class Sphere(Manifold):
    r"""Unit vectors of :math:`\mathbb{R}^n` for n = `features`, such as :math:`S^2` for 3.

    A tangent velocity :math:`v(x) = |x| \, P u(x / |x|)`, with the projection P off the direction
    of x, keeps every length, and turns all points along a ray alike. So the trace of its Jacobian
    is the divergence on the sphere, on it and around it.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 2.

    Example:
        >>> sphere = Sphere(3)
        >>> sphere.project(torch.tensor([0.0, 0.0, 2.0]))
        tensor([0., 0., 1.])
        >>> round(sphere.log_volume, 3)
        2.531
    """

    features: int
    """Number of entries of a vector."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", check_count("features", self.features, least=2))

    @property
    def log_volume(self) -> float:
        """Logarithm of the area: of 4π for features=3."""
        half = self.features / 2
        return math.log(2) + half * math.log(math.pi) - math.lgamma(half)

    def contains(self, x: Rows) -> Tensor:
        """Return the mask of the vectors whose length is 1 within 1e-4."""
        return (_length(x)[..., 0] - 1).abs() <= TOLERANCE

    def project(self, x: Rows) -> Rows:
        """Return vectors of length 1 in the directions of `x`."""
        return torch.nn.functional.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)

    def restore(self, moved: Rows, start: Rows) -> Rows:
        """Return `moved` with the length of `start`."""
        return self.project(moved) * _length(start)

    def embed(self, x: Rows) -> EmbeddedRows:
        """Return unit vectors."""
        return self.project(x)

    def embed_derivative(self, x: Rows, dx: Tensor) -> Tensor:
        """Return the derivative of the unit vectors."""
        y, size = self.project(x), _length(x)
        return _off(y, dx) / size

    def tangent(self, x: Rows, u: Tensor) -> Tensor:
        """Return the part of `u` off the direction of x, times the length of x."""
        return _length(x) * _off(self.project(x), u)

    def tangent_derivative(self, x: Rows, dx: Tensor, u: EmbeddedRows, du: Tensor) -> Tensor:
        """Return the derivative of the tangent velocity."""
        y, size = self.project(x), _length(x)
        along = (y * dx).sum(-1, keepdim=True)
        turned = dx - along * y
        normal = (y * u).sum(-1, keepdim=True)
        falls = (turned * u).sum(-1, keepdim=True)
        return along * (u - normal * y) + size * _off(y, du) - normal * turned - falls * y

    def normals(self, x: Rows) -> tuple[Tensor, Tensor]:
        """Return the unit vectors themselves."""
        return self.project(x).unsqueeze(0), x.new_full((1,), self.features - 1.0)

    def geodesic(self, t: Times, x0: Rows, x1: Rows) -> tuple[Rows, Rows]:
        """Return point and velocity on a great circle."""
        chord = x1 - x0
        # Twice, because near antipodes most of the first one is rounding, along x0.
        aside = _off(x0, self.project(_off(x0, chord)))
        # The angle by both half chords is precise near 0 and near pi.
        angle = 2 * torch.atan2(_length(chord), _length(x1 + x0))
        # Antipodes have no direction between them.
        axis = torch.zeros_like(x0).scatter(-1, x0.abs().argmin(-1, keepdim=True), 1.0)
        other = _off(x0, axis)
        lost = (_length(aside) < 0.5) & (angle > 1)
        direction = self.project(torch.where(lost, other, aside))
        turned = t.unsqueeze(-1) * angle
        state = turned.cos() * x0 + turned.sin() * direction
        return state, angle * (turned.cos() * direction - turned.sin() * x0)

    def rand(
        self, shape: torch.Size, *, like: Tensor, generator: Generator | None = None
    ) -> Tensor:
        """Draw directions of normal vectors."""
        size = (*shape, self.features)
        normal = torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)
        return self.project(normal)


def _off(y: Tensor, u: Tensor) -> Tensor:
    """Return the part of `u` off the unit vectors `y`."""
    return u - (y * u).sum(-1, keepdim=True) * y


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length
