r"""Normal scores: a monotone map of each feature that makes it standard normal."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from cnf._checks import check_count
from cnf.transforms.base import WithLadj
from cnf.transforms.from_data.base import DataTransform

_LEAST_SHRINKAGE = 0.01


class NormalScores(DataTransform):
    r"""Normal scores of each feature, by a smooth monotone map from its quantiles.

    The knots are at equal steps of z, between the scores of the least and the largest row. Between
    them the map is a rational-quadratic spline, beyond them linear, and its slope is continuous. An
    affine map with mean 0 and standard deviation 1, mixed into the quantiles with a share of 1 in
    the square root of the number of rows, keeps the slope bounded where values repeat. A flow of
    this transform alone, with a standard normal base, has the marginal densities of the rows, and
    independent features; with a `Whiten` behind it, it is a normal copula.

    Args:
        features: Size of x.
        knots: Number of knots of each feature, at least 2.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range.

    References:
        Gregory and Delbourgo (1982), Piecewise rational quadratic interpolation to monotonic data.
        Durkan et al. (2019), Neural Spline Flows, section 3.1, for the inverse and the slope.
        https://arxiv.org/abs/1906.04032

    Example:
        >>> x = torch.randn(1000, 1).exp()
        >>> z = NormalScores.from_data(x).to_base(x)
        >>> bool(z.mean().abs() < 0.05), bool((z.std() - 1).abs() < 0.1)
        (True, True)
    """

    def __init__(self, features: int, knots: int = 32) -> None:
        super().__init__(features)
        knots = check_count("knots", knots, least=2)
        scores = torch.linspace(-3, 3, knots)
        self.register_buffer("scores", scores)
        self.register_buffer("places", scores.repeat(features, 1))
        self.register_buffer("slopes", torch.ones(features, knots))
        self.scores: Tensor
        """Score z of each knot."""
        self.places: Tensor
        """Place x of each knot, ``(features, knots)``."""
        self.slopes: Tensor
        """Slope dz/dx at each knot, ``(features, knots)``."""

    @property
    def knots(self) -> int:
        """Number of knots of each feature."""
        return len(self.scores)

    def extra_repr(self) -> str:
        """Number of features and knots."""
        return f"{self.features}, knots={self.knots}"

    def _set(self, rows: Tensor, share: Tensor, mean: Tensor, std: Tensor) -> None:
        effective_rows = float(1 / share.square().sum())
        half_a_row = torch.tensor(0.5 / effective_rows, dtype=torch.float64)
        least = float(torch.special.ndtri(half_a_row))
        scores = torch.linspace(least, -least, self.knots, dtype=torch.float64)
        levels = torch.special.ndtr(scores).numpy()
        order = rows.argsort(0)
        places = torch.stack(
            [
                torch.from_numpy(np.interp(levels, *_distribution(column[index], share[index])))
                for column, index in zip(rows.T, order.T, strict=True)
            ]
        )
        normal = mean.unsqueeze(-1) + std.unsqueeze(-1) * scores
        shrinkage = max(_LEAST_SHRINKAGE, effective_rows**-0.5)
        places = torch.lerp(places, normal, shrinkage)
        secants = scores.diff() / places.diff()
        inner = (secants[:, 1:] * secants[:, :-1]).sqrt()
        self.scores.copy_(scores)
        self.places.copy_(places)
        self.slopes.copy_(torch.cat([secants[:, :1], inner, secants[:, -1:]], -1))

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        piece = self._piece(x, self.places)
        z, slope = piece.value_and_slope(piece.share_of(x))
        # Linear beyond the knots.
        z = z + slope * (x - x.clamp(self.places[:, 0], self.places[:, -1]))
        return z, slope.log().sum(-1)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        piece = self._piece(z, self.scores.expand_as(self.places))
        share = piece.share_for(z)
        _, slope = piece.value_and_slope(share)
        beyond = z - z.clamp(self.scores[0], self.scores[-1])
        return piece.place + piece.width * share + beyond / slope, -slope.log().sum(-1)

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        piece = self._piece(x, self.places)
        return piece.value_and_slope(piece.share_of(x))[1].log()

    def _piece(self, values: Tensor, knots: Tensor) -> "_Piece":
        """Return the piece between two knots in which each value lies, or to which it is next."""
        # torch.searchsorted has no rule for torch.vmap.
        index = (values.unsqueeze(-1) > knots[:, 1:-1]).sum(-1, keepdim=True)

        def at(table: Tensor, index: Tensor) -> Tensor:
            return table.expand(*values.shape, -1).gather(-1, index).squeeze(-1)

        scores = self.scores.expand_as(self.places)
        place, score = at(self.places, index), at(scores, index)
        return _Piece(
            place,
            at(self.places, index + 1) - place,
            score,
            at(scores, index + 1) - score,
            at(self.slopes, index),
            at(self.slopes, index + 1),
        )


class _Piece(NamedTuple):
    """Piece of a rational-quadratic spline for each value."""

    place: Tensor
    width: Tensor
    score: Tensor
    height: Tensor
    slope: Tensor
    """Slope at its start."""
    end_slope: Tensor

    def share_of(self, x: Tensor) -> Tensor:
        """Return how far x is along the width, from 0 to 1."""
        return ((x - self.place) / self.width).clamp(0, 1)

    def share_for(self, z: Tensor) -> Tensor:
        """Return how far along the width the value is z."""
        rise = ((z - self.score) / self.height).clamp(0, 1)
        start, end = self.relative_slopes
        bend = rise * (start + end - 2)
        a, b = 1 - start + bend, start - bend
        # This root does not cancel, and lies in [0, 1].
        return 2 * rise / (b + (b.square() + 4 * a * rise).clamp(min=0).sqrt())

    def value_and_slope(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the slope."""
        rest, (start, end) = 1 - share, self.relative_slopes
        between = share * rest
        denominator = 1 + (start + end - 2) * between
        value = (share.square() + start * between) / denominator
        slope = (end * share.square() + 2 * between + start * rest.square()) / denominator.square()
        return self.score + self.height * value, slope * (self.height / self.width)

    @property
    def relative_slopes(self) -> tuple[Tensor, Tensor]:
        """Slopes at both ends, in units of height / width, so that no unit of x overflows."""
        unit = self.height / self.width
        return self.slope / unit, self.end_slope / unit


def _distribution(column: Tensor, share: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the levels in the middle of the share of each row, and the values, both ascending."""
    return (share.cumsum(0) - 0.5 * share).numpy(), column.numpy()
