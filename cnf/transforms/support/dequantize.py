"""Dequantisation of discrete data, and logits of bounded data."""

import math

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from cnf._checks import check_count, check_number, check_support
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.support.constraints import OpenInterval

COARSEST_NOISE = 0.01
"""Largest spacing of the numbers of a dtype, in steps between levels, for dequantisation noise."""


class Dequantize(Transform):
    r"""Uniform dequantisation of the integers 0, …, K - 1, with noise u: ``z = (x + u) / K``.

    With it, `Flow.log_prob` is a lower bound of the log-probability of the integers, in nats:

    .. math:: \log P(x) \ge \mathbb{E}_u \log p_z((x + u) / K) - D \log K

    Towards the data, numbers are rounded down, and numbers outside [0, 1) to the nearest level;
    without gradient.

    Args:
        features: Size of x, the D of the formula.
        levels: Number K of the integers, given as floating numbers.

    Raises:
        TypeError: If an argument is not an int.
        ValueError: If `features` is less than 1 or `levels` less than 2; when called, if x holds
            anything but these integers, or its dtype is too coarse for the noise between them.

    References:
        Theis, van den Oord & Bethge (2016), A Note on the Evaluation of Generative Models.
        https://arxiv.org/abs/1511.01844

    Example:
        >>> dequantize = Dequantize(features=2, levels=256)
        >>> z = dequantize.to_base(torch.tensor([0.0, 255.0]))
        >>> dequantize.to_data(z)
        tensor([  0., 255.])
    """

    stochastic_to_base = True

    def __init__(self, features: int, levels: int) -> None:
        super().__init__(features)
        self.levels = check_count("levels", levels, least=2)

    def extra_repr(self) -> str:
        """Number of levels."""
        return f"levels={self.levels}"

    @property
    def support(self) -> constraints.Constraint:
        """The integers from 0 to levels - 1."""
        return constraints.independent(constraints.integer_interval(0, self.levels - 1), 1)

    @property
    def codomain(self) -> constraints.Constraint:
        """The unit interval."""
        return constraints.independent(constraints.half_open_interval(0.0, 1.0), 1)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        check_support("x", x, self.support)
        if self.levels * torch.finfo(x.dtype).eps > COARSEST_NOISE:
            raise ValueError(
                f"x must have a finer dtype than {x.dtype}, in which noise between {self.levels} "
                "levels is rounded away; use float32 or float64."
            )
        return with_noise(x, generator) / self.levels, -self._log_volume(x)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        x = (z * self.levels).floor().clamp(0, self.levels - 1)
        return x, self._log_volume(z)

    def _log_volume(self, x: Tensor) -> Tensor:
        return x.new_full(x.shape[:-1], self.features * math.log(self.levels))


class Logit(Transform):
    r"""Logit of numbers in [0, 1]: ``z = logit(alpha + (1 - 2 alpha) x)``.

    `alpha` keeps 0 and 1 from going to infinity. It extends the support of x by
    ``alpha / (1 - 2 alpha)`` on each side; draws of a flow may lie there.

    Args:
        features: Size of x.
        alpha: Margin on each side of the unit interval; 0 if x never is 0 or 1.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1 or `alpha` not in [0, 0.5); when called, if x is
            outside of the support.

    References:
        Dinh et al. (2017), Density Estimation Using Real NVP. https://arxiv.org/abs/1605.08803

    Example:
        >>> Logit(2, alpha=0.25).to_base(torch.tensor([0.5, 1.0]))
        tensor([0.0000, 1.0986])
    """

    def __init__(self, features: int, *, alpha: float = 0.05) -> None:
        super().__init__(features)
        self.alpha = check_number(
            "alpha", alpha, "at least 0 and less than 0.5", lambda share: 0 <= share < 0.5
        )

    def extra_repr(self) -> str:
        """Margin on each side of the unit interval."""
        return f"alpha={self.alpha}"

    @property
    def support(self) -> constraints.Constraint:
        """The unit interval, its ends excluded, extended by `alpha`."""
        margin = self.alpha / (1 - 2 * self.alpha)
        return constraints.independent(OpenInterval(0 - margin, 1 + margin), 1)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        check_support("x", x, self.support)
        z = logit(self.alpha + (1 - 2 * self.alpha) * x)
        return z, -self._log_slopes(z).sum(-1)

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        check_support("x", x, self.support)
        return -self._log_slopes(logit(self.alpha + (1 - 2 * self.alpha) * x))

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        z = clamp_to_logits(z)
        x = (z.sigmoid() - self.alpha) / (1 - 2 * self.alpha)
        return x, self._log_slopes(z).sum(-1)

    def _log_slopes(self, z: Tensor) -> Tensor:
        """Return the log of dx/dz of each feature."""
        return log_slope_of_sigmoid(z) - math.log(1 - 2 * self.alpha)


def with_noise(x: Tensor, generator: Generator | None) -> Tensor:
    """Return integers plus noise in [0, 1), never rounded up to the next integer."""
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    # More than an ulp below: neither the sum nor a quotient may be rounded up.
    below_next = (x + 1) - 2 * torch.finfo(x.dtype).eps * (x + 1).abs()
    return torch.minimum(x + noise, below_next)


def logit(share: Tensor) -> Tensor:
    """Return the logit of numbers between 0 and 1, finite where rounding made them 0 or 1."""
    info = torch.finfo(share.dtype)
    share = share.clamp(info.tiny, 1 - info.eps / 2)
    return share.log() - (-share).log1p()


def clamp_to_logits(z: Tensor) -> Tensor:
    """Clamp numbers so far that their sigmoid is not rounded to 1, which has no logit."""
    farthest = -math.log(4 * torch.finfo(z.dtype).eps)
    return z.clamp(-farthest, farthest)


def log_slope_of_sigmoid(z: Tensor) -> Tensor:
    """Return the log of the derivative of the sigmoid."""
    return logsigmoid(z) + logsigmoid(-z)
