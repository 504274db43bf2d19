"""Spectrally normalised layers, and an activation with a known Lipschitz constant."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn
from torch.nn import functional

from cnf._shapes import Values

Map = Callable[[Tensor], Tensor]
"""A map of rows, such as ``(*batch, features)``."""


class LipSwish(nn.Module):
    """LipSwish activation: ``x sigmoid(b x) / 1.1`` with a learnable steepness b > 0.

    Its slope is within [-0.1, 1] for all b: the slope of ``x sigmoid(x)`` is at most 1.0999. The
    steepness starts at 10: with 1, a unit is nearly linear over inputs of a normalised layer.

    References:
        Chen et al. (2019), Residual Flows. https://arxiv.org/abs/1906.02735
    """

    def __init__(self) -> None:
        super().__init__()
        # b is softplus(steepness), and softplus(10) is 10.00005.
        self.steepness = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return the activation of each entry."""
        return x * torch.sigmoid(functional.softplus(self.steepness) * x) / 1.1


class BoundedLayer(nn.Module, ABC):
    """Affine map that can be spectrally normalised; a context shifts it.

    Args:
        initial: Layer of the initial weight and bias.
        outputs: Size of the bias.
        context_features: Size of the context; 0 for none.
    """

    def __init__(self, initial: nn.Linear | nn.Conv2d, outputs: int, context_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial.weight)
        self.bias = nn.Parameter(cast("Tensor", initial.bias))
        self.shift = nn.Linear(context_features, outputs, bias=False) if context_features else None

    @abstractmethod
    def norm(self) -> Float[Tensor, ""]:
        """Return the spectral norm of the map before scaling."""

    @abstractmethod
    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the map of `x` with this weight and bias."""

    def with_spectral_norm(self, norm: float, context: Tensor | None) -> Map:
        """Return the map with its weight scaled down to a spectral norm of at most `norm`."""
        weight = rescale_to_norm(self.weight, self.norm(), norm)
        bias = self.bias if self.shift is None else self.bias + self.shift(context)
        return partial(self.mapped, weight=weight, bias=bias)

    @torch.no_grad()
    def reset_to_orthogonal(self) -> None:
        """Draw an orthogonal weight, and biases that spread the bends of the units over the data.

        Equal singular values lose the least under normalisation. For inputs of mean 0 and
        variance 1, the units bend within two standard deviations of the mean.
        """
        nn.init.orthogonal_(self.weight)
        row_norms = torch.linalg.vector_norm(self.weight.flatten(1), dim=1)
        self.bias.uniform_(-2, 2).mul_(row_norms)

    @torch.no_grad()
    def reset_to_zero(self) -> None:
        """Make the map zero for all x and contexts."""
        for parameter in self.parameters():
            parameter.zero_()


class BoundedLinear(BoundedLayer):
    """Spectrally normalised linear layer.

    Args:
        inputs: Size of x.
        outputs: Size of the result.
        context_features: Size of the context; 0 for none.
    """

    def __init__(self, inputs: int, outputs: int, context_features: int) -> None:
        super().__init__(nn.Linear(inputs, outputs), outputs, context_features)

    def norm(self) -> Float[Tensor, ""]:
        """Return the largest singular value."""
        return spectral_norm(self.weight)

    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the affine map of `x`, ``(*batch, inputs)``."""
        return functional.linear(x, weight) + bias


class BoundedConvolution(BoundedLayer):
    """Spectrally normalised periodic convolution of images.

    Args:
        inputs: Number of channels of x.
        outputs: Number of channels of the result.
        context_features: Size of the context; 0 for none.
        kernel_size: Side of the kernel, odd.
        image: Height and width of x.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        context_features: int,
        kernel_size: int,
        image: tuple[int, ...],
    ) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, kernel_size), outputs, context_features)
        self.image = image

    def norm(self) -> Float[Tensor, ""]:
        """Return the largest singular value of the map of whole images."""
        # A matrix for each frequency; for a real kernel, half of the frequencies are enough.
        by_frequency = torch.fft.rfft2(self.weight, s=self.image).flatten(-2)
        return spectral_norm(by_frequency.movedim(-1, 0)).amax()

    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the convolution of `x`, ``(*batch, inputs, height, width)``."""
        border = (weight.shape[-1] // 2,) * 4
        rows = functional.pad(x.reshape(-1, *x.shape[-3:]), border, mode="circular")
        images = functional.conv2d(rows, weight)
        return images.reshape(*x.shape[:-3], *images.shape[1:]) + bias[..., None, None]


def spectral_norm(matrix: Inexact[Tensor, "*batch rows columns"]) -> Values:
    """Return the largest singular value: exact and differentiable, without power iteration."""
    norm: Tensor = torch.linalg.matrix_norm(matrix, 2)
    return norm


def rescale_to_norm(weight: Tensor, norm: Tensor, largest: float) -> Tensor:
    """Return a weight with this norm, scaled down to a norm of at most `largest`."""
    # Not by min(1, largest / norm), whose gradient is NaN where the weight is zero.
    return weight * (largest / norm.clamp(min=largest))
