"""Rounding down: a surjection to the integers."""

from torch import Generator, Tensor
from torch.distributions import constraints

from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.support.constraints import Integers
from cnf.transforms.support.dequantize import with_noise
from cnf.transforms.surjections.codomain import check_codomain
from cnf.transforms.surjections.reduction import no_ladj


class Round(Transform):
    """Each feature rounded down to an integer; towards the data, uniform noise in [0, 1) is added.

    The likelihood is exact, with a contribution of 0: the density is constant on each cell. The
    base must be one of integers. Its `Inverse` is uniform dequantisation, a lower bound for
    integers of any size; `Dequantize` is for K levels, which it scales to [0, 1).

    Args:
        features: Size of x.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1; when called, if z is not of integers.

    References:
        Nielsen et al. (2020), SurVAE Flows. https://arxiv.org/abs/2007.02731

    Example:
        >>> import torch
        >>> Round(2).to_base(torch.tensor([1.7, -0.2]))
        tensor([ 1., -1.])
    """

    codomain = constraints.independent(Integers(), 1)
    stochastic_to_data = True

    def extra_repr(self) -> str:
        """Size of x."""
        return f"features={self.features}"

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return x.floor(), no_ladj(x)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        check_codomain(self, z, "integers", "Round these rows.")
        return with_noise(z, generator), no_ladj(z)
