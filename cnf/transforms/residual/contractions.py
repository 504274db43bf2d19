"""Networks that are contractions: what a residual flow adds to its input."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from cnf._checks import check_choice, check_count, check_number, check_shape, check_widths
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
    r"""A map g(x | context) of vectors that brings any two closer together.

    .. math:: \| g(x) - g(y) \| \le c \, \| x - y \| \quad\text{with}\quad c < 1

    A subclass defines `given`, which sees the context as it comes, and answers for the
    `coefficient` c.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.
        coefficient: The bound c of the Lipschitz constant in x, whatever the context.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, or `coefficient` not between 0 and 1.

    Example:
        >>> import torch
        >>> class Shrunken(ContractiveNetwork):
        ...     def given(self, context):
        ...         return lambda x: self.coefficient * x.sin()
        >>> Shrunken(2, coefficient=0.5)(torch.zeros(2))
        tensor([0., 0.])
    """

    def __init__(
        self, features: int, context_features: int = 0, *, coefficient: float = 0.97
    ) -> None:
        super().__init__()
        self.features = check_count("features", features)
        self.context_features = check_count("context_features", context_features, least=0)
        self.coefficient = check_number(
            "coefficient", coefficient, "between 0 and 1", lambda number: 0 < number < 1
        )

    @abstractmethod
    def given(self, context: Context | None) -> Map:
        """The map of x given the context, to be called many times with the weights of now.

        What depends on the weights alone, such as their norms, is computed here.
        """

    def forward(self, x: Rows, context: Context | None = None) -> Rows:
        """The map of `x`."""
        return self.given(context)(x)


class LipschitzMLP(ContractiveNetwork):
    """Perceptron whose layers share a bound of the whole network's Lipschitz constant.

    The weight of each of n layers is scaled down, where needed, to a spectral norm of
    ``coefficient ** (1 / n)``. The norm is the largest singular value itself, taken anew at each
    evaluation, and gradients know of it. The context shifts what each layer gives.

    The last layer starts at zero, so that a new residual flow is the identity.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.
        hidden_features: Widths of the hidden layers.
        coefficient: Bound of the Lipschitz constant in x.
        activation: "lipswish" (`LipSwish`) or "elu". Slopes are at most 1, and continuous.
            (Where ELU is linear, the log-determinant does not change with x.)

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size, the name or the coefficient is out of range.

    References:
        Behrmann et al. (2019), Invertible Residual Networks. https://arxiv.org/abs/1811.00995
        Chen et al. (2019), Residual Flows for Invertible Generative Modeling.
        https://arxiv.org/abs/1906.02735

    Example:
        >>> import torch
        >>> network = LipschitzMLP(2, hidden_features=(16, 16))
        >>> network(torch.randn(5, 2)).shape
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
        layers[-1].reset_to_zero()
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList(_ACTIVATIONS[activation]() for _ in self.hidden_features)
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)

    def given(self, context: Context | None) -> Map:
        """The map of x given the context."""
        shifted_by = scaled_context(self, context)
        return _composed(self.layers, self.activations, self.coefficient, shifted_by)


class LipschitzConv(ContractiveNetwork):
    """Convolutional network on images, bounded as `LipschitzMLP` is.

    x is the flattened image: channels, then rows, then columns. Convolutions keep the resolution
    and go round at the borders. So each is diagonal in frequency, and its spectral norm, that of
    the map of whole images, is the largest one among the matrices of its frequencies, exactly.
    The context shifts each channel.

    The last layer starts at zero, so that a new residual flow is the identity.

    Args:
        shape: Channels, height and width of the images; `features` is their product.
        context_features: Size of the context; 0 for none.
        hidden_channels: Channels of the hidden layers.
        kernel_size: Side of the kernels, odd, and no larger than the image.
        coefficient: Bound of the Lipschitz constant in x.
        activation: "lipswish" or "elu", as for `LipschitzMLP`.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size, the name or the coefficient is out of range.

    References:
        Sedghi, Gupta & Long (2019), The Singular Values of Convolutional Layers.
        https://arxiv.org/abs/1805.10408

    Example:
        >>> import torch
        >>> network = LipschitzConv((1, 8, 8), hidden_channels=(16,))
        >>> network(torch.randn(5, 64)).shape
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
        sizes = check_shape(shape)
        if len(sizes) != 3:
            raise ValueError(f"shape must be (channels, height, width); got {shape!r}.")
        channels, height, width = sizes
        features = channels * height * width
        super().__init__(features, context_features, coefficient=coefficient)
        self.shape = sizes
        self.hidden_channels = check_widths("hidden_channels", hidden_channels)
        self.kernel_size = check_count("kernel_size", kernel_size)
        if self.kernel_size % 2 == 0 or self.kernel_size > min(height, width):
            raise ValueError(
                "kernel_size must be odd, and no larger than the image of "
                f"{height} x {width}; got {kernel_size}."
            )
        self.activation = check_choice("activation", activation, _ACTIVATIONS)
        widths = (channels, *self.hidden_channels, channels)
        layers = [
            BoundedConvolution(inputs, outputs, self.context_features, self.kernel_size, sizes[1:])
            for inputs, outputs in itertools.pairwise(widths)
        ]
        layers[-1].reset_to_zero()
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList(_ACTIVATIONS[activation]() for _ in self.hidden_channels)
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)

    def given(self, context: Context | None) -> Map:
        """The map of x given the context."""
        shifted_by = scaled_context(self, context)
        inner = _composed(self.layers, self.activations, self.coefficient, shifted_by)
        return lambda x: inner(x.unflatten(-1, self.shape)).flatten(-3)


_ACTIVATIONS: dict[str, type[nn.Module]] = {"lipswish": LipSwish, "elu": nn.ELU}


def _composed(
    layers: nn.ModuleList, activations: nn.ModuleList, coefficient: float, context: Tensor | None
) -> Map:
    """The layers in a row, each within its share of the coefficient, with activations between."""
    parts = cast("list[BoundedLayer]", list(layers))
    share = coefficient ** (1 / len(parts))
    *hidden, output = [layer.with_spectral_norm(share, context) for layer in parts]

    def composed(x: Tensor) -> Tensor:
        for layer, activation in zip(hidden, activations, strict=True):
            x = activation(layer(x))
        return output(x)

    return composed
