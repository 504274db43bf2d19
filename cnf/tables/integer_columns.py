"""Integer columns of a chain that begins with `Unconstrain`: precision and fixed noise."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

from cnf.transforms.base import Transform
from cnf.transforms.from_data import Standardize
from cnf.transforms.support.unconstrain import Unconstrain


def split_off_noise(
    unconstrain: Unconstrain, standardize: Standardize
) -> tuple[list[Transform], list[Transform]]:
    """Split the two transforms into a pair without noise, and a pair with noise for few digits.

    The pairs compose to the same map. The first standardises columns, but only subtracts the
    rounded mean from integers.
    """
    whole = [column == "integer" for column in unconstrain.columns]
    mask = torch.tensor(whole, device=standardize.mean.device)
    centre = standardize.mean.round()
    exact, noisy = (
        Standardize(len(whole), manifold=standardize.manifold).to(centre) for _ in range(2)
    )
    exact.mean.copy_(torch.where(mask, centre, standardize.mean))
    exact.log_std.copy_(torch.where(mask, 0, standardize.log_std))
    noisy.mean.copy_(torch.where(mask, standardize.mean - centre, 0))
    noisy.log_std.copy_(torch.where(mask, standardize.log_std, 0))
    integers = Unconstrain("integer" if is_whole else "real" for is_whole in whole)
    return [_without_noise(unconstrain), exact], [integers, noisy]


_POINTS = (5, 7, 11)
"""Numbers of points of cubatures: odd primes, so that no two points share a coordinate."""
_DRAWS = 8
_FINE = 4.0
"""Least standard deviation of integers whose density is smooth within a cell."""


def fixed_noise(
    transforms: Iterable[Transform],
) -> tuple[list[Transform], Float[Tensor, "points features"]]:
    """Return the chain without noise, and points that stand for the noise to add before it.

    The points are the same in each call: a cubature for integers of a standard deviation of at
    least 4, and low-discrepancy draws where cells are coarser, because a density may fall near the
    walls of a cell, where a cubature has no points. Without integer columns, the chain is
    unchanged, and there is a single point, of zeros.
    """
    first, *others = transforms
    if not isinstance(first, Unconstrain) or first.is_bijective:
        return [first, *others], torch.zeros(1, first.features, dtype=torch.float64)
    whole = [i for i, column in enumerate(first.columns) if column == "integer"]
    second = others[0] if others else None
    is_fine = isinstance(second, Standardize) and bool((second.log_std[whole].exp() >= _FINE).all())
    points = uniform_points(len(whole), cubature=is_fine)
    noise = torch.zeros(len(points), first.features, dtype=torch.float64)
    noise[:, whole] = points
    return [_without_noise(first), *others], noise


def uniform_points(count: int, *, cubature: bool) -> Float[Tensor, "points count"]:
    """Return points in the unit cube that stand for a uniform distribution, equally weighted.

    For up to ten coordinates, a cubature is of degree 2, with exact means, variances and
    covariances, of sines and cosines at an odd number of angles (as in Stroud 1957, Remarks on the
    disposition of points in numerical integration formulas). For more, or without one, they are
    low-discrepancy draws.
    """
    points = next((points for points in _POINTS if points > count), 0)
    if not points or not cubature:
        return SobolEngine(count, scramble=True, seed=0).draw(_DRAWS, dtype=torch.float64)
    multiples = torch.arange(1, points // 2 + 1, dtype=torch.float64)
    shares = torch.arange(points, dtype=torch.float64) / points
    angles = 2 * math.pi * torch.outer(shares, multiples) + math.pi / (4 * points)
    waves = torch.stack([angles.cos(), angles.sin()], -1).flatten(-2)[:, :count]
    return (1 + math.sqrt(2 / 3) * waves) / 2


def _without_noise(unconstrain: Unconstrain) -> Unconstrain:
    columns: Iterable[str | tuple[str | int | float, ...]] = unconstrain.columns
    return Unconstrain("real" if column == "integer" else column for column in columns)
