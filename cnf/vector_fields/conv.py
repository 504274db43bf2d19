"""Convolutional vector field, for images."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from cnf._checks import check_choice, check_count, check_image_shape, check_widths
from cnf._shapes import Context, Rows, Times
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.conditioning import ContextScaling, scaled_context
from cnf.vector_fields.jacobian.affine_map import AffineMap
from cnf.vector_fields.layers import LAYERS, reset_layers
from cnf.vector_fields.staged import Activated, LayeredField, Stage, Tangent


class ConvField(LayeredField):
    """Convolutional network on images, conditioned on time and context.

    x is the flattened image: channels, then rows, then columns. Each layer is a layer of `MLPField`
    applied to the patch around every pixel, with zero padding: a convolution that keeps the
    resolution, with one gate and one shift for each channel. Jacobian products are computed forward
    with the values.

    The divergence has no closed form, and the exact one costs a product for each pixel and channel;
    choose `Hutchinson` for all but small images.

    The output layer starts at zero, so that a new field is zero and a new flow the identity.

    Args:
        shape: Channels, height and width of the images; `features` is their product.
        context_features: Size of the context; 0 for none.
        hidden_channels: Channels of the hidden layers.
        layer: Kind of every layer: a name in `cnf.vector_fields.layers.LAYERS`. (FFJORD's
            published "concat" is a shift only away from the border, where its channel of t is
            padded with zeros.)
        activation: Name in `cnf.vector_fields.activations.ACTIVATIONS`, for all hidden layers.
        kernel_size: Side of the kernels; odd.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size or name is out of range.

    References:
        Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367

    Example:
        >>> import torch
        >>> field = ConvField((1, 8, 8))
        >>> field(torch.tensor(0.5), torch.zeros(3, 64)).shape
        torch.Size([3, 64])
    """

    shares_times = True

    def __init__(
        self,
        shape: Sequence[int],
        context_features: int = 0,
        *,
        hidden_channels: Sequence[int] = (32, 32),
        layer: str = "concatsquash",
        activation: str = "silu",
        kernel_size: int = 3,
    ) -> None:
        channels, height, width = check_image_shape(shape)
        super().__init__(channels * height * width, context_features)
        self.shape = (channels, height, width)
        self.hidden_channels = check_widths("hidden_channels", hidden_channels)
        self.layer = check_choice("layer", layer, LAYERS)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.kernel_size = check_count("kernel_size", kernel_size)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd; got {kernel_size}. Try {kernel_size + 1}.")
        widths = (channels, *self.hidden_channels, channels)
        self.layers = nn.ModuleList(
            LAYERS[layer](inputs * self.kernel_size**2, outputs, self.context_features)
            for inputs, outputs in itertools.pairwise(widths)
        )
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights: torch's, but zero for the last layer."""
        reset_layers(self.layers)

    def stages(self, t: Times, x: Rows, context: Context | None) -> list[Stage]:
        """Return the convolutions with their activations, between two changes of shape."""
        batch = x.shape[:-1]
        context = scaled_context(self, context)
        if t.ndim:
            t = t.expand(batch).flatten()
        if context is not None and context.ndim > 1:
            context = context.expand(*batch, self.context_features).flatten(0, -2)
        *hidden, output = [
            Convolution(layer(t, context), self.kernel_size) for layer in self.layers
        ]
        activation = ACTIVATIONS[self.activation]
        return [
            Reshape((math.prod(batch), *self.shape)),
            *(Activated(convolution, activation) for convolution in hidden),
            output,
            Reshape(tuple(x.shape)),
        ]


class Convolution(NamedTuple):
    """Convolution with zero padding: an affine map of the patch around each pixel."""

    affine: AffineMap
    """Inputs in the order of a kernel, ``(channels, row, column)``; at most one batch axis."""
    kernel_size: int

    def value(
        self, x: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows out height width"]:
        """Return the map of `x`."""
        affine = self.affine
        if affine.is_shared and affine.bias.ndim == 1:
            return nn.functional.conv2d(x, self._kernel, affine.bias, padding=self.kernel_size // 2)
        return self.tangent(x) + affine.at_zero[..., None, None]

    def tangent(
        self, dx: Float[Tensor, "*probes rows channels height width"]
    ) -> Float[Tensor, "*probes rows out height width"]:
        """Return the derivative of the map in direction `dx`."""
        weight, gate = self.affine.weight, self.affine.gate
        size, padding = self.kernel_size, self.kernel_size // 2
        images = dx.flatten(0, -4)
        if weight.ndim == 2:
            product: Tensor = nn.functional.conv2d(images, self._kernel, padding=padding)
            product = product.unflatten(0, dx.shape[:-3])
        else:
            patches = nn.functional.unfold(images, size, padding=padding)
            product = (weight @ patches.unflatten(0, dx.shape[:-3])).unflatten(-1, dx.shape[-2:])
        return product if gate is None else gate[..., None, None] * product

    def linearised(
        self, x: Float[Tensor, "rows channels height width"]
    ) -> tuple[Float[Tensor, "rows out height width"], Tangent]:
        """Return the map of `x`, and its derivative."""
        return self.value(x), self.tangent

    @property
    def _kernel(self) -> Tensor:
        kernel: Tensor = self.affine.weight.unflatten(-1, (-1, self.kernel_size, self.kernel_size))
        return kernel


class Reshape(NamedTuple):
    """Change of shape."""

    shape: tuple[int, ...]

    def value(self, x: Tensor) -> Tensor:
        """Return `x` in the shape."""
        return x.reshape(self.shape)

    def linearised(self, x: Tensor) -> tuple[Tensor, Tangent]:
        """Return `x` in the shape, and the same change for directions."""
        return self.value(x), lambda dx: dx.reshape(len(dx), *self.shape)
