"""The exact-Lipschitz flow (ELF): residual steps with an exact Lipschitz constant."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional

from cnf._checks import all_finite, check_count, check_fraction, non_finite_rows, refuse_overflow
from cnf._shapes import Values
from cnf.transforms.autoregressive import AutoregressiveNetwork
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.roots import increasing_root

_NARROWEST = 1e-2
"""Least width of a ramp, in units of 1 + its distance from 0: its ends differ in float32 too."""

_SPREAD = 3.0
"""The initial ramps are evenly spaced between minus and plus this, for standardised data."""


class ExactLipschitz(Transform):
    r"""Autoregressive residual flow with an exact Lipschitz constant.

    .. math:: z_i = x_i + g(x_i; \theta_i), \qquad \theta_i = \theta_i(x_1, \dots, x_{i-1})

    Each g is a function of one number whose slope is a sum of ramps. Its largest slope is at an end
    of a ramp, so that the Lipschitz constant is exact and takes no power iteration; a g steeper
    than `lipschitz` is scaled down to it. The map is one-to-one, its Jacobian triangular, and the
    slope of z_i in x_i is between 1 - `lipschitz` and 1 + `lipschitz`. A new one is the identity.

    Ramps make the density continuous, where the steps in the slope of a ReLU network would not; its
    gradient still jumps at the ends of ramps. The way to the base calls the network of the
    parameters once; the way to the data calls it once for each feature, with a bisection each. Put
    a `Permute` between two of these, and an `ActNorm` where data need a larger scaling.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.
        units: Number of ramps of each g.
        hidden_features: Widths of the hidden layers of the network of the parameters; ``()`` for
            an affine map.
        lipschitz: Largest slope of each g, between 0 and 1.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size or `lipschitz` is out of range or, when called, the parameters of a
            step leave the range of the dtype.

    References:
        Gopal (2021), ELF: Exact-Lipschitz Based Universal Density Approximator Flow.
        https://arxiv.org/abs/2112.06997

    Example:
        >>> z, ladj = ExactLipschitz(3).to_base_and_ladj(torch.randn(5, 3))
        >>> z.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        *,
        units: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        lipschitz: float = 0.97,
    ) -> None:
        super().__init__(features, context_features)
        self.units = check_count("units", units)
        self.lipschitz = check_fraction("lipschitz", lipschitz)
        self.network = AutoregressiveNetwork(
            features, context_features, outputs=2 + 3 * self.units, hidden_features=hidden_features
        )
        self.hidden_features = self.network.hidden_features
        places = torch.linspace(-_SPREAD, _SPREAD, self.units)
        self.register_buffer("_places", places, persistent=False)
        self._places: Tensor

    def extra_repr(self) -> str:
        """Size of x, number of ramps and largest slope."""
        return f"features={self.features}, units={self.units}, lipschitz={self.lipschitz}"

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        step, slope = self._ramps("x", x, context).value_and_slope(x)
        return x + step, torch.log1p(slope).sum(-1)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        x = self._to_data_value(z, context, generator)
        return x, -self._to_base(x, context, generator)[1]

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        x = z  # the parameters of feature i depend on the features before it, which are solved
        for i in range(self.features):
            solved = self._inverse(self._ramps("z", x, context).of_feature(i), z[..., i])
            x = torch.cat([x[..., :i], solved.unsqueeze(-1), x[..., i + 1 :]], -1)
        return x

    def _inverse(self, ramps: "Ramps", target: Tensor) -> Tensor:
        """Return the x with x + g(x) = target, by root finding; the slopes bound its distance."""

        def excess_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
            step, slope = ramps.value_and_slope(x)
            return x + step - target, 1 + slope

        at_zero, _ = excess_and_slope(torch.zeros_like(target))
        largest = torch.finfo(target.dtype).max
        farthest = (at_zero.abs() / (1 - self.lipschitz)).clamp(max=largest)
        return increasing_root(excess_and_slope, -farthest, farthest)

    def _ramps(self, name: str, x: Tensor, context: Tensor | None) -> "Ramps":
        parameters = self.network(x, context).to(x.dtype)  # autocast lowers the dtype
        if not all_finite((parameters,)):
            bad = non_finite_rows(parameters.detach(), event_dim=2)
            refuse_overflow(name, bad, "the output of the network", x.dtype)
        shift, slope, heights, moves, widths = parameters.split(
            [1, 1, self.units, self.units, self.units], -1
        )
        places = self._places + moves
        widths = functional.softplus(widths) + _NARROWEST * (1 + places.abs())
        ramps = Ramps(shift.squeeze(-1), slope.squeeze(-1), heights, places, widths)
        return ramps.scaled_to(self.lipschitz)


