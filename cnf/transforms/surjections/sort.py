"""Sorting: a surjection for densities that do not depend on the order of points."""

import math

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf._checks import check_support
from cnf.bases.ordered_normal import OrderedVector, check_point_features, reordered, sorted_points
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.surjections.codomain import check_codomain


class Sort(Transform):
    r"""Points in ascending order; towards the data their order is drawn uniformly.

    A flow that starts with it is invariant to permutations of the n points, with an exact
    likelihood: :math:`\log p(x) = \log p(z) - \log n!`. The base, or the next transform, must live
    on sorted points: `cnf.bases.OrderedNormal` does, and `LogGaps` maps them to all real numbers.

    Args:
        features: Size of x.
        point_features: Number of entries of a point; points are sorted by the first of them.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is less than 1, or `point_features` does not divide `features`; when
            called, if z is not in order.

    References:
        Nielsen et al. (2020), SurVAE Flows, appendix E. https://arxiv.org/abs/2007.02731

    Example:
        >>> Sort(4, point_features=2).to_base(torch.tensor([3.0, 0.0, 1.0, 2.0]))
        tensor([1., 2., 3., 0.])
    """

    stochastic_to_data = True

    def __init__(self, features: int, *, point_features: int = 1) -> None:
        super().__init__(features)
        self.point_features = check_point_features(point_features, self.features)

    def extra_repr(self) -> str:
        """Sizes of x and of a point."""
        return f"features={self.features}, point_features={self.point_features}"

    @property
    def codomain(self) -> constraints.Constraint:
        """Points in ascending order."""
        return OrderedVector(self.point_features)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return sorted_points(x, self.point_features), -self._log_orders(x)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        expected = OrderedVector(self.point_features).description
        check_codomain(self, z, expected, "Sort these rows.")
        return permuted_points(z, self.point_features, generator), self._log_orders(z)

    def _log_orders(self, x: Tensor) -> Tensor:
        """Return the logarithm of the number of orders."""
        return x.new_full(x.shape[:-1], math.lgamma(self.features // self.point_features + 1))


class LogGaps(Transform):
    r"""First coordinate of sorted points, and logarithms of the gaps to the next points.

    With the first entries :math:`x_1 < x_2 < \dots` of the points, z has :math:`x_1` and
    :math:`\log(x_i - x_{i-1})` in their places; the other entries stay. It maps sorted points to
    all real vectors, so that any flow may follow a `Sort`.

    Args:
        features: Size of x.
        point_features: Number of entries of a point.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is less than 1, or `point_features` does not divide `features`; when
            called, if x is not in order.

    Example:
        >>> LogGaps(3).to_base(torch.tensor([5.0, 6.0, 8.0]))
        tensor([5.0000, 0.0000, 0.6931])
    """

    codomain = constraints.real_vector

    def __init__(self, features: int, *, point_features: int = 1) -> None:
        super().__init__(features)
        self.point_features = check_point_features(point_features, self.features)

    def extra_repr(self) -> str:
        """Sizes of x and of a point."""
        return f"features={self.features}, point_features={self.point_features}"

    @property
    def support(self) -> constraints.Constraint:
        """Points in ascending order."""
        return OrderedVector(self.point_features)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        points = x.unflatten(-1, (-1, self.point_features))
        check_support("x", x, self.support)
        # Points that rounding made equal keep a finite logarithm.
        gaps = points[..., 0].diff(dim=-1).clamp(min=torch.finfo(x.dtype).tiny)
        log_gaps = gaps.log()
        return self._with_first(points, log_gaps), -log_gaps.sum(-1)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        points = z.unflatten(-1, (-1, self.point_features))
        log_gaps = points[..., 1:, 0]
        first = points[..., :1, 0]
        later = first + log_gaps.exp().cumsum(-1)
        return self._with_first(points, later), log_gaps.sum(-1)

    def _with_first(self, points: Tensor, later: Tensor) -> Tensor:
        """Return the points with other first entries, from the second point on, as a vector."""
        first = torch.cat([points[..., :1, 0], later], -1)
        return torch.cat([first.unsqueeze(-1), points[..., 1:]], -1).flatten(-2)


def permuted_points(x: Tensor, point_features: int, generator: Generator | None) -> Tensor:
    """Return the points of each row of x in a random order."""
    points = x.unflatten(-1, (-1, point_features))
    order = torch.rand(points.shape[:-1], generator=generator, device=x.device).argsort(-1)
    return reordered(points, order)
