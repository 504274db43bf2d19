"""Flowification: ordinary linear and convolution layers with a likelihood."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cnf._checks import all_finite, check_count, check_shape, check_type, check_widths
from cnf.bases import ConditionalNormal
from cnf.transforms.base import Transform
from cnf.transforms.chain import Chain
from cnf.transforms.conditioners import ConvConditioner
from cnf.transforms.elementwise import LeakyReLU
from cnf.transforms.linear.conv1x1 import Conv1x1
from cnf.transforms.linear.orthogonal import Orthogonal
from cnf.transforms.reshape import Flatten
from cnf.transforms.surjections.augment import Augment
from cnf.transforms.surjections.slice import Slice
from cnf.transforms.surjections.unfold import Unfold

_BOUND = 3.0
"""Bound on the logarithms of standard deviations of dropped coordinates, that of couplings: draws
pass through many layers."""


class FlowifiedLinear(Chain):
    r"""Linear layer ``z = W x + b`` with a stochastic inverse and its likelihood contribution.

    It is a rotation and shift (`Orthogonal`), then:

    - for fewer outputs, a `Slice`, which models the dropped coordinates given the others, and an
      invertible matrix (`Conv1x1`): an exact likelihood;
    - for more outputs, before the rotation, an `Augment` by normal noise: a lower bound;
    - for as many, the matrix alone.

    The paper has rotations on both sides of a diagonal matrix; here the matrix is P L U.

    Args:
        in_features: Size of x.
        out_features: Size of z.
        hidden_features: Widths of the network that models the dropped coordinates.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range.

    References:
        Máté, Klein, Golling & Fleuret (2022), Flowification. https://arxiv.org/abs/2205.15209

    Example:
        >>> layer = FlowifiedLinear(5, 2)
        >>> layer.to_base(torch.zeros(3, 5)).shape, layer.likelihood
        (torch.Size([3, 2]), 'exact')
        >>> FlowifiedLinear(2, 5).likelihood
        'lower_bound'
    """

    def __init__(
        self, in_features: int, out_features: int, *, hidden_features: Sequence[int] = (64, 64)
    ) -> None:
        in_features = check_count("in_features", in_features)
        out_features = check_count("out_features", out_features)
        widths = check_widths("hidden_features", hidden_features, least=0)
        dropped = None
        if in_features > out_features:
            dropped = ConditionalNormal(
                in_features - out_features, out_features, hidden_features=widths, bound=_BOUND
            )
        super().__init__(_linear_parts((in_features, 1, 1), out_features, dropped))
        self.in_features = in_features
        self.out_features = out_features
        self.hidden_features = widths

    def set_to(self, weight: Tensor, bias: Tensor) -> None:
        """Set W, ``(out_features, in_features)``, and b.

        Raises:
            ValueError: If a shape does not fit, or W is not finite or has not the full rank.
        """
        _check_linear(weight, (self.out_features, self.in_features), bias)
        _set_linear(self.transforms, weight, bias)


class FlowifiedConv2d(Chain):
    r"""Convolution of a flattened image with a stochastic inverse and its likelihood contribution.

    The patches that the kernel sees (`Unfold`), each through the same linear layer, with the parts
    of a `FlowifiedLinear`. The likelihood is exact if patches do not overlap, there is no padding
    and no more channels than a patch has numbers; else it is a lower bound. Padding is normal noise
    in place of zeros.

    Args:
        shape: Shape ``(channels, height, width)`` of the image that x is, flattened in C order.
        out_channels: Channels of the image that z is, flattened.
        kernel_size: Height and width of the kernel.
        stride: Step of the kernel, at most `kernel_size`; None for `kernel_size`.
        padding: Pixels added on each side.
        hidden_channels: Channels of the convolutional network that models the dropped coordinates.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, or a pixel would be in no patch.

    References:
        Máté, Klein, Golling & Fleuret (2022), Flowification. https://arxiv.org/abs/2205.15209

    Example:
        >>> layer = FlowifiedConv2d((1, 8, 8), 4, 2)
        >>> layer.convolved_shape, layer.likelihood
        ((4, 4, 4), 'exact')
    """

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int,
        kernel_size: int,
        *,
        stride: int | None = None,
        padding: int = 0,
        hidden_channels: Sequence[int] = (32, 32),
    ) -> None:
        patches = Unfold(shape, kernel_size, stride=stride, padding=padding)
        out_channels = check_count("out_channels", out_channels)
        widths = check_widths("hidden_channels", hidden_channels, least=0)
        channels, *tiles = patches.unfolded_shape
        dropped = None
        if channels > out_channels:
            others = channels - out_channels
            image = (out_channels, *tiles)
            network = ConvConditioner(image, 2 * others, hidden_channels=widths)
            dropped = ConditionalNormal(
                others * math.prod(tiles), math.prod(image), conditioner=network, bound=_BOUND
            )
        linear = _linear_parts(patches.unfolded_shape, out_channels, dropped)
        super().__init__([patches, *linear])
        self.shape = patches.shape
        self.out_channels = out_channels
        self.kernel_size = patches.kernel_size
        self.stride = patches.stride
        self.padding = patches.padding
        self.hidden_channels = widths
        self.convolved_shape = (out_channels, tiles[0], tiles[1])

    def set_to(self, weight: Tensor, bias: Tensor) -> None:
        """Set the kernel, ``(out_channels, channels, kernel_size, kernel_size)``, and the bias.

        Raises:
            ValueError: If a shape does not fit, or the kernel is not finite or not of full rank
                as a matrix.
        """
        sizes = (self.kernel_size, self.kernel_size)
        _check_linear(weight, (self.out_channels, self.shape[0], *sizes), bias)
        _set_linear(self.transforms[1:], weight.flatten(1), bias)


def flowify(network: nn.Sequential, shape: Sequence[int]) -> Chain:
    """Turn a network of linear, convolution and leaky ReLU layers into transforms.

    With the weights of the network they compute what it does, but for noise where a layer has more
    outputs than inputs, overlapping patches or padding. A layer that drops coordinates gets a
    network that models them. All of it is to be trained.

    Args:
        network: Layers from data to base, among `torch.nn.Linear`, `Conv2d`, `LeakyReLU`,
            `Flatten`, `Identity` and `Sequential`; and transforms, such as monotone splines.
        shape: Shape of x: ``(features,)``, or ``(channels, height, width)`` of images.

    Raises:
        TypeError: If `network` is not a `torch.nn.Sequential`.
        ValueError: If a layer can have no likelihood, or does not fit the one before it; the
            message names it.

    References:
        Máté, Klein, Golling & Fleuret (2022), Flowification. https://arxiv.org/abs/2205.15209

    Example:
        >>> network = nn.Sequential(nn.Linear(6, 4), nn.LeakyReLU(0.5), nn.Linear(4, 2))
        >>> chain, x = flowify(network, [6]), torch.randn(3, 6)
        >>> torch.allclose(chain.to_base(x), network(x), atol=1e-5)
        True
    """
    check_type("network", network, nn.Sequential, "wrap the layers in nn.Sequential(...)")
    sizes = check_shape(shape)
    parts: list[Transform] = [Flatten(sizes)] if len(sizes) > 1 else []
    for name, layer in _layers(network, "network"):
        made, sizes = _flowified(name, layer, sizes)
        parts += made
    return Chain(parts, math.prod(sizes) if not parts else None)


def _layers(network: nn.Sequential, name: str) -> list[tuple[str, nn.Module]]:
    """Return the layers of a network and of the networks in it, with their names."""
    found = []
    for place, layer in enumerate(network):
        inner = f"{name}[{place}]"
        found += _layers(layer, inner) if type(layer) is nn.Sequential else [(inner, layer)]
    return found


def _flowified(
    name: str, layer: nn.Module, sizes: tuple[int, ...]
) -> tuple[list[Transform], tuple[int, ...]]:
    """Return the transforms of a layer, and the shape that it gives."""
    if isinstance(layer, Transform):
        if layer.features != math.prod(sizes):
            raise ValueError(
                f"{name} must get the {layer.features} features that {type(layer).__name__} takes; "
                f"got {sizes}."
            )
        return [layer], (layer.base_features,) if layer.base_features != math.prod(sizes) else sizes
    match layer:
        case nn.Identity():
            return [], sizes
        case nn.Flatten(start_dim=1, end_dim=-1):
            return [], (math.prod(sizes),)
        case nn.LeakyReLU() if layer.negative_slope > 0:
            slope = float(layer.negative_slope)
            return [LeakyReLU(math.prod(sizes), negative_slope=slope)], sizes
        case nn.Linear():
            return _of_linear(name, layer, sizes)
        case nn.Conv2d():
            return _of_convolution(name, layer, sizes)
    raise ValueError(
        f"network must have layers of a likelihood; {name} is {layer}. Take nn.LeakyReLU as "
        "activation, or a transform of cnf; nn.Linear and nn.Conv2d; no pooling, dropout or "
        "normalisation."
    )


def _of_linear(
    name: str, layer: nn.Linear, sizes: tuple[int, ...]
) -> tuple[list[Transform], tuple[int, ...]]:
    if sizes != (layer.in_features,):
        raise ValueError(f"{name} must get the shape {(layer.in_features,)}; got {sizes}.")
    with _named(name):
        linear = FlowifiedLinear(layer.in_features, layer.out_features).to(layer.weight)
        linear.set_to(layer.weight, _bias(layer))
    return [linear], (layer.out_features,)


def _of_convolution(
    name: str, layer: nn.Conv2d, sizes: tuple[int, ...]
) -> tuple[list[Transform], tuple[int, ...]]:
    plain = layer.groups == 1 and layer.padding_mode == "zeros" and layer.dilation == (1, 1)
    given = (layer.kernel_size, layer.stride, layer.padding)
    square = [int(size[0]) for size in given if not isinstance(size, str) and len(set(size)) == 1]
    if not plain or len(square) < len(given):
        raise ValueError(
            f"{name} must be a square convolution with padding in numbers, without groups and "
            f"dilation; got {layer}."
        )
    if len(sizes) != 3 or sizes[0] != layer.in_channels:
        raise ValueError(f"{name} must get images of {layer.in_channels} channels; got {sizes}.")
    with _named(name):
        convolution = FlowifiedConv2d(
            sizes, layer.out_channels, square[0], stride=square[1], padding=square[2]
        ).to(layer.weight)
        convolution.set_to(layer.weight, _bias(layer))
    return [convolution], convolution.convolved_shape


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the layer in the message of an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name} has no likelihood: {error}") from error


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


def _linear_parts(
    shape: tuple[int, int, int], out_channels: int, dropped: ConditionalNormal | None
) -> list[Transform]:
    """Return the parts of a linear layer of the channels of each pixel."""
    channels, height, width = shape
    pixels = height * width
    turned = (max(channels, out_channels), height, width)
    before: list[Transform] = []
    after: list[Transform] = []
    if channels < out_channels:
        before = [Augment(channels * pixels, (out_channels - channels) * pixels)]
    if dropped is not None:
        after = [Slice(channels * pixels, out_channels * pixels, dropped=dropped)]
    return [*before, Orthogonal(turned), *after, Conv1x1((out_channels, height, width))]


def _check_linear(weight: Tensor, shape: tuple[int, ...], bias: Tensor) -> None:
    """Refuse a weight of another shape, a bias that does not fit it, and infinite numbers."""
    if weight.shape != shape or bias.shape != shape[:1]:
        raise ValueError(
            f"weight and bias must have shapes {shape} and {shape[:1]}; got "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}."
        )
    if not all_finite((weight, bias)):
        raise ValueError("weight and bias must be finite; got NaN or inf.")


@torch.no_grad()
def _set_linear(parts: Sequence[Transform], weight: Tensor, bias: Tensor) -> None:
    """Set the rotation, the shift and the matrix so that they multiply by `weight`."""
    turn = next(part for part in parts if isinstance(part, Orthogonal))
    mix = next(part for part in parts if isinstance(part, Conv1x1))
    outputs, inputs = weight.shape
    left, scale, right = torch.linalg.svd(weight.double(), full_matrices=True)
    if scale.min() <= torch.finfo(weight.dtype).eps * scale.max():
        raise ValueError(
            f"weight must have the full rank {min(inputs, outputs)}; its singular values are from "
            f"{float(scale.min()):.3g} to {float(scale.max()):.3g}."
        )
    if outputs > inputs:
        rest = torch.ones(outputs - inputs, dtype=scale.dtype, device=scale.device)
        matrix = left * torch.cat([scale, rest])
        # The noise comes behind x, which the matrix may mix; so the rotation is of x alone.
        rotation = torch.block_diag(right, torch.eye(outputs - inputs).to(right))
    else:
        matrix, rotation = left * scale, right
    shift = torch.zeros(len(rotation), dtype=scale.dtype, device=scale.device)
    shift[:outputs] = torch.linalg.solve(matrix, bias.double())
    turn.set_to(rotation, shift)
    mix.matrix.set_to(matrix)
