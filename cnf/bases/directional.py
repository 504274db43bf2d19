"""Von Mises and von Mises-Fisher distributions: normalising constants, draws, concentrations."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor


def sphere_constant(concentration: Tensor) -> Tensor:
    r"""Return the logarithm of :math:`\kappa / (2 \pi (1 - e^{-2 \kappa}))`."""
    some = concentration.clamp(min=1e-6)
    large = some.log() - torch.log(-torch.expm1(-2 * some))
    small = concentration - math.log(2)
    return torch.where(concentration < 1e-6, small, large) - math.log(2 * math.pi)


def circle_constant(concentration: Tensor) -> Tensor:
    r"""Return the logarithm of :math:`1 / (2 \pi e^{-\kappa} I_0(\kappa))`."""
    scaled: Tensor = torch.special.i0e(concentration)
    return -scaled.log() - math.log(2 * math.pi)


def draw_directions(means: Tensor, concentrations: Tensor, generator: Generator | None) -> Tensor:
    """Draw unit vectors: the cosine of the angle from the mean by its inverse distribution."""
    size = (len(means), 1)
    share = torch.rand(size, generator=generator, dtype=means.dtype, device=means.device)
    some = concentrations.clamp(min=1e-6)
    fall = (-torch.log1p(share * torch.expm1(-2 * some)) / some).clamp(0, 2)
    noise = torch.randn(means.shape, generator=generator, dtype=means.dtype, device=means.device)
    aside = noise - (noise * means).sum(-1, keepdim=True) * means
    aside = torch.nn.functional.normalize(aside, dim=-1)
    return (1 - fall) * means + (fall * (2 - fall)).sqrt() * aside


def draw_angles(means: Tensor, concentrations: Tensor, generator: Generator | None) -> Tensor:
    """Draw angles by rejection from a wrapped Cauchy distribution (Best and Fisher, 1979)."""
    # At 1e-6 the distribution is uniform up to rounding; the method divides by it.
    kappa = concentrations.clamp(min=1e-6).double()
    tau = 1 + (1 + 4 * kappa.square()).sqrt()
    rho = (tau - (2 * tau).sqrt()) / (2 * kappa)
    ratio = (1 + rho.square()) / (2 * rho)
    drawn, is_open = torch.zeros_like(kappa), torch.ones_like(kappa, dtype=torch.bool)
    while is_open.any():
        first, second, third = torch.rand(
            (3, *kappa.shape), generator=generator, dtype=torch.float64, device=means.device
        )
        cosine = (math.pi * first).cos()
        tilt = (1 + ratio * cosine) / (ratio + cosine)
        limit = kappa * (ratio - tilt)
        accepted = (limit * (2 - limit) > second) | ((limit / second).log() + 1 >= limit)
        angle = tilt.clamp(-1, 1).arccos() * torch.where(third < 0.5, -1.0, 1.0)
        drawn = torch.where(is_open & accepted, angle, drawn)
        is_open &= ~accepted
    return means + drawn.to(means.dtype)


def concentration_of(length: Tensor, dimension: int, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the concentration at which the mean cosine is `length`, by Newton's method.

    The start is Banerjee's, and the steps are Sra's (2012).
    """
    length = length.clamp(1e-9, 1 - 1e-9)
    kappa = length * (dimension - length.square()) / (1 - length.square())
    for _ in range(3):
        found = mean(kappa)
        slope = 1 - found.square() - (dimension - 1) / kappa * found
        kappa = (kappa - (found - length) / slope).clamp(min=1e-9)
    return kappa
