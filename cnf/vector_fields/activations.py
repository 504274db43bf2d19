"""Smooth activations and their slopes, for closed-form and forward-carried derivatives."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Activation:
    """An activation: its value, and its value with its slope at the price of little more."""

    value: Callable[[Tensor], Tensor]
    value_and_slope: Callable[[Tensor], tuple[Tensor, Tensor]]


def _tanh(a: Tensor) -> tuple[Tensor, Tensor]:
    value = a.tanh()
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


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(torch.tanh, _tanh),
    "sigmoid": Activation(torch.sigmoid, _sigmoid),
    "softplus": Activation(_softplus_value, _softplus),
    "silu": Activation(functional.silu, _silu),
    "gelu": Activation(functional.gelu, _gelu),
    "elu": Activation(functional.elu, _elu),
    "sin": Activation(torch.sin, _sin),
}
"""Activations by name: all once continuously differentiable, as the divergence needs."""

ANTIDERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": lambda a: -a.cos(),
    "tanh": lambda a: a + _softplus_value(-2 * a) - math.log(2),  # log cosh a, without overflow
}
"""Antiderivatives of activations, by name."""
