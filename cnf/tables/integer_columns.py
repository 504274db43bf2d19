"""Integer columns of a chain that begins with `Unconstrain`: precision and fixed noise."""

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
    exact, noisy = Standardize(len(whole)).to(centre), Standardize(len(whole)).to(centre)
    exact.mean.copy_(torch.where(mask, centre, standardize.mean))
    exact.log_std.copy_(torch.where(mask, 0, standardize.log_std))
    noisy.mean.copy_(torch.where(mask, standardize.mean - centre, 0))
    noisy.log_std.copy_(torch.where(mask, standardize.log_std, 0))
    integers = Unconstrain("integer" if is_whole else "real" for is_whole in whole)
    return [_without_noise(unconstrain), exact], [integers, noisy]


def fixed_noise(
    transforms: Iterable[Transform], draws: int
) -> tuple[list[Transform], Float[Tensor, "draws features"]]:
    """Return the chain without noise, and the noise to add before it: low-discrepancy draws.

    The draws are the same in each call. Without integer columns, the chain is unchanged, and there
    is a single draw, of zeros.
    """
    first, *others = transforms
    if not isinstance(first, Unconstrain) or first.is_bijective:
        return [first, *others], torch.zeros(1, first.features, dtype=torch.float64)
    whole = [i for i, column in enumerate(first.columns) if column == "integer"]
    noise = torch.zeros(draws, first.features, dtype=torch.float64)
    spread = SobolEngine(len(whole), scramble=True, seed=0).draw(draws, dtype=torch.float64)
    noise[:, whole] = spread
    return [_without_noise(first), *others], noise


def _without_noise(unconstrain: Unconstrain) -> Unconstrain:
    columns: Iterable[str | tuple[str | int | float, ...]] = unconstrain.columns
    return Unconstrain("real" if column == "integer" else column for column in columns)
