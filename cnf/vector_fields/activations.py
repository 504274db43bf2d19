"""Smooth activations and their derivatives, for closed-form and forward-mode derivatives."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Activation:
    """Activation: its value, and its value and slope together, which cost little more."""

    value: Callable[[Tensor], Tensor]
    value_and_slope: Callable[[Tensor], tuple[Tensor, Tensor]]


class _TanhByExp(torch.autograd.Function):
    """tanh by exp for compiled programs, whose own tanh is several times slower on a CPU."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        decay = torch.exp(-2 * a.abs())  # never overflows
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
    return value, torch.addcmul(value.new_ones(()), value, value, value=-1)


def _sigmoid(a: Tensor) -> tuple[Tensor, Tensor]:
    value = a.sigmoid()
    return value, torch.addcmul(value, value, value, value=-1)


def _softplus_value(a: Tensor) -> Tensor:
    # torch's default threshold of 20 costs nine digits of the slope above it.
    return functional.softplus(a, threshold=40.0)


def _softplus(a: Tensor) -> tuple[Tensor, Tensor]:
    return _softplus_value(a), a.sigmoid()


def _silu(a: Tensor) -> tuple[Tensor, Tensor]:
    gate = a.sigmoid()
    value = a * gate
    # gate + value * (1 - gate), without cancellation far out.
    return value, torch.lerp(value, value.new_ones(()), gate)


def _gelu(a: Tensor) -> tuple[Tensor, Tensor]:
    cdf = torch.special.ndtr(a)
    density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return a * cdf, cdf + a * density


def _elu(a: Tensor) -> tuple[Tensor, Tensor]:
    # The clamp prevents overflow, and gives the slope 1 above zero.
    return functional.elu(a), a.clamp(max=0).exp()


def _sin(a: Tensor) -> tuple[Tensor, Tensor]:
    return a.sin(), a.cos()


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(_tanh_value, _tanh),
    "sigmoid": Activation(torch.sigmoid, _sigmoid),
    "softplus": Activation(_softplus_value, _softplus),
    "silu": Activation(functional.silu, _silu),
    "gelu": Activation(functional.gelu, _gelu),
    "elu": Activation(functional.elu, _elu),
    "sin": Activation(torch.sin, _sin),
}
"""Activations by name: all once continuously differentiable, as the divergence needs."""


# Named functions, because fields that hold them are pickled.
def _sin_antiderivative(a: Tensor) -> Tensor:
    return -a.cos()


def _tanh_antiderivative(a: Tensor) -> Tensor:
    return a + _softplus_value(-2 * a) - math.log(2)  # log cosh a, without overflow


ANTIDERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": _sin_antiderivative,
    "tanh": _tanh_antiderivative,
}
"""Antiderivatives of activations, by name."""