@dataclass(frozen=True)
class Ramps:
    r"""Functions of one number whose slope is a constant plus a sum of ramps.

    .. math::
        g'(t) = \text{slope} + \sum_j \text{height}_j \,
        \operatorname{clamp}\left(\frac{t - \text{place}_j}{\text{width}_j}, 0, 1\right)
    """

    shift: Values
    """Value at 0, without the ramps that begin below 0."""
    slope: Values
    """Slope below all ramps."""
    heights: Float[Tensor, "*batch units"]
    """Change of the slope along each ramp."""
    places: Float[Tensor, "*batch units"]
    """Start of each ramp."""
    widths: Float[Tensor, "*batch units"]
    """Width of each ramp."""

    def value_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the functions and their derivatives at t, one number for each function."""
        size = _unit(t.abs())  # else terms overflow though their sum does not
        position, units = self._position(t), size.unsqueeze(-1)
        beyond = t.unsqueeze(-1) / units - (self.places + self.widths) / units
        area = 0.5 * self.widths * position.square() / units + beyond.clamp(min=0)
        value = self.slope * (t / size) + (self.heights * area).sum(-1)
        return self.shift + size * value, self.slope_at(t)

    def slope_at(self, t: Tensor) -> Tensor:
        """Return the derivatives alone."""
        return self.slope + (self.heights * self._position(t)).sum(-1)

    def lipschitz_constant(self) -> Tensor:
        """Return the largest absolute slope; slopes are linear between the ends of ramps."""
        ends = torch.cat([self.places, self.places + self.widths], -1)
        return self.slope_at(ends.movedim(-1, 0)).abs().amax(0)

    def scaled_to(self, limit: float) -> "Ramps":
        """Return the functions with their Lipschitz constants scaled down to at most `limit`."""
        # The unit cancels; without it, products with derivatives of huge slopes overflow.
        unit = _unit(torch.maximum(self.slope.abs(), self.heights.abs().amax(-1)))
        slope, heights = self.slope / unit, self.heights / unit.unsqueeze(-1)
        in_unit = Ramps(self.shift, slope, heights, self.places, self.widths)
        factor = limit / in_unit.lipschitz_constant().clamp(min=limit / unit)
        heights = factor.unsqueeze(-1) * heights
        return Ramps(self.shift, factor * slope, heights, self.places, self.widths)

    def of_feature(self, i: int) -> "Ramps":
        """Return the functions of feature i, the last axis of the batch."""
        units = (self.heights[..., i, :], self.places[..., i, :], self.widths[..., i, :])
        return Ramps(self.shift[..., i], self.slope[..., i], *units)

    def _position(self, t: Tensor) -> Tensor:
        """Return the position of t along each ramp: 0 up to its start, 1 from its end on."""
        # Clamped near the ramp, because a quotient that overflows has a gradient of NaN.
        near = t.unsqueeze(-1).clamp(self.places - self.widths, self.places + 2 * self.widths)
        return ((near - self.places) / self.widths).clamp(0, 1)


def _unit(size: Tensor) -> Tensor:
    """Return `size` where it is so large that products of a few overflow, else 1."""
    size = size.detach()
    return torch.where(size > torch.finfo(size.dtype).max ** 0.25, size, 1.0)
