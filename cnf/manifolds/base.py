"""Base class of manifolds."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf._shapes import EmbeddedRows, Rows, Times, Values

TOLERANCE = 1e-4
"""Largest distance of a point from a manifold that it counts as being on."""


class OnManifold(constraints.Constraint):
    """Points on a manifold, up to rounding."""

    event_dim = 1

    def __init__(self, manifold: "Manifold") -> None:
        self.manifold = manifold
        self.description = f"on {manifold}"
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return the mask of the rows on the manifold."""
        return self.manifold.contains(value)

    def __repr__(self) -> str:
        return f"OnManifold({self.manifold})"


class Manifold(ABC):
    r"""Riemannian manifold M, embedded in a Euclidean space as a product of spheres and lines.

    A point has `features` coordinates x, and the embedded point y(x) has `embedded_features`. A
    vector u of the embedding space gives a velocity of x: the coordinates of its part tangent to M.
    The density of a flow is with respect to the volume of M, as it is measured in the embedding:
    area on the sphere, angles in radians on the torus.

    References:
        Mathieu and Nickel (2020), Riemannian Continuous Normalizing Flows.
        https://arxiv.org/abs/2006.10605
    """

    features: int
    """Number of coordinates of a point."""

    @property
    def embedded_features(self) -> int:
        """Number of coordinates of an embedded point."""
        return self.features

    @property
    def euclidean_columns(self) -> tuple[bool, ...]:
        """Whether each coordinate is any real number, at unit scale in the embedding."""
        return (False,) * self.features

    @property
    @abstractmethod
    def log_volume(self) -> float:
        """Logarithm of the volume; infinite for a manifold that is not compact."""

    @property
    def support(self) -> constraints.Constraint:
        """Constraint of points on the manifold."""
        return OnManifold(self)

    @abstractmethod
    def contains(self, x: Rows) -> Bool[Tensor, "*batch"]:
        """Return the mask of the points on the manifold, up to rounding."""

    @abstractmethod
    def project(self, x: Rows) -> Rows:
        """Return the points on the manifold nearest to `x`; angles are wrapped."""

    @abstractmethod
    def restore(self, moved: Rows, start: Rows) -> Rows:
        """Return points that a tangent field moved from `start`, without the drift of a solver.

        Like the exact solution, this is a bijection also around the manifold.
        """

    @abstractmethod
    def embed(self, x: Rows) -> EmbeddedRows:
        """Return the embedded points."""

    @abstractmethod
    def embed_derivative(self, x: Rows, dx: Tensor) -> Tensor:
        """Return the derivative of `embed` in directions `dx`, which may have a leading axis."""

    @abstractmethod
    def tangent(self, x: Rows, u: Tensor) -> Tensor:
        """Return the velocity of x by the tangent part of `u`, which may have a leading axis."""

    @abstractmethod
    def tangent_derivative(self, x: Rows, dx: Tensor, u: EmbeddedRows, du: Tensor) -> Tensor:
        """Return the derivative of `tangent` where x and u change by `dx` and `du`."""

    @abstractmethod
    def normals(self, x: Rows) -> tuple[Tensor, Tensor]:
        """Return the unit normals of the embedded manifold, and the sum of curvatures along each.

        The shapes are ``(normals, *batch, embedded_features)`` and ``(normals,)``. A sphere in n
        dimensions has n - 1 curvatures of 1.
        """

    @abstractmethod
    def geodesic(self, t: Times, x0: Rows, x1: Rows) -> tuple[Rows, Rows]:
        """Return point and velocity at time `t` of the geodesic from `x0` at 0 to `x1` at 1.

        It is the shortest one; between antipodes, which many connect, any of them.

        Args:
            t: Times, of a shape that broadcasts with the rows'.
            x0: Starts.
            x1: Ends.
        """

    @abstractmethod
    def rand(
        self, shape: torch.Size, *, like: Tensor, generator: Generator | None = None
    ) -> Tensor:
        """Draw uniform points of a compact manifold, ``(*shape, features)``."""

    def distance(self, x0: Rows, x1: Rows) -> Values:
        """Return the length of the geodesic between points."""
        _, velocity = self.geodesic(x0.new_zeros(()), x0, x1)
        length: Tensor = torch.linalg.vector_norm(velocity, dim=-1)
        return length
