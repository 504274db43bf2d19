"""Toy densities on the plane: curves with normal noise."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_number, is_positive
from cnf._shapes import Values
from cnf.data.densities import RandomNumbers, ToyDensity

Curve = Callable[[Tensor], Tensor]
"""Map from positions between 0 and 1, (n,), to points of the plane, (n, 2)."""


class NoisyDensity(ToyDensity):
    """Toy density on the plane that is smoothed by normal noise of standard deviation `noise`."""

    features = 2
    noise: float

    def entropy(self) -> float:
        """Return the entropy in nats, by quadrature; its error is below 1e-5.

        The trapezoid rule converges faster than any power of the step, because the noise is smooth.
        """
        step = 0.75 * self.noise
        left, right, bottom, top = self.extent
        grid = torch.cartesian_prod(
            torch.arange(left, right + step, step, dtype=torch.float64),
            torch.arange(bottom, top + step, step, dtype=torch.float64),
        )
        return float(torch.special.entr(self.log_prob(grid).exp()).sum()) * step**2


class NoisyCurves(NoisyDensity):
    r"""Mixture of noisy curves: a random curve, a uniform position on it, and normal noise.

    .. math:: p(x) = \frac{1}{K} \sum_{k=1}^K \int_0^1 N(x; c_k(u), \sigma^2 I) \, du

    The integral is a Gauss-Legendre sum in log space, exact to 1e-6 nats where `nodes` suffice; far
    outside `extent`, where the integrand narrows to a peak between nodes, it is less exact.

    Args:
        curves: Smooth curves, equally probable; a position is drawn uniformly from 0 to 1.
        noise: Standard deviation of the noise.
        nodes: Quadrature nodes on each curve; two for each piece as long as `noise` suffice.

    Raises:
        ValueError: If there is no curve, `noise` is not positive, or `nodes` is less than 1.
    """

    def __init__(self, curves: Sequence[Curve], noise: float, *, nodes: int = 256) -> None:
        if not curves:
            raise ValueError("curves must hold at least one curve; got none.")
        self.noise = check_number("noise", noise, "positive and finite", is_positive)
        self.curves = tuple(curves)
        self.nodes = nodes
        positions, weights = gauss_legendre(nodes)
        self._centres = torch.cat([curve(positions) for curve in curves])
        self._log_weights = (weights / len(curves)).log().repeat(len(curves))
        left, bottom = (self._centres.amin(dim=0) - 5 * noise).tolist()
        right, top = (self._centres.amax(dim=0) + 5 * noise).tolist()
        self.extent = (left, right, bottom, top)

    def _draw(self, n: int, random: RandomNumbers) -> Float[Tensor, "n 2"]:
        choice = random.integers(len(self.curves), n)
        positions = random.uniform(n)
        candidates = torch.stack([curve(positions) for curve in self.curves])
        return candidates[choice, torch.arange(n)] + self.noise * random.normal(n, 2)

    def _log_prob(self, x: Float[Tensor, "rows 2"]) -> Float[Tensor, "rows"]:
        # The faster mode by matrix products would cancel digits.
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(x, self._centres, compute_mode=mode) / self.noise
        terms = self._log_weights - distances.square() / 2
        return terms.logsumexp(dim=-1) - math.log(2 * math.pi * self.noise**2)


class NoisyCircles(NoisyDensity):
    r"""Mixture of noisy circles around the origin: a random circle, a uniform angle, normal noise.

    .. math:: p(x) = \frac{1}{2 \pi \sigma^2 K} \sum_{k=1}^K
        \exp\left(-\frac{|x|^2 + r_k^2}{2 \sigma^2}\right) I_0\left(\frac{|x| r_k}{\sigma^2}\right)

    Args:
        radii: Radii of the circles, equally probable.
        noise: Standard deviation of the noise.

    Raises:
        ValueError: If there is no radius, a radius is negative, or `noise` is not positive.
    """

    def __init__(self, radii: Sequence[float], noise: float) -> None:
        if not radii or min(radii) < 0:
            raise ValueError(f"radii must be at least one number, none negative; got {radii}.")
        self.noise = check_number("noise", noise, "positive and finite", is_positive)
        self._radii = torch.tensor(radii, dtype=torch.float64)
        reach = max(radii) + 5 * noise
        self.extent = (-reach, reach, -reach, reach)

    def _draw(self, n: int, random: RandomNumbers) -> Float[Tensor, "n 2"]:
        radius = self._radii[random.integers(len(self._radii), n)]
        angle = 2 * math.pi * random.uniform(n)
        points = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
        return points + self.noise * random.normal(n, 2)

    def _log_prob(self, x: Float[Tensor, "rows 2"]) -> Float[Tensor, "rows"]:
        distance = torch.hypot(x[:, :1], x[:, 1:])
        # i0e(a) = exp(-a) I0(a) turns the sum of squares in the exponent into a squared difference.
        angular = torch.special.i0e(distance * self._radii / self.noise**2).log()
        terms: Tensor = angular - ((distance - self._radii) / self.noise).square() / 2
        return terms.logsumexp(dim=-1) - math.log(2 * math.pi * self.noise**2 * len(self._radii))


class TwoSpirals(NoisyDensity):
    """Two noisy spiral arms, half a turn apart.

    A point is `(s (m(n) + u)) / 3 + e` with `m(n) = (-n cos n, n sin n)`, `n` from 0 to 3 pi with
    density `2 n / (3 pi)^2`, `u` uniform from 0 to 0.5 in both coordinates, `s` either sign, and
    `e` normal with standard deviation 0.1. Given `n` and `s`, the coordinates are independent and
    each is uniform plus normal, a difference of normal distribution functions; the integral over
    `n` is a Gauss-Legendre sum. Far from the arms all of it is done in log space.

    The log-density is exact to 1e-6 nats at samples and to 1e-4 within `extent`; far outside, where
    the integrand narrows to a peak between nodes, to 1e-5 of its value.

    Args:
        nodes: Nodes of the quadrature on each arm.

    Raises:
        ValueError: If `nodes` is less than 1.

    References:
        Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367
    """

    noise = 0.1

    def __init__(self, *, nodes: int = 384) -> None:
        self.nodes = nodes
        positions, weights = gauss_legendre(nodes)
        # The uniform offset of 0.5 / 3 reaches half its width to both sides of the middle.
        self._half_width = 0.25 / 3
        middles = _spiral(3 * math.pi * positions) / 3 + self._half_width
        self._middles = torch.cat((middles, -middles))
        self._weights = (2 * positions * weights / 2).repeat(2)
        reach = math.pi + 2 * self._half_width + 5 * self.noise
        self.extent = (-reach, reach, -reach, reach)

    def _draw(self, n: int, random: RandomNumbers) -> Float[Tensor, "n 2"]:
        arm = _spiral(3 * math.pi * random.uniform(n).sqrt()) + 0.5 * random.uniform(n, 2)
        sign = 2 * random.integers(2, n)[:, None] - 1
        return sign * arm / 3 + self.noise * random.normal(n, 2)

    def _log_prob(self, x: Float[Tensor, "rows 2"]) -> Float[Tensor, "rows"]:
        distances = (x[:, None] - self._middles).abs() / self.noise
        half_width = self._half_width / self.noise
        blurred = _normal_between(distances, half_width).prod(dim=-1) @ self._weights
        log_blurred = blurred.log()
        # erfcx only where the sum above may underflow, because it costs more.
        far = blurred < 1e-200
        terms = _log_normal_between(distances[far], half_width).sum(dim=-1) + self._weights.log()
        log_blurred[far] = terms.logsumexp(dim=-1)
        return log_blurred - 2 * math.log(2 * self._half_width)


def _spiral(n: Float[Tensor, "n"]) -> Float[Tensor, "n 2"]:
    return torch.stack((-n * n.cos(), n * n.sin()), dim=-1)


def _normal_between(distance: Values, half_width: float) -> Values:
    """Return the probability of a standard normal within `half_width` of `distance` >= 0."""
    near: Tensor = torch.special.erfc((distance - half_width) / math.sqrt(2))
    far: Tensor = torch.special.erfc((distance + half_width) / math.sqrt(2))
    return (near - far) / 2


def _log_normal_between(distance: Values, half_width: float) -> Values:
    """Return the logarithm of `_normal_between`, for any distance.

    erfc(a) = exp(-a^2) erfcx(a) factors the exponential of the nearer end out of the difference,
    which then cannot underflow.
    """
    near: Tensor = torch.special.erfcx((distance - half_width) / math.sqrt(2))
    far: Tensor = torch.special.erfcx((distance + half_width) / math.sqrt(2))
    ratio = torch.exp(-2 * half_width * distance)
    return ((near - ratio * far) / 2).log() - (distance - half_width).square() / 2


def gauss_legendre(nodes: int) -> tuple[Float[Tensor, "nodes"], Float[Tensor, "nodes"]]:
    """Return positions and weights of Gauss-Legendre quadrature from 0 to 1, in float64."""
    if nodes < 1:
        raise ValueError(f"nodes must be at least 1; got {nodes}.")
    positions, weights = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy((positions + 1) / 2), torch.from_numpy(weights / 2)
