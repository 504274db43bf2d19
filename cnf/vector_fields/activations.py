"""Smooth activations and their slopes, for closed-form and forward-carried derivatives."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Activation:
    """An activation: its value, and its value with its slope at the price of little more."""

    value: Callable[[Tensor], Tensor]
    value_and_slope: Callable[[Tensor], tuple[Tensor, Tensor]]
    derivatives: Callable[[Tensor], Iterator[Tensor]]
    """The value, the slope and the curvature, one after another, by as few operations as can be:
    outside of autograd, and in the memory of the argument, which is lost."""

    def jet(self, a: Tensor, order: int) -> tuple[Tensor, ...]:
        """The value and the first `order` derivatives, 2 at most, in place of `a`."""
        return tuple(itertools.islice(self.derivatives(a), 1 + order))


class _TanhByExp(torch.autograd.Function):
    """tanh for the compiler, whose own takes several times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        decay = torch.exp(-2 * a.abs())  # of what does not overflow
        value = torch.copysign((1 - decay) / (1 + decay), a)
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        value: Tensor = ctx.saved_tensors[0]
        return cotangents[0] * (1 - value * value)


def _tanh_value(a: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and a.device.type == "cpu":
        value: Tensor = _TanhByExp.apply(a)  # type: ignore[no-untyped-call]
        return value
    return a.tanh()


def _tanh(a: Tensor) -> tuple[Tensor, Tensor]:
    value = _tanh_value(a)
    return value, 1 - value * value


def _sigmoid(a: Tensor) -> tuple[Tensor, Tensor]:
    value = a.sigmoid()
    return value, value * (1 - value)


def _softplus_value(a: Tensor) -> Tensor:
    # torch turns linear above its threshold of 20, which costs nine digits of the slope there.
    return functional.softplus(a, threshold=40.0)


def _softplus(a: Tensor) -> tuple[Tensor, Tensor]:
    return _softplus_value(a), a.sigmoid()


def _silu(a: Tensor) -> tuple[Tensor, Tensor]:
    gate = a.sigmoid()
    value = a * gate
    return value, gate + value * (1 - gate)


def _gelu(a: Tensor) -> tuple[Tensor, Tensor]:
    cdf = torch.special.ndtr(a)
    density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return a * cdf, cdf + a * density


def _elu(a: Tensor) -> tuple[Tensor, Tensor]:
    # exp of the clamped argument: no overflow, so no NaN in the gradient of the branch not taken.
    below = a.clamp(max=0).exp()
    return torch.where(a > 0, a, below - 1), torch.where(a > 0, torch.ones_like(a), below)


def _sin(a: Tensor) -> tuple[Tensor, Tensor]:
    return a.sin(), a.cos()


def _tanh_jet(a: Tensor) -> Iterator[Tensor]:
    value = a.tanh_()
    yield value
    slope = torch.addcmul(value.new_ones(()), value, value, value=-1)
    yield slope
    yield torch.addcmul(value.new_zeros(()), value, slope, value=-2)


def _sigmoid_jet(a: Tensor) -> Iterator[Tensor]:
    value = a.sigmoid_()
    yield value
    slope = torch.addcmul(value, value, value, value=-1)
    yield slope
    yield torch.addcmul(slope, slope, value, value=-2)


def _softplus_jet(a: Tensor) -> Iterator[Tensor]:
    yield _softplus_value(a)
    slope = a.sigmoid_()
    yield slope
    yield torch.addcmul(slope, slope, slope, value=-1)


def _silu_jet(a: Tensor) -> Iterator[Tensor]:
    gate = a.sigmoid()
    value = a.mul_(gate)
    yield value
    closed = gate - 1  # not `gate + value - value * gate`, which cancels far out
    slope = torch.addcmul(gate, value, closed, value=-1)
    yield slope
    yield torch.sub(value, slope, alpha=2).mul_(closed)


def _gelu_jet(a: Tensor) -> Iterator[Tensor]:
    cdf = torch.special.ndtr(a)
    yield a * cdf
    density = torch.square(a).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    bent = a * density
    yield cdf.add_(bent)
    yield density.mul_(2).addcmul_(a, bent, value=-1)


def _elu_jet(a: Tensor) -> Iterator[Tensor]:
    slope = a.clamp(max=0).exp_()
    yield torch.sub(slope, 1).add_(a.clamp(min=0))
    yield slope
    yield torch.where(a > 0, 0.0, slope)


def _sin_jet(a: Tensor) -> Iterator[Tensor]:
    value = a.sin()
    yield value
    yield a.cos_()
    yield value.neg()


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(_tanh_value, _tanh, _tanh_jet),
    "sigmoid": Activation(torch.sigmoid, _sigmoid, _sigmoid_jet),
    "softplus": Activation(_softplus_value, _softplus, _softplus_jet),
    "silu": Activation(functional.silu, _silu, _silu_jet),
    "gelu": Activation(functional.gelu, _gelu, _gelu_jet),
    "elu": Activation(functional.elu, _elu, _elu_jet),
    "sin": Activation(torch.sin, _sin, _sin_jet),
}
"""Activations by name: all once continuously differentiable, as the divergence needs."""


# Functions with names, for fields that hold them are pickled.
def _sin_antiderivative(a: Tensor) -> Tensor:
    return -a.cos()


def _tanh_antiderivative(a: Tensor) -> Tensor:
    return a + _softplus_value(-2 * a) - math.log(2)  # log cosh a, without overflow


ANTIDERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": _sin_antiderivative,
    "tanh": _tanh_antiderivative,
}
"""Antiderivatives of activations, by name."""
