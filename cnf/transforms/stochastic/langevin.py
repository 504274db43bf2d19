"""Langevin dynamics and Hamiltonian Monte Carlo: random steps along the gradient of a density."""

import math

import torch
from torch import Generator, Tensor

from cnf._checks import check_count, check_number, is_positive
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.stochastic.densities import (
    LogDensity,
    check_log_density,
    of_proposals,
    with_gradient,
)
from cnf.transforms.stochastic.kernels import MarkovKernel, normal_like

_DIVERGED = 1000.0
"""Change of the energy of a trajectory, in nats, from which it is not followed any more."""


class Langevin(Transform):
    r"""Unadjusted Langevin steps on an unnormalised density :math:`\pi`, in both directions.

    .. math:: b = a + h \nabla \log \pi(a) + \sqrt{2h} \, \varepsilon

    The contribution of a step is :math:`(|\varepsilon|^2 - |\varepsilon'|^2) / 2`, where
    :math:`\varepsilon'` is the noise of the way back from b to a. Draws are reparametrised, so that
    the transforms around it are trained without bias.

    Args:
        features: Size of x.
        log_density: Unnormalised log-density, such as an `AnnealedDensity`; differentiable.
        steps: Number of steps.
        step_size: The number h, in squared units of x.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; when called, if `log_density` returns another
            shape, NaN or inf.

    References:
        Wu, Koehler & Noe (2020), Stochastic Normalizing Flows, equation 13.
        https://arxiv.org/abs/2002.06707

    Example:
        >>> import torch
        >>> from cnf.bases import StandardNormal
        >>> x, contribution = Langevin(2, StandardNormal(2)).to_data_and_ladj(torch.zeros(3, 2))
        >>> x.shape, contribution.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    stochastic_to_base = True
    stochastic_to_data = True

    def __init__(
        self, features: int, log_density: LogDensity, *, steps: int = 10, step_size: float = 0.01
    ) -> None:
        super().__init__(features)
        self.log_density = check_log_density("log_density", log_density)
        self.steps = check_count("steps", steps)
        self.step_size = check_number("step_size", step_size, "positive and finite", is_positive)

    def extra_repr(self) -> str:
        """Sizes of x and of the walk."""
        return f"features={self.features}, steps={self.steps}, step_size={self.step_size}"

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._walk(x, generator)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._walk(z, generator)

    def _walk(self, point: Tensor, generator: Generator | None) -> WithLadj:
        step, width = self.step_size, math.sqrt(2 * self.step_size)
        total = point.new_zeros(point.shape[:-1])
        _, slope = with_gradient(self.log_density, point)
        for _ in range(self.steps):
            noise = normal_like(point, generator)
            moved = point + step * slope + width * noise
            _, slope = with_gradient(self.log_density, moved)
            back = (point - moved - step * slope) / width
            total = total + 0.5 * (noise.square() - back.square()).sum(-1)
            point = moved
        return point, total


class AdjustedLangevin(MarkovKernel):
    """Langevin steps that are accepted or rejected (MALA): the density stays invariant.

    Args:
        features: Size of x.
        log_density: Unnormalised log-density; differentiable.
        steps: Number of steps.
        step_size: The number h of `Langevin`, in squared units of x.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; when called, if `log_density` returns another
            shape, NaN or inf.

    References:
        Roberts & Tweedie (1996), Exponential Convergence of Langevin Distributions and Their
        Discrete Approximations. https://doi.org/10.2307/3318418

    Example:
        >>> import torch
        >>> from cnf.bases import StandardNormal
        >>> kernel = AdjustedLangevin(2, StandardNormal(2), step_size=0.5)
        >>> z, contribution = kernel.to_base_and_ladj(torch.zeros(3, 2))
        >>> torch.allclose(contribution, 0.5 * z.square().sum(-1))
        True
    """

    def __init__(
        self, features: int, log_density: LogDensity, *, steps: int = 10, step_size: float = 0.1
    ) -> None:
        super().__init__(features, log_density, steps=steps)
        self.step_size = check_number("step_size", step_size, "positive and finite", is_positive)

    def _propose(self, point: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        step, width = self.step_size, math.sqrt(2 * self.step_size)
        before, slope = with_gradient(self.log_density, point, of_proposals)
        noise = normal_like(point, generator)
        proposal = point + step * slope + width * noise
        after, slope = with_gradient(self.log_density, proposal, of_proposals)
        back = (point - proposal - step * slope) / width
        return proposal, after - before + 0.5 * (noise.square() - back.square()).sum(-1)


class HamiltonianMonteCarlo(MarkovKernel):
    """Steps along Hamiltonian trajectories with normal momenta, accepted by their energies.

    Args:
        features: Size of x.
        log_density: Unnormalised log-density that the walk leaves invariant; differentiable.
        steps: Number of trajectories.
        leapfrogs: Steps of a trajectory.
        step_size: Size of such a step, in units of x.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; when called, if `log_density` returns another
            shape, NaN or inf.

    References:
        Duane et al. (1987), Hybrid Monte Carlo. https://doi.org/10.1016/0370-2693(87)91197-X

    Example:
        >>> import torch
        >>> from cnf.bases import StandardNormal
        >>> kernel = HamiltonianMonteCarlo(2, StandardNormal(2), steps=1)
        >>> z, contribution = kernel.to_base_and_ladj(torch.zeros(3, 2))
        >>> torch.allclose(contribution, 0.5 * z.square().sum(-1))
        True
    """

    def __init__(
        self,
        features: int,
        log_density: LogDensity,
        *,
        steps: int = 2,
        leapfrogs: int = 5,
        step_size: float = 0.2,
    ) -> None:
        super().__init__(features, log_density, steps=steps)
        self.leapfrogs = check_count("leapfrogs", leapfrogs)
        self.step_size = check_number("step_size", step_size, "positive and finite", is_positive)

    def _propose(self, point: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        start, momentum = point, normal_like(point, generator)
        value, slope = with_gradient(self.log_density, point, of_proposals)
        energy = value - 0.5 * momentum.square().sum(-1)
        change = torch.zeros_like(energy)
        for _ in range(self.leapfrogs):
            momentum = momentum + 0.5 * self.step_size * slope
            point = point + self.step_size * momentum
            # A trajectory that diverges is rejected, and stopped before its gradients overflow.
            goes_on = (change > -_DIVERGED).unsqueeze(-1)
            inside = torch.where(goes_on, point, start)
            value, slope = with_gradient(self.log_density, inside, of_proposals)
            slope = torch.where(goes_on, slope, 0.0)
            momentum = momentum + 0.5 * self.step_size * slope
            now = value - 0.5 * momentum.square().sum(-1) - energy
            change = torch.where(goes_on.squeeze(-1) & (now > -_DIVERGED), now, -torch.inf)
        return point, change
