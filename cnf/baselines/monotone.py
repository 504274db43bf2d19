r"""Increasing functions onto the whole line, for flows of zuko whose own are not.

zuko's neural autoregressive flow clips numbers softly between its layers, so that what lies beyond
has no x; its Gaussianization takes normal distribution functions, which are 0 or 1 in floating
point from a few units on; and both are inverted between -10 and 10, where the ends stand for all
that is farther out. Densities then have an integral below 1, and samples are not from them. Here
nothing is clipped, distribution functions are logarithms, and brackets grow until they hold.
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
"""Of inverses, as in zuko."""
_LARGEST = 2.0**40
_FAR = -80.0
"""Where exp is still a normal number in single precision."""


class Increasing(TorchTransform):
    """An increasing function of numbers, onto the line; inverted by bisection.

    Args:
        bisection: That of ``zuko.utils``.
        parameters: What the function depends on, as far as gradients of the inverse are wanted.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, bisection: Callable[..., Tensor], parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._bisection = bisection
        self._parameters = [tensor for tensor in parameters if tensor.requires_grad]

    @abstractmethod
    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and the logarithm of the slope; zuko asks for both at once."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The logarithm of the slope."""
        del y
        return self.call_and_ladj(x)[1]

    def _inverse(self, y: Tensor) -> Tensor:
        bound = 16.0
        while bound < _LARGEST and not self._reaches(y, bound):
            bound *= 8
        low, high = torch.full_like(y, -bound), torch.full_like(y, bound)
        halvings = math.ceil(math.log2(2 * bound / _PRECISION))
        return self._bisection(self, y, low, high, halvings, self._parameters)

    @torch.no_grad()
    def _reaches(self, y: Tensor, bound: float) -> bool:
        ends = self(torch.full_like(y, -bound)), self(torch.full_like(y, bound))
        return bool(((ends[0] <= y) & (y <= ends[1])).all())


class MonotonicNetwork(nn.Module):
    """Makes the increasing function of a monotonic network at some signals, in place of zuko's.

    Args:
        zuko: The library.
        network: Its ``MNN``.
    """

    def __init__(self, zuko: Any, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._bisection = zuko.utils.bisection

    def forward(self, signal: Tensor) -> "Neural":
        """The function."""
        theirs = self.network(signal)
        return Neural(theirs.f, self._bisection, [signal, *self.network.parameters()])


class Neural(Increasing):
    """What a monotonic network gives, by itself."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        bisection: Callable[..., Tensor],
        parameters: Sequence[Tensor],
    ) -> None:
        super().__init__(bisection, parameters)
        self._function = function

    def _call(self, x: Tensor) -> Tensor:
        return self._function(x)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By reverse mode, each number by itself."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            point = x.clone().requires_grad_()  # not x, on which the function may depend too
            y = self._function(point)
            (slope,) = torch.autograd.grad(y.sum(), point, create_graph=differentiable)
        return (y if differentiable else y.detach()), slope.log()


class Gaussianization(Increasing):
    r"""The map of a mixture of normals to a normal.

    .. math:: x \mapsto \Phi^{-1} \Big( \frac1K {\textstyle\sum_k} \Phi(e^{a_k} x + b_k) \Big)

    Args:
        shift: b, of shape ``(*batch, components)``.
        log_scale: a, likewise.
        bisection: That of ``zuko.utils``.
    """

    def __init__(
        self, shift: Tensor, log_scale: Tensor, *, bisection: Callable[..., Tensor]
    ) -> None:
        super().__init__(bisection, [shift, log_scale])
        self.shift = shift
        self.log_scale = log_scale

    def _call(self, x: Tensor) -> Tensor:
        return self._value(self._standard(x))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """In closed form."""
        u = self._standard(x)
        y = self._value(u)
        return y, _log_mean_exp(self.log_scale - u.square() / 2) + y.square() / 2

    def _standard(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-1) * self.log_scale.exp() + self.shift

    def _value(self, u: Tensor) -> Tensor:
        # By the smaller of the two tails, of which the logarithm has all digits.
        below = _log_mean_exp(torch.special.log_ndtr(u))
        above = _log_mean_exp(torch.special.log_ndtr(-u))
        magnitude: Tensor = _Quantile.apply(torch.minimum(below, above))  # type: ignore[no-untyped-call]
        return torch.where(below < above, magnitude, -magnitude)


@torch.no_grad()
def start_near_identity(layer: Any, components: int) -> None:
    """Let a layer of `Gaussianization` start as a mixture like the standard normal.

    Its components are draws from a normal, each as wide as a kernel is for so many of them; with a
    context, this is where its network starts from.

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
    """Where the normal distribution function has a logarithm, of at most that of 1/2."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor) -> Tensor:
        near = torch.special.ndtri(log_p.clamp_min(_FAR).exp())
        twice = -2 * log_p.clamp_max(_FAR)
        far = -(twice - math.log(2 * math.pi) - twice.log()).sqrt()
        y = torch.where(log_p > _FAR, near, far)
        for _ in range(2):  # Newton's method, on what is nearly a parabola
            y = y - (torch.special.log_ndtr(y) - log_p) * _inverse_hazard(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * _inverse_hazard(y)


def _inverse_hazard(y: Tensor) -> Tensor:
    """The distribution function over the density, both of the normal."""
    log_p: Tensor = torch.special.log_ndtr(y)
    return (log_p + y.square() / 2 + math.log(2 * math.pi) / 2).exp()


def _log_mean_exp(terms: Tensor) -> Tensor:
    return terms.logsumexp(-1) - math.log(terms.shape[-1])
