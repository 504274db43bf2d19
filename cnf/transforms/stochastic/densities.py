"""Unnormalised log-densities that Markov kernels follow."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cnf._checks import check_number, refuse_rows
from cnf._shapes import Rows, Values
from cnf.bases import Base

LogDensity: TypeAlias = "Callable[[Tensor], Tensor] | Base"
"""Unnormalised log-density in nats: from ``(*batch, features)`` to ``(*batch,)``; or a `Base`."""


class AnnealedDensity(nn.Module):
    r"""Geometric interpolation between two unnormalised densities.

    .. math:: \log \pi(x) = (1 - s) \log \pi_0(x) + s \log \pi_1(x)

    Args:
        initial: Log-density for share 0, such as the base of a flow.
        target: Log-density for share 1.
        share: The number s, from 0 to 1.

    Raises:
        TypeError: If a log-density is not callable.
        ValueError: If `share` is out of range.

    References:
        Neal (2001), Annealed Importance Sampling. https://arxiv.org/abs/physics/9803008

    Example:
        >>> from cnf.bases import StandardNormal
        >>> density = AnnealedDensity(StandardNormal(1), lambda x: -x.square().sum(-1), share=1.0)
        >>> density(torch.ones(3, 1))
        tensor([-1., -1., -1.])
    """

    def __init__(self, initial: LogDensity, target: LogDensity, share: float) -> None:
        super().__init__()
        self.initial = check_log_density("initial", initial)
        self.target = check_log_density("target", target)
        self.share = check_number("share", share, "from 0 to 1", lambda part: 0 <= part <= 1)

    def forward(self, x: Rows) -> Values:
        """Return the log-density of each row; -inf where a density with a share is zero."""
        total = x.new_zeros(x.shape[:-1])
        for share, density in ((1 - self.share, self.initial), (self.share, self.target)):
            if share:
                total = total + share * _shaped(density, x)
        return total


def check_log_density(name: str, density: LogDensity) -> LogDensity:
    """Return a log-density, after a check that it can be called."""
    if not isinstance(density, Base) and not callable(density):
        raise TypeError(
            f"{name} must be a function from points to log-densities, a module, or a Base; got "
            f"{type(density).__name__}."
        )
    return density


def evaluated(density: LogDensity, x: Tensor) -> Float[Tensor, "*batch"]:
    """Return the log-density of each row, after checks of what a user's function returns."""
    value = _shaped(density, x)
    bad = value.detach().isnan() | value.detach().isposinf()
    refuse_rows("log_density", bad, "finite or -inf")
    return value


def of_proposals(density: LogDensity, x: Tensor) -> Float[Tensor, "*batch"]:
    """Return the log-density of each row; -inf, to reject it, where it is NaN or x overflowed."""
    inside = x.detach().isfinite().all(-1)
    value = _shaped(density, torch.where(inside.unsqueeze(-1), x, 0.0))
    return torch.where(inside & ~value.detach().isnan(), value, -torch.inf)


def with_gradient(
    density: LogDensity, x: Tensor, evaluate: Callable[[LogDensity, Tensor], Tensor] = evaluated
) -> tuple[Tensor, Tensor]:
    """Return the log-density of each row and its gradient in x, itself differentiable."""
    value, pull, *_ = torch.func.vjp(lambda point: evaluate(density, point), x)
    (gradient,) = pull(torch.ones_like(value))
    return value, gradient


def _shaped(density: LogDensity, x: Tensor) -> Tensor:
    value = density.log_prob(x) if isinstance(density, Base) else density(x)
    if not isinstance(value, Tensor) or value.shape != x.shape[:-1]:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"log_density must return a number for each row, of shape {tuple(x.shape[:-1])}; got "
            f"{found}."
        )
    if not value.is_floating_point():
        raise ValueError(
            f"log_density must return floating-point numbers; got {value.dtype}. Convert them "
            f"with .to(x.dtype)."
        )
    return value.to(x.dtype)
