"""Sorted normal base, on the ordered cone."""

import math

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf._checks import check_count
from cnf.bases.base import Base


class OrderedVector(constraints.Constraint):
    """Vectors of points in ascending order of their first entries: the ordered cone.

    Args:
        point_features: Number of entries of a point; with 1 the vector is ascending.
    """

    event_dim = 1

    def __init__(self, point_features: int = 1) -> None:
        self.point_features = point_features
        super().__init__()

    @property
    def description(self) -> str:
        """What the vectors are, for a message."""
        if self.point_features == 1:
            return "numbers in ascending order"
        return f"points of {self.point_features} numbers, in ascending order of the first"

    def check(self, value: Tensor) -> Tensor:
        """Return the mask of the vectors in order."""
        first = value[..., :: self.point_features]
        return (first[..., 1:] >= first[..., :-1]).all(-1) & ~value.isnan().any(-1)

    def __repr__(self) -> str:
        return f"OrderedVector({self.point_features})"


class OrderedNormal(Base):
    r"""Standard normal points, sorted by their first entries.

    The density of n sorted points is :math:`n! \prod_i \mathcal{N}(z_i)`, and 0 elsewhere. It fits
    behind `cnf.transforms.Sort`.

    Args:
        features: Size of z.
        point_features: Number of entries of a point, a divisor of `features`.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is less than 1, or `point_features` does not divide `features`.

    Example:
        >>> OrderedNormal(2).log_prob(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([-1.6447,    -inf])
    """

    def __init__(self, features: int, *, point_features: int = 1) -> None:
        super().__init__(features)
        self.point_features = check_point_features(point_features, features)
        self.points = features // point_features
        # Carries dtype and device through .to(); not stored in a state dict.
        self.register_buffer("loc", torch.zeros(features), persistent=False)
        self.loc: Tensor

    @property
    def support(self) -> constraints.Constraint:
        """The ordered cone."""
        return OrderedVector(self.point_features)

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        log_normalizer = 0.5 * self.features * math.log(2 * math.pi) - math.lgamma(self.points + 1)
        log_prob = -0.5 * z.square().sum(-1) - log_normalizer
        return torch.where(self.support.check(z.detach()), log_prob, -math.inf)

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        like = self.loc
        z = torch.randn(
            *shape, self.features, generator=generator, dtype=like.dtype, device=like.device
        )
        return sorted_points(z, self.point_features)


def sorted_points(x: Tensor, point_features: int) -> Tensor:
    """Return the points of each row of x in ascending order of their first entries."""
    points = x.unflatten(-1, (-1, point_features))
    return reordered(points, points.detach()[..., 0].sort(dim=-1, stable=True).indices)


def reordered(points: Tensor, order: Tensor) -> Tensor:
    """Return points ``(*batch, points, point_features)`` in another order, as vectors."""
    places = order.unsqueeze(-1).expand_as(points)
    return torch.flatten(points.gather(-2, places), -2)


def check_point_features(point_features: int, features: int) -> int:
    """Refuse a number of entries of a point that does not divide `features`."""
    point_features = check_count("point_features", point_features)
    if features % point_features:
        raise ValueError(
            f"point_features must divide the {features} features; got {point_features}."
        )
    return point_features
