"""Contractive networks, the residual blocks of a residual flow."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from cnf._checks import check_choice, check_count, check_fraction, check_image_shape, check_widths
from cnf._shapes import Context, Rows
from cnf.transforms.residual.spectral_layers import (
    BoundedConvolution,
    BoundedLayer,
    BoundedLinear,
    LipSwish,
    Map,
)
from cnf.vector_fields.conditioning import ContextScaling, scaled_context


class ContractiveNetwork(nn.Module, ABC):
    r"""Contraction g(x | context): a map with a Lipschitz constant in x of at most c < 1.

    .. math:: \| g(x) - g(y) \| \le c \, \| x - y \|

    A subclass defines `given`, which gets the context unscaled, and ensures the bound.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.
        coefficient: The bound c of the Lipschitz constant in x, for every context.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, or `coefficient` not between 0 and 1.

    Example:
        >>> import torch
        >>> class Sine(ContractiveNetwork):
        ...     def given(self, context):
        ...         return lambda x: self.coefficient * x.sin()
        >>> Sine(2, coefficient=0.5)(torch.zeros(2))
        tensor([0., 0.])
    """

    def __init__(
        self, features: int, context_features: int = 0, *, coefficient: float = 0.97
    ) -> None:
        super().__init__()
        self.features = check_count("features", features)
        self.context_features = check_count("context_features", context_features, least=0)
        self.coefficient = check_fraction("coefficient", coefficient)

    @abstractmethod
    def given(self, context: Context | None) -> Map:
        """Return the map of x given the context, to be called many times with the present weights.

        Everything that depends on the weights alone, such as norms, is computed here.
        """

    def forward(self, x: Rows, context: Context | None = None) -> Rows:
        """Return the map of `x`."""
        return self.given(context)(x)


class LipschitzMLP(ContractiveNetwork):
    """Spectrally normalised perceptron.

    The weight of each of n layers is scaled down, where needed, to a spectral norm of
    ``coefficient ** (1 / n)``. The norm is the exact largest singular value, computed at each
    evaluation and differentiated. The context shifts the output of each layer.

    Hidden weights start orthogonal, and hidden biases spread over the data, so that units bend
    there. The last layer starts at zero, so that a new residual flow is the identity.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.
        hidden_features: Widths of the hidden layers.
        coefficient: Bound of the Lipschitz constant in x.
        activation: "lipswish" (`LipSwish`) or "elu". Slopes are at most 1, and continuous.
            (Where ELU is linear, the log-determinant does not change with x.)

    Raises:
        TypeError: If a size is not an int.
        ValueError: If an argument is out of range.

    References:
        Behrmann et al. (2019), Invertible Residual Networks. https://arxiv.org/abs/1811.00995
        Chen et al. (2019), Residual Flows for Invertible Generative Modeling.
        https://arxiv.org/abs/1906.02735

    Example:
        >>> import torch
        >>> LipschitzMLP(2, hidden_features=(16, 16))(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        *,
        hidden_features: Sequence[int] = (64, 64),
        coefficient: float = 0.97,
        activation: str = "lipswish",
    ) -> None:
        super().__init__(features, context_features, coefficient=coefficient)
        self.hidden_features = check_widths("hidden_features", hidden_features)
        self.activation = check_choice("activation", activation, _ACTIVATIONS)
        widths = (self.features, *self.hidden_features, self.features)
        layers = [
            BoundedLinear(inputs, outputs, self.context_features)
            for inputs, outputs in itertools.pairwise(widths)
        ]
        _reset(layers)
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList(_ACTIVATIONS[activation]() for _ in self.hidden_features)
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)

    def given(self, context: Context | None) -> Map:
        """Return the map of x given the context."""
        context = scaled_context(self, context)
        return _composed(self.layers, self.activations, self.coefficient, context)


class LipschitzConv(ContractiveNetwork):
    """Spectrally normalised convolutional network, bounded and initialised as `LipschitzMLP` is.

    x is the flattened image: channels, then rows, then columns. Convolutions keep the resolution
    and are periodic. So each is diagonal in frequency, and the spectral norm of its map of whole
    images is the largest spectral norm among the matrices of its frequencies, exactly. The context
    shifts each channel.

    The last layer starts at zero, so that a new residual flow is the identity.

    Args:
        shape: Channels, height and width of the images; `features` is their product.
        context_features: Size of the context; 0 for none.
        hidden_channels: Channels of the hidden layers.
        kernel_size: Side of the kernels; odd, and no larger than the image.
        coefficient: Bound of the Lipschitz constant in x.
        activation: "lipswish" or "elu", as for `LipschitzMLP`.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If an argument is out of range.

    References:
        Sedghi, Gupta & Long (2019), The Singular Values of Convolutional Layers.
        https://arxiv.org/abs/1805.10408

    Example:
        >>> import torch
        >>> LipschitzConv((1, 8, 8), hidden_channels=(16,))(torch.randn(5, 64)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        shape: Sequence[int],
        context_features: int = 0,
        *,
        hidden_channels: Sequence[int] = (32, 32),
        kernel_size: int = 3,
        coefficient: float = 0.97,
        activation: str = "lipswish",
    ) -> None:
        channels, height, width = check_image_shape(shape)
        features = channels * height * width
        super().__init__(features, context_features, coefficient=coefficient)
        self.shape = (channels, height, width)
        self.hidden_channels = check_widths("hidden_channels", hidden_channels)
        self.kernel_size = check_count("kernel_size", kernel_size)
        if self.kernel_size % 2 == 0 or self.kernel_size > min(height, width):
            raise ValueError(
                "kernel_size must be odd, and no larger than the image of "
                f"{height} x {width}; got {kernel_size}."
            )
        self.activation = check_choice("activation", activation, _ACTIVATIONS)
        widths = (channels, *self.hidden_channels, channels)
        size, image = self.kernel_size, self.shape[1:]
        layers = [
            BoundedConvolution(inputs, outputs, self.context_features, size, image)
            for inputs, outputs in itertools.pairwise(widths)
        ]
        _reset(layers)
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList(_ACTIVATIONS[activation]() for _ in self.hidden_channels)
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)

    def given(self, context: Context | None) -> Map:
        """Return the map of x given the context."""
        context = scaled_context(self, context)
        inner = _composed(self.layers, self.activations, self.coefficient, context)
        return lambda x: inner(x.unflatten(-1, self.shape)).flatten(-3)


_ACTIVATIONS: dict[str, type[nn.Module]] = {"lipswish": LipSwish, "elu": nn.ELU}


def _reset(layers: Sequence[BoundedLayer]) -> None:
    """Initialise the layers: hidden ones that bend and keep distances, and a last one of zero."""
    *hidden, last = layers
    for layer in hidden:
        layer.reset_to_orthogonal()
    last.reset_to_zero()


def _composed(
    layers: nn.ModuleList, activations: nn.ModuleList, coefficient: float, context: Tensor | None
) -> Map:
    """Return the network: layers with activations between them, scaled to the coefficient."""
    parts = cast("list[BoundedLayer]", list(layers))
    norm = coefficient ** (1 / len(parts))
    *hidden, output = [layer.with_spectral_norm(norm, context) for layer in parts]

    def composed(x: Tensor) -> Tensor:
        for layer, activation in zip(hidden, activations, strict=True):
            x = activation(layer(x))
        return output(x)

    return composed
