"""Euclidean space, and products of manifolds over the columns of a table."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf._checks import check_count, check_type
from cnf._shapes import EmbeddedRows, Rows, Times
from cnf.manifolds.base import Manifold


@dataclass(frozen=True)
class Euclidean(Manifold):
    """Real numbers, as a factor of a `Product`.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.
    """

    features: int
    """Number of columns."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", check_count("features", self.features))

    @property
    def euclidean_columns(self) -> tuple[bool, ...]:
        """True for every column."""
        return (True,) * self.features

    @property
    def log_volume(self) -> float:
        """Infinite."""
        return math.inf

    @property
    def support(self) -> constraints.Constraint:
        """Real vectors."""
        return constraints.real_vector

    def contains(self, x: Rows) -> Tensor:
        """Return True for all rows without NaN."""
        return ~x.isnan().any(-1)

    def project(self, x: Rows) -> Rows:
        """Return `x`."""
        return x

    def restore(self, moved: Rows, start: Rows) -> Rows:
        """Return `moved`."""
        return moved

    def embed(self, x: Rows) -> EmbeddedRows:
        """Return `x`."""
        return x

    def embed_derivative(self, x: Rows, dx: Tensor) -> Tensor:
        """Return `dx`."""
        return dx

    def tangent(self, x: Rows, u: Tensor) -> Tensor:
        """Return `u`."""
        return u

    def tangent_derivative(self, x: Rows, dx: Tensor, u: EmbeddedRows, du: Tensor) -> Tensor:
        """Return `du`."""
        return du

    def normals(self, x: Rows) -> tuple[Tensor, Tensor]:
        """Return none."""
        return x.new_zeros(0, *x.shape), x.new_zeros(0)

    def geodesic(self, t: Times, x0: Rows, x1: Rows) -> tuple[Rows, Rows]:
        """Return point and velocity of a straight line."""
        velocity = x1 - x0
        return x0 + t.unsqueeze(-1) * velocity, velocity

    def rand(
        self, shape: torch.Size, *, like: Tensor, generator: Generator | None = None
    ) -> Tensor:
        """Refuse: there is no uniform distribution of all real numbers.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a uniform distribution needs a compact manifold; got Euclidean.")


@dataclass(frozen=True)
class Product(Manifold):
    """Product of manifolds: each takes the next columns of a point.

    Raises:
        TypeError: If a factor is not a `Manifold`.
        ValueError: If there are no factors.

    Example:
        >>> from cnf.manifolds import Sphere, Torus
        >>> place_and_hour = Product([Sphere(3), Torus(1)])
        >>> place_and_hour.features, place_and_hour.embedded_features
        (4, 5)
    """

    factors: Sequence[Manifold]
    """Manifolds, from the first to the last columns."""

    def __post_init__(self) -> None:
        check_type("factors", self.factors, Iterable, "put the manifold into a list")
        object.__setattr__(self, "factors", tuple(self.factors))
        if not self.factors:
            raise ValueError("factors must hold at least one manifold; got none.")
        for factor in self.factors:
            check_type(
                "each of factors", factor, Manifold, "use Sphere(3), Torus(1) or Euclidean(2)"
            )

    @property
    def features(self) -> int:  # type: ignore[override]  # it cannot be written
        """Number of columns."""
        return sum(factor.features for factor in self.factors)

    @property
    def embedded_features(self) -> int:
        """Number of coordinates of an embedded point."""
        return sum(factor.embedded_features for factor in self.factors)

    @property
    def euclidean_columns(self) -> tuple[bool, ...]:
        """Those of the factors."""
        return tuple(column for factor in self.factors for column in factor.euclidean_columns)

    @property
    def log_volume(self) -> float:
        """Sum of the factors' logarithms."""
        return sum(factor.log_volume for factor in self.factors)

    @property
    def support(self) -> constraints.Constraint:
        """The manifold; real vectors if every factor is Euclidean."""
        real = constraints.real_vector
        return real if all(factor.support is real for factor in self.factors) else super().support

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the columns of each factor."""
        return torch.split(x, [factor.features for factor in self.factors], -1)

    def _split_embedded(self, u: Tensor) -> tuple[Tensor, ...]:
        return torch.split(u, [factor.embedded_features for factor in self.factors], -1)

    def contains(self, x: Rows) -> Tensor:
        """Return the mask of the rows that every factor contains."""
        parts = zip(self.factors, self.split(x), strict=True)
        return torch.stack([factor.contains(part) for factor, part in parts]).all(0)

    def project(self, x: Rows) -> Rows:
        """Project the columns of each factor."""
        return self._each(lambda factor, part: factor.project(part), self.split(x))

    def restore(self, moved: Rows, start: Rows) -> Rows:
        """Restore the columns of each factor."""
        return self._each(
            lambda factor, *parts: factor.restore(*parts), self.split(moved), self.split(start)
        )

    def embed(self, x: Rows) -> EmbeddedRows:
        """Embed the columns of each factor."""
        return self._each(lambda factor, part: factor.embed(part), self.split(x))

    def embed_derivative(self, x: Rows, dx: Tensor) -> Tensor:
        """Return the derivative of `embed`."""
        return self._each(
            lambda factor, *parts: factor.embed_derivative(*parts), self.split(x), self.split(dx)
        )

    def tangent(self, x: Rows, u: Tensor) -> Tensor:
        """Return the velocity of each factor's columns."""
        return self._each(
            lambda factor, *parts: factor.tangent(*parts), self.split(x), self._split_embedded(u)
        )

    def tangent_derivative(self, x: Rows, dx: Tensor, u: EmbeddedRows, du: Tensor) -> Tensor:
        """Return the derivative of `tangent`."""
        return self._each(
            lambda factor, *parts: factor.tangent_derivative(*parts),
            *(self.split(x), self.split(dx), self._split_embedded(u), self._split_embedded(du)),
        )

    def normals(self, x: Rows) -> tuple[Tensor, Tensor]:
        """Return the normals of each factor, padded with zeros."""
        directions, curvatures, before = [], [], 0
        for factor, part in zip(self.factors, self.split(x), strict=True):
            normals, curvature = factor.normals(part)
            behind = self.embedded_features - before - factor.embedded_features
            directions.append(torch.nn.functional.pad(normals, (before, behind)))
            curvatures.append(curvature)
            before += factor.embedded_features
        return torch.cat(directions), torch.cat(curvatures)

    def geodesic(self, t: Times, x0: Rows, x1: Rows) -> tuple[Rows, Rows]:
        """Return point and velocity of the geodesic of each factor."""
        parts = zip(self.factors, self.split(x0), self.split(x1), strict=True)
        states, velocities = zip(
            *(factor.geodesic(t, start, end) for factor, start, end in parts), strict=True
        )
        return torch.cat(states, -1), torch.cat(velocities, -1)

    def rand(
        self, shape: torch.Size, *, like: Tensor, generator: Generator | None = None
    ) -> Tensor:
        """Draw independent uniform points of each factor."""
        parts = [factor.rand(shape, like=like, generator=generator) for factor in self.factors]
        return torch.cat(parts, -1)

    def _each(self, function: Callable[..., Tensor], *columns: Iterable[Tensor]) -> Tensor:
        return torch.cat(
            [
                function(factor, *parts)
                for factor, *parts in zip(self.factors, *columns, strict=True)
            ],
            -1,
        )
