r"""Monotonic functions onto the whole real line, for flows of zuko.

zuko's neural autoregressive flow clips numbers softly between its layers; its Gaussianization uses
normal distribution functions, which round to 0 or 1 a few units out; and both are inverted between
-10 and 10 only. Their densities integrate to less than 1, and samples are not from them. Here
nothing is clipped, distribution functions are logarithms, and brackets grow until they contain the
root.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform as TorchTransform
from torch.distributions import constraints

_PRECISION = 1e-6
"""Precision of inverses, as in zuko."""
_LARGEST = 2.0**40
_FAR = -80.0
"""A number whose exp is still a normal number in single precision."""


class Increasing(TorchTransform):
    """Increasing function onto the real line, with an inverse by bisection.

    Args:
        parameters: Tensors that gradients of the inverse are taken in.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._parameters = [tensor for tensor in parameters if tensor.requires_grad]

    @abstractmethod
    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the logarithm of the slope, as zuko does."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logarithm of the slope."""
        return self.call_and_ladj(x)[1]

    def _inverse(self, y: Tensor) -> Tensor:
        from zuko.utils import bisection

        bound = 16.0
        while bound < _LARGEST and not self._reaches(y, bound):
            bound *= 8
        low, high = torch.full_like(y, -bound), torch.full_like(y, bound)
        halvings = math.ceil(math.log2(2 * bound / _PRECISION))
        x: Tensor = bisection(self, y, low, high, halvings, self._parameters)
        return x

    @torch.no_grad()
    def _reaches(self, y: Tensor, bound: float) -> bool:
        ends = self(torch.full_like(y, -bound)), self(torch.full_like(y, bound))
        return bool(((ends[0] <= y) & (y <= ends[1])).all())


class MonotonicNetwork(nn.Module):
    """Monotonic network, an ``MNN`` of zuko, that returns a `Neural` for each signal."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, signal: Tensor) -> "Neural":
        """Return the increasing function for a signal."""
        return Neural(self.network(signal).f, [signal, *self.network.parameters()])


class Neural(Increasing):
    """Increasing function of a monotonic network."""

    def __init__(self, function: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters)
        self._function = function

    def _call(self, x: Tensor) -> Tensor:
        return self._function(x)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the logarithm of the slope, by reverse mode."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            point = x.clone().requires_grad_()  # not x, because the function may depend on x
            y = self._function(point)
            (slope,) = torch.autograd.grad(y.sum(), point, create_graph=differentiable)
        return (y if differentiable else y.detach()), slope.log()


class Gaussianization(Increasing):
    r"""Gaussianization: the map of a mixture of normals to a normal.

    .. math:: x \mapsto \Phi^{-1} \Big( \frac1K {\textstyle\sum_k} \Phi(e^{a_k} x + b_k) \Big)

    Args:
        shift: b, of shape ``(*batch, components)``.
        log_scale: a, of the same shape.
    """

    def __init__(self, shift: Tensor, log_scale: Tensor) -> None:
        super().__init__([shift, log_scale])
        self.shift = shift
        self.log_scale = log_scale

    def _call(self, x: Tensor) -> Tensor:
        return self._value(self._standard(x))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the logarithm of the slope, in closed form."""
        u = self._standard(x)
        y = self._value(u)
        return y, _log_mean_exp(self.log_scale - u.square() / 2) + y.square() / 2

    def _standard(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-1) * self.log_scale.exp() + self.shift

    def _value(self, u: Tensor) -> Tensor:
        # By the smaller of the two tails, whose logarithm has all digits.
        below = _log_mean_exp(torch.special.log_ndtr(u))
        above = _log_mean_exp(torch.special.log_ndtr(-u))
        magnitude: Tensor = _Quantile.apply(torch.minimum(below, above))  # type: ignore[no-untyped-call]
        return torch.where(below < above, magnitude, -magnitude)


@torch.no_grad()
def start_near_identity(layer: Any, components: int) -> None:
    """Initialise a layer of `Gaussianization` as a mixture that is close to the standard normal.

    The means are draws from a normal, and the widths suit a kernel density estimate; with a
    context, the bias of its network is initialised.

    References:
        Silverman (1986), Density Estimation, for the width.
    """
    conditional = hasattr(layer, "hyper")
    width = min(components ** (-1 / 5), 0.9)
    like = layer.hyper[-1].bias if conditional else layer.phi[0]
    centres = like.new_empty(like.numel() // (2 if conditional else 1)).view(-1, components)
    centres.normal_().mul_(math.sqrt(1 - width**2))
    start = -centres / width, torch.full_like(centres, -math.log(width))
    if conditional:
        like.copy_(torch.cat(start, -1).flatten())
    else:
        for parameter, value in zip(layer.phi, start, strict=True):
            parameter.copy_(value)


class _Quantile(torch.autograd.Function):
    """Normal quantile of a log-probability of at most log(1/2)."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor) -> Tensor:
        near = torch.special.ndtri(log_p.clamp_min(_FAR).exp())
        twice = -2 * log_p.clamp_max(_FAR)
        far = -(twice - math.log(2 * math.pi) - twice.log()).sqrt()
        y = torch.where(log_p > _FAR, near, far)
        for _ in range(2):  # Newton's method; the log-probability is nearly a parabola
            y = y - (torch.special.log_ndtr(y) - log_p) * _inverse_hazard(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * _inverse_hazard(y)


def _inverse_hazard(y: Tensor) -> Tensor:
    """Return the ratio of the normal distribution function and density."""
    log_p: Tensor = torch.special.log_ndtr(y)
    return (log_p + y.square() / 2 + math.log(2 * math.pi) / 2).exp()


def _log_mean_exp(terms: Tensor) -> Tensor:
    return terms.logsumexp(-1) - math.log(terms.shape[-1])
