"""Base class of Markov kernels that leave a density invariant, and the simplest."""

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor

from cnf._checks import check_count, check_number, is_positive
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.stochastic.densities import (
    LogDensity,
    check_log_density,
    evaluated,
    of_proposals,
)


class MarkovKernel(Transform, ABC):
    r"""Random steps that are reversible with respect to an unnormalised density :math:`\pi`.

    Both directions take the same steps. The contribution of a way from a to b is that of
    stochastic normalizing flows, the log-ratio of the reverse kernel to the kernel,

    .. math:: \log \pi(a) - \log \pi(b)

    Steps are accepted or rejected, and no gradient flows through these decisions: gradients of a
    loss by draws of the flow are biased, as in the paper.

    Args:
        features: Size of x.
        log_density: Unnormalised log-density, such as an `AnnealedDensity`.
        steps: Number of steps.

    Raises:
        TypeError: If a size is not an int, or `log_density` not callable.
        ValueError: If an argument is out of range; when called, if `log_density` returns another
            shape, NaN or inf.

    References:
        Wu, Koehler & Noe (2020), Stochastic Normalizing Flows, equation 14.
        https://arxiv.org/abs/2002.06707
    """

    stochastic_to_base = True
    stochastic_to_data = True

    def __init__(self, features: int, log_density: LogDensity, *, steps: int) -> None:
        super().__init__(features)
        self.log_density = check_log_density("log_density", log_density)
        self.steps = check_count("steps", steps)

    def extra_repr(self) -> str:
        """Sizes of x and of the walk."""
        return f"features={self.features}, steps={self.steps}"

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._walk(x, generator)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._walk(z, generator)

    def _walk(self, start: Tensor, generator: Generator | None) -> WithLadj:
        point = start
        for _ in range(self.steps):
            proposal, log_ratio = self._propose(point, generator)
            chance = torch.rand(
                log_ratio.shape, generator=generator, dtype=point.dtype, device=point.device
            )
            accepted = (chance.log() < log_ratio.detach()).unsqueeze(-1)
            point = torch.where(accepted, proposal, point)
        return point, self._difference(start, point)

    def _difference(self, start: Tensor, end: Tensor) -> Tensor:
        """Return how much the log-density falls on the way; 0 where it is zero at both ends."""
        before, after = evaluated(self.log_density, start), evaluated(self.log_density, end)
        return torch.where(before == after, torch.zeros_like(before), before - after)

    @abstractmethod
    def _propose(self, point: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Hook: return proposals, and the log of the ratio by which each is accepted."""


class MetropolisHastings(MarkovKernel):
    """Random walk with normal steps, each accepted by the ratio of densities.

    Args:
        features: Size of x.
        log_density: Unnormalised log-density that the walk leaves invariant.
        steps: Number of steps.
        scale: Standard deviation of a step, in each feature.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; when called, if `log_density` returns another
            shape, NaN or inf.

    References:
        Metropolis et al. (1953), https://doi.org/10.1063/1.1699114; as a layer, Wu, Koehler & Noe
        (2020), https://arxiv.org/abs/2002.06707

    Example:
        >>> from cnf.bases import StandardNormal
        >>> kernel = MetropolisHastings(2, StandardNormal(2), steps=5)
        >>> z, contribution = kernel.to_base_and_ladj(torch.zeros(3, 2))
        >>> torch.allclose(contribution, 0.5 * z.square().sum(-1))
        True
    """

    def __init__(
        self, features: int, log_density: LogDensity, *, steps: int = 10, scale: float = 0.5
    ) -> None:
        super().__init__(features, log_density, steps=steps)
        self.scale = check_number("scale", scale, "positive and finite", is_positive)

    def _propose(self, point: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        proposal = point + self.scale * normal_like(point, generator)
        density = self.log_density
        return proposal, of_proposals(density, proposal) - of_proposals(density, point)


def normal_like(x: Tensor, generator: Generator | None) -> Tensor:
    """Return standard normal numbers in the shape of x."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
