"""FFJORD's eight toy sets on the plane, with exact log-densities."""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cnf._checks import check_choice
from cnf.data.curves import NoisyCircles, NoisyCurves, TwoSpirals
from cnf.data.densities import GaussianMixture, RandomNumbers, ToyDensity

__all__ = ["TOY_NAMES", "Checkerboard", "GaussianMixture", "Pinwheel", "ToyDensity", "toy_density"]


def toy_density(name: str) -> ToyDensity:
    """Return one of FFJORD's eight toy sets, as a distribution with an exact log-density.

    Shapes and scales agree with the authors' code, except that angles and classes, which it
    enumerates evenly in some sets, are random here, so that points are independent.

    Args:
        name: One of `TOY_NAMES`.

    Raises:
        ValueError: If there is no set of that name.

    References:
        Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367

    Example:
        >>> truth = toy_density("checkerboard")
        >>> round(truth.entropy(), 4)
        3.4657
        >>> truth.log_prob(torch.tensor([[0.5, 0.5], [0.5, 2.5]]))
        tensor([-3.4657,    -inf])
    """
    return _MAKERS[check_choice("name", name, TOY_NAMES)]()


class Pinwheel(ToyDensity):
    r"""Pinwheel: five Gaussian blobs, sheared into blades.

    With `f` normal, mean (1, 0) and standard deviations (0.3, 0.1), and blade `k` of five, a point
    is `f` turned clockwise by `2 pi k / 5 + 0.25 exp(f_0)` and doubled. The change of variables

    .. math:: p(x) = \frac15 \sum_k \sum_{f \mapsto x}
        \frac{N(f)}{4 \, |1 + 0.25 \, e^{f_0} f_1|}

    is exact over the roots `f_0` of one equation for each blade. They are bracketed by a grid of
    step 0.01 and solved to double precision. Roots more than 10 standard deviations from the mean
    of `f_0` are left out (their probability is 2e-23); each point of the plane has others. Two
    roots within one step of the grid can be missed, next to the folds of the map, which are more
    than 5 standard deviations from the mean of `f`.

    References:
        Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367
    """

    features = 2
    extent = (-5.0, 5.0, -5.0, 5.0)

    def __init__(self) -> None:
        self._blades = 2 * math.pi * torch.arange(5, dtype=torch.float64) / 5
        self._mean = torch.tensor([1.0, 0.0], dtype=torch.float64)
        self._std = torch.tensor([0.3, 0.1], dtype=torch.float64)
        self._grid = torch.linspace(-2, 4, 601, dtype=torch.float64)
        angles = self._blades[:, None] + 0.25 * self._grid.exp()
        self._turns = torch.stack((angles.cos(), -angles.sin()))

    def entropy(self) -> float:
        """Return the entropy in nats, by Gauss-Hermite quadrature; its error is below 1e-5."""
        positions, factors = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(64))
        nodes = torch.cartesian_prod(positions, positions)
        weights = torch.outer(factors, factors).flatten() / (2 * math.pi)
        # By symmetry, one blade is enough.
        x = self._turn(self._mean + self._std * nodes, torch.zeros(len(nodes), dtype=torch.long))
        return -float(weights @ self.log_prob(x))

    def _draw(self, n: int, random: RandomNumbers) -> Float[Tensor, "n 2"]:
        f = self._mean + self._std * random.normal(n, 2)
        return self._turn(f, random.integers(5, n))

    def _turn(self, f: Float[Tensor, "n 2"], blade: Int[Tensor, "n"]) -> Float[Tensor, "n 2"]:
        angle = self._blades[blade] + 0.25 * f[:, 0].exp()
        cos, sin = angle.cos(), angle.sin()
        return 2 * torch.stack((cos * f[:, 0] + sin * f[:, 1], cos * f[:, 1] - sin * f[:, 0]), -1)

    def _turn_back(
        self, x: Float[Tensor, "n 2"], f0: Float[Tensor, "n"], blade: Int[Tensor, "n"]
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """Return both coordinates of `f` for a guess `f0` of the first, which a root returns."""
        angle = self._blades[blade] + 0.25 * f0.exp()
        cos, sin = angle.cos(), angle.sin()
        return (cos * x[:, 0] - sin * x[:, 1]) / 2, (sin * x[:, 0] + cos * x[:, 1]) / 2

    def _log_prob(self, x: Float[Tensor, "rows 2"]) -> Float[Tensor, "rows"]:
        row, blade, f0 = self._roots(x)
        _, f1 = self._turn_back(x[row], f0, blade)
        z = (torch.stack((f0, f1), dim=-1) - self._mean) / self._std
        log_normal = -z.square().sum(dim=-1) / 2 - (2 * math.pi * self._std.prod()).log()
        terms = log_normal - (4 * (1 + 0.25 * f0.exp() * f1).abs()).log() - math.log(5)
        # A logsumexp over the roots of each row, whose number varies.
        largest = x.new_full((len(x),), -math.inf).scatter_reduce(0, row, terms, "amax")
        sums = x.new_zeros(len(x)).index_add(0, row, (terms - largest[row]).exp())
        return largest + sums.log()

    def _roots(
        self, x: Float[Tensor, "rows 2"]
    ) -> tuple[Int[Tensor, "roots"], Int[Tensor, "roots"], Float[Tensor, "roots"]]:
        """Return row, blade and `f_0` of each preimage of each point."""
        above = torch.tensordot(x / 2, self._turns, dims=1) > self._grid
        row, blade, cell = (above[..., 1:] != above[..., :-1]).nonzero(as_tuple=True)
        falling = above[row, blade, cell]
        points, low, high = x[row], self._grid[cell], self._grid[cell + 1]
        f0 = (low + high) / 2
        # Newton's method, with bisection where a step would leave the bracket.
        for _ in range(100):
            back0, back1 = self._turn_back(points, f0, blade)
            excess = back0 - f0
            root_is_higher = (excess > 0) == falling
            low, high = torch.where(root_is_higher, f0, low), torch.where(root_is_higher, high, f0)
            newton = f0 + excess / (1 + 0.25 * f0.exp() * back1)
            inside = (newton >= low) & (newton <= high)
            previous, f0 = f0, torch.where(inside, newton, (low + high) / 2)
            if torch.all((f0 - previous).abs() <= 1e-15 * (1 + f0.abs())):
                break
        return row, blade, f0


class Checkerboard(ToyDensity):
    """Uniform density on the eight dark squares, of side 2, of a checkerboard from -4 to 4.

    The squares are closed: rounding may put a sample on an edge.

    References:
        Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367
    """

    features = 2
    extent = (-4.0, 4.0, -4.0, 4.0)

    def entropy(self) -> float:
        """Return the entropy in nats: the logarithm of the area, 32."""
        return math.log(32)

    def _draw(self, n: int, random: RandomNumbers) -> Float[Tensor, "n 2"]:
        first = 4 * random.uniform(n) - 2
        second = random.uniform(n) - 2 * random.integers(2, n) + first.floor() % 2
        return 2 * torch.stack((first, second), dim=-1)

    def _log_prob(self, x: Float[Tensor, "rows 2"]) -> Float[Tensor, "rows"]:
        # A point on an edge belongs to both squares that share it.
        square = (x / 2).floor().clamp(max=1)
        square_before = ((x / 2).ceil() - 1).clamp(min=-2)
        dark = (square.sum(dim=-1) % 2 == 0) | (square != square_before).any(dim=-1)
        inside = dark & (x.abs() <= 4).all(dim=-1)
        return x.new_full((len(x),), -math.inf).masked_fill(inside, -math.log(32))


def _swissroll_curve(u: Float[Tensor, "n"]) -> Float[Tensor, "n 2"]:
    t = 1.5 * math.pi * (1 + 2 * u)
    return torch.stack((t * t.cos(), t * t.sin()), dim=-1) / 5


def _upper_moon(u: Float[Tensor, "n"]) -> Float[Tensor, "n 2"]:
    t = math.pi * u
    return torch.stack((2 * t.cos() - 1, 2 * t.sin() - 0.2), dim=-1)


def _lower_moon(u: Float[Tensor, "n"]) -> Float[Tensor, "n 2"]:
    t = math.pi * u
    return torch.stack((1 - 2 * t.cos(), 0.8 - 2 * t.sin()), dim=-1)


def _eight_gaussians() -> GaussianMixture:
    angles = math.pi / 4 * torch.arange(8, dtype=torch.float64)
    means = 4 * torch.stack((angles.cos(), angles.sin()), dim=-1) / 1.414
    covariance = (0.5 / 1.414) ** 2 * torch.eye(2, dtype=torch.float64)
    return GaussianMixture(means, covariance.expand(8, 2, 2))


_MAKERS: dict[str, Callable[[], ToyDensity]] = {
    "swissroll": lambda: NoisyCurves([_swissroll_curve], 0.2),
    "circles": lambda: NoisyCircles([3.0, 1.5], 0.24),
    "rings": lambda: NoisyCircles([3.0, 2.25, 1.5, 0.75], 0.08),
    "moons": lambda: NoisyCurves([_upper_moon, _lower_moon], 0.2, nodes=96),
    "8gaussians": _eight_gaussians,
    "pinwheel": Pinwheel,
    "2spirals": TwoSpirals,
    "checkerboard": Checkerboard,
}

TOY_NAMES = tuple(_MAKERS)
"""Names of FFJORD's eight toy sets, in the order of its figures."""
