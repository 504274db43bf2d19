"""Absolute values: a surjection for data that are symmetric in each feature."""

import math

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.surjections.codomain import check_codomain


class Abs(Transform):
    r"""Absolute value of each feature, ``z = |x|``; towards the data each sign is a fair draw.

    The likelihood is exact: :math:`\log p(x) = \log p(z) - D \log 2`. The base, or the next
    transform, must live on numbers of at least 0, such as `cnf.bases.HalfNormal`.

    Args:
        features: Size of x, the D of the formula.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1; when called, if z is negative.

    References:
        Nielsen et al. (2020), SurVAE Flows, appendix C. https://arxiv.org/abs/2007.02731

    Example:
        >>> from cnf import Flow
        >>> from cnf.bases import HalfNormal
        >>> flow = Flow([Abs(2)], HalfNormal(2))
        >>> flow.log_prob(torch.tensor([-1.0, 1.0])).item()  # -log(2 pi) - 1
        -2.837877...
    """

    codomain = constraints.independent(constraints.nonnegative, 1)
    stochastic_to_data = True

    def extra_repr(self) -> str:
        """Size of x."""
        return f"features={self.features}"

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        # Zero stays within the support of a positive distribution.
        z = x.abs().clamp(min=torch.finfo(x.dtype).tiny)
        return z, self._contributions(x, context).sum(-1)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        check_codomain(self, z, "at least 0", "Take absolute values, or drop these rows.")
        negative = torch.rand(z.shape, generator=generator, device=z.device) < 0.5
        return torch.where(negative, -z, z), -self._contributions(z, context).sum(-1)

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        return x.new_full(x.shape, -math.log(2))
