"""Planar and radial flows."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.roots import increasing_root

_MARGIN = 1e-3
"""Least slope of either map along its line of motion, which keeps inverses finite."""

_AT_REST = math.log(math.expm1(1 - _MARGIN))
"""The number whose softplus is 1 - `_MARGIN`, for which both maps are the identity."""


class Planar(Transform):
    r"""Planar flow: a step along one direction that depends on the distance of x from a plane.

    .. math::
        z = x + \hat u \tanh(w^\top x + b), \qquad
        \hat u = u + (m - w^\top u) \, w / \lVert w \rVert^2, \qquad
        m = \mathrm{softplus}(w^\top u) - 1 + 0.001

    with w the `normal`, u the `direction` and b the `offset`. The correction of u makes
    :math:`w^\top \hat u = m` greater than -1, so that the map is one-to-one for all parameters. A
    new one is the identity. The way to the base is cheap; the way to the data is a bisection on one
    number for each row, with one step for each digit of the dtype.

    Args:
        features: Size of x.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.

    References:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows, whose flow runs from
        the base to the data. https://arxiv.org/abs/1505.05770

    Example:
        >>> x = torch.randn(5, 2)
        >>> bool((Planar(2).to_base(x) - x).abs().max() < 1e-6)
        True
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        normal = functional.normalize(torch.randn(features), dim=0)
        self.normal = nn.Parameter(normal)
        self.direction = nn.Parameter(_AT_REST * normal)
        self.offset = nn.Parameter(torch.zeros(()))

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        step, across = self._step()
        bend = self._height(x).tanh()
        return x + bend.unsqueeze(-1) * step, torch.log1p(across * (1 - bend.square()))

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        step, across = self._step()
        target = self._height(z)

        def excess_and_slope(height: Tensor) -> tuple[Tensor, Tensor]:
            bend = height.tanh()
            return height + across * bend - target, 1 + across * (1 - bend.square())

        # The clamp keeps the height finite; its tanh is 1 or -1 there.
        limits = torch.finfo(target.dtype)
        target = target.clamp(limits.min, limits.max)
        low, high = target - across.abs(), target + across.abs()
        bend = increasing_root(excess_and_slope, low, high).tanh()
        return z - bend.unsqueeze(-1) * step, -torch.log1p(across * (1 - bend.square()))

    def _height(self, x: Tensor) -> Tensor:
        # Sums, here and below, because autocast would round a matrix product.
        size = _size(x)  # products of large numbers might be inf, and their sum NaN
        return size.squeeze(-1) * (x / size * self.normal).sum(-1) + self.offset

    def _step(self) -> tuple[Tensor, Tensor]:
        """Return the corrected direction, and its product with the normal."""
        product = (self.normal * self.direction).sum()
        across = functional.softplus(product) - (1 - _MARGIN)
        correction = (across - product) * self.normal / self.normal.square().sum()
        return self.direction + correction, across


class Radial(Transform):
    r"""Radial flow: a step towards or away from one point, smaller the farther x is from it.

    .. math::
        z = x + \frac{\beta}{\alpha + r} (x - x_0), \qquad r = \lVert x - x_0 \rVert, \qquad
        \beta = \mathrm{softplus}(s) - (1 - 0.001) \, \alpha

    with x_0 the `centre`, s the `strength` and the logarithm of alpha the `log_radius`. As beta is
    greater than -alpha, the map is one-to-one for all parameters. A new one is the identity. Both
    directions have a closed form: r solves a quadratic equation.

    Args:
        features: Size of x.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.

    References:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows, whose flow runs from
        the base to the data. https://arxiv.org/abs/1505.05770

    Example:
        >>> x = torch.randn(5, 2)
        >>> bool((Radial(2).to_base(x) - x).abs().max() < 1e-6)
        True
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.centre = nn.Parameter(torch.randn(features))
        self.log_radius = nn.Parameter(torch.zeros(()))
        self.strength = nn.Parameter(torch.tensor(_AT_REST))

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        offset = x - self.centre
        stretch, ladj = self._stretch_and_ladj(_norm(offset))
        return self.centre + stretch.unsqueeze(-1) * offset, ladj

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        offset = z - self.centre
        stretch, ladj = self._stretch_and_ladj(self._distance(_norm(offset)))
        return self.centre + offset / stretch.unsqueeze(-1), -ladj

    def _radius_and_rest(self) -> tuple[Tensor, Tensor]:
        """Return alpha, and alpha + beta without the difference that would lose digits."""
        radius = self.log_radius.exp()
        return radius, _MARGIN * radius + functional.softplus(self.strength)

    def _stretch_and_ladj(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factor of the distance from the centre, and the ladj there."""
        radius, rest = self._radius_and_rest()
        stretch = (rest + distance) / (radius + distance)
        near, far = radius / (radius + distance), distance / (radius + distance)
        along = (rest / radius) * near.square() + far * (1 + near)
        return stretch, (self.features - 1) * stretch.log() + along.log()

    def _distance(self, target: Tensor) -> Tensor:
        """Return the distance r that maps to `target`, by the quadratic formula.

        It solves ``r**2 + (rest - target) r = radius * target``.
        """
        radius, rest = self._radius_and_rest()
        lead = target - rest
        size = lead.abs()
        scale = target.detach().clamp(min=1)  # squares of large numbers might overflow
        root = scale * ((lead / scale).square() + 4 * radius / scale * (target / scale)).sqrt()
        # (lead + root) / 2, without the difference of near numbers where lead is negative.
        return lead / 2 + size / 2 + 2 * radius * (target / (root + size))


def _size(x: Tensor) -> Tensor:
    """Return a constant divisor for each row, mostly 1, that keeps squares and sums in range."""
    limits = torch.finfo(x.dtype)
    largest = x.detach().abs().amax(-1, keepdim=True)
    in_range = (largest > limits.tiny**0.5 / limits.eps) & (largest < limits.max**0.25)
    return torch.where(in_range | (largest == 0), 1.0, largest).to(x.dtype)


def _norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm; the largest finite number where the norm overflows."""
    size = _size(x)
    norm: Tensor = size.squeeze(-1) * torch.linalg.vector_norm(x / size, dim=-1)
    return norm.clamp(max=torch.finfo(x.dtype).max)
