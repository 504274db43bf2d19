"""Conditioners: networks that compute the parameters of a coupling layer."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cnf._checks import check_count, check_image_shape, check_widths
from cnf._shapes import Context, Rows
from cnf.vector_fields.conditioning import ContextScaling, scaled_context


class Conditioner(nn.Module, ABC):
    """Base class of conditioners. A coupling takes any module; `cnf.save` stores these by name."""

    @abstractmethod
    def forward(self, x: Rows, context: Context | None = None) -> Float[Tensor, "*batch outputs"]:
        """Return the parameters for each row."""


class MLPConditioner(Conditioner):
    """Fully connected network of x and the context, with SiLU between its layers.

    The last layer starts at zero, so that a new transform is the identity.

    Args:
        features: Size of x.
        outputs: Number of outputs for each row.
        context_features: Size of the context; 0 for none.
        hidden_features: Widths of the hidden layers; ``()`` for an affine map.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range.

    Example:
        >>> MLPConditioner(3, 4, context_features=2)(torch.ones(5, 3), torch.ones(5, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        context_features: int = 0,
        *,
        hidden_features: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        self.features = check_count("features", features)
        self.outputs = check_count("outputs", outputs)
        self.context_features = check_count("context_features", context_features, least=0)
        self.hidden_features = check_widths("hidden_features", hidden_features, least=0)
        widths = (self.features + self.context_features, *self.hidden_features)
        layers: list[nn.Module] = []
        for inputs, width in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, width), nn.SiLU()]
        last = nn.Linear(widths[-1], self.outputs)
        _reset_to_zero(last)
        self.layers = nn.Sequential(*layers, last)
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)

    def forward(self, x: Rows, context: Context | None = None) -> Float[Tensor, "*batch outputs"]:
        """Return the parameters for each row."""
        context = scaled_context(self, context)
        inputs = x if context is None else torch.cat([x, context], -1)
        outputs: Tensor = self.layers(inputs)
        return outputs


class ConvConditioner(Conditioner):
    """Convolutional network of a flattened image and the context, with ReLU between its layers.

    The first and last kernels are 3 x 3, the others 1 x 1, with zero padding. The context shifts
    each channel of the first layer's output. The last layer starts at zero, so that a new transform
    is the identity, and is followed by a learned positive factor for each channel,
    ``exp(3 * log_scale)``.

    Args:
        shape: Shape ``(channels, height, width)`` of the image that x is, flattened in C order.
        outputs: Channels of the output, a flattened image of the same height and width.
        context_features: Size of the context; 0 for none.
        hidden_channels: Channels of the hidden layers; ``()`` for a single convolution.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, or `shape` does not have three.

    References:
        Kingma & Dhariwal (2018), Glow. https://arxiv.org/abs/1807.03039

    Example:
        >>> ConvConditioner((3, 8, 8), outputs=2)(torch.zeros(5, 192)).shape
        torch.Size([5, 128])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        context_features: int = 0,
        *,
        hidden_channels: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        self.shape = check_image_shape(shape)
        self.features = math.prod(self.shape)
        self.outputs = check_count("outputs", outputs)
        self.context_features = check_count("context_features", context_features, least=0)
        self.hidden_channels = check_widths("hidden_channels", hidden_channels, least=0)
        widths = (self.shape[0], *self.hidden_channels, self.outputs)
        last = len(widths) - 2
        sizes = [3 if i in (0, last) else 1 for i in range(last + 1)]
        layers = [
            nn.Conv2d(inputs, width, size, padding=size // 2)
            for (inputs, width), size in zip(itertools.pairwise(widths), sizes, strict=True)
        ]
        self.layers = nn.ModuleList(layers)
        self.log_scale = nn.Parameter(torch.zeros(self.outputs))
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)
            self.context_layer = nn.Linear(self.context_features, widths[1], bias=False)
            if not self.hidden_channels:
                _reset_to_zero(self.context_layer)
        _reset_to_zero(layers[-1])

    def forward(self, x: Rows, context: Context | None = None) -> Float[Tensor, "*batch outputs"]:
        """Return the channels of parameters for each image, flattened."""
        first, *others = self.layers
        channels: Tensor = first(x.reshape(-1, *self.shape))
        context = scaled_context(self, context)
        if context is not None:
            shifts = self.context_layer(context.reshape(-1, self.context_features))
            channels = channels + shifts[..., None, None]
        for layer in others:
            channels = layer(channels.relu())
        channels = channels * (3 * self.log_scale).exp()[:, None, None]
        return channels.reshape(*x.shape[:-1], self.outputs * math.prod(self.shape[1:]))


def _reset_to_zero(layer: nn.Linear | nn.Conv2d) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
