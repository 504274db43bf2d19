"""Funnels: features are dropped, after the kept ones were moved by what depends on them."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from cnf._checks import check_count, check_image_shape
from cnf.bases import Base, ConditionalNormal
from cnf.transforms.base import WithLadj
from cnf.transforms.conditioners import ConvConditioner
from cnf.transforms.linear.conv1x1 import Conv1x1
from cnf.transforms.surjections.reduction import Reduction, as_base, count_dropped


class Funnel(Reduction):
    """Linear funnel; a subclass says which entries of x are kept, and writes the two hooks.

    Args:
        mix: Invertible linear map of the kept entries.
        shift: Module that maps the dropped entries to numbers, which are added to z.
        context_features: Size of the context; 0 for none.
        dropped: Distribution of the dropped entries.
        dropped_features: Number of the dropped entries.
    """

    def __init__(
        self,
        mix: Conv1x1,
        shift: nn.Module,
        context_features: int,
        dropped: Base,
        *,
        dropped_features: int,
    ) -> None:
        super().__init__(
            mix.features + dropped_features,
            mix.features,
            context_features,
            dropped,
            dropped_features=dropped_features,
        )
        self.mix = mix
        self.shift = shift

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, y = self._part(x)
        z, ladj = self.mix.to_base_and_ladj(kept)
        return z + self._shift(y), y, ladj

    def _join(self, z: Tensor, y: Tensor, generator: Generator | None) -> WithLadj:
        kept, ladj = self.mix.to_data_and_ladj(z - self._shift(y))
        return self._merge(kept, y), ladj

    @abstractmethod
    def _part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hook: the kept and the dropped entries of x."""

    @abstractmethod
    def _merge(self, kept: Tensor, y: Tensor) -> Tensor:
        """Hook: x from its kept and its dropped entries."""

    @abstractmethod
    def _shift(self, y: Tensor) -> Tensor:
        """Hook: what the dropped entries add to z."""


class MLPFunnel(Funnel):
    r"""Linear layer to fewer features, with an exact likelihood: ``z = F x_+ + W x_- + b``.

    The kept part :math:`x_+` is the first features; the dropped part :math:`x_-` is modelled given
    z. F has the form of `Conv1x1`. With F the identity and W = 0 this is a `Slice`:

    .. math:: \log p(x) = \log p(z) + \log |\det F| + \log p(x_- | z)

    Args:
        features: Size of x.
        kept: Size of z.
        context_features: Size of the context; 0 for none.
        dropped: Distribution of the dropped part, or a `cnf.Flow`, whose context is z, followed by
            the context if there is one; None for a `ConditionalNormal`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is out of range, or `dropped` does not fit.

    References:
        Klein, Raine, Pina-Otey, Voloshynovskiy & Golling (2021), Funnels: Exact maximum likelihood
        with dimensionality reduction. https://arxiv.org/abs/2112.08069

    Example:
        >>> MLPFunnel(5, kept=2).to_base(torch.zeros(3, 5)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        features: int,
        kept: int,
        context_features: int = 0,
        *,
        dropped: nn.Module | None = None,
    ) -> None:
        features, kept = check_count("features", features), check_count("kept", kept)
        size = count_dropped(features, kept)
        if dropped is None:
            dropped = ConditionalNormal(size, kept + context_features)
        base, shift = as_base(dropped), nn.Linear(size, kept)
        super().__init__(Conv1x1(kept), shift, context_features, base, dropped_features=size)

    def _part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : self.kept], x[..., self.kept :]

    def _merge(self, kept: Tensor, y: Tensor) -> Tensor:
        return torch.cat([kept, y], -1)

    def _shift(self, y: Tensor) -> Tensor:
        shift: Tensor = self.shift(y)
        return shift


class ConvFunnel(Funnel):
    r"""Convolution with stride to a smaller image, with an exact likelihood.

    The kernel of size k moves in steps of k. Of each tile one pixel, the first, is kept with all
    its channels; the other pixels are dropped, and modelled given z. As `MLPFunnel`, tile by tile:

    .. math:: \log p(x) = \log p(z) + n \log |\det F| + \log p(x_- | z)

    for n tiles, where F is the part of the kernel for the kept pixel.

    Args:
        shape: Shape ``(channels, height, width)`` of the image that x is, flattened in C order.
        context_features: Size of the context; 0 for none.
        kernel_size: Height and width k of the kernel, which divides those of the image.
        hidden_channels: Channels of the hidden layers of the default `dropped`.
        dropped: Distribution of the dropped pixels, or a `cnf.Flow`, whose context is z, followed
            by the context if there is one. They are an image of ``channels * (k * k - 1)`` channels
            with a pixel for each tile, flattened. None for a `ConditionalNormal` by a convolution
            of the neighbourhood of each tile, or of all of z if there is a context.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is out of range, `kernel_size` does not divide height and width, or
            `dropped` does not fit.

    References:
        Klein, Raine, Pina-Otey, Voloshynovskiy & Golling (2021), Funnels: Exact maximum likelihood
        with dimensionality reduction. https://arxiv.org/abs/2112.08069

    Example:
        >>> funnel = ConvFunnel((3, 8, 8))
        >>> funnel.to_base(torch.zeros(5, 192)).shape, funnel.funnelled_shape
        (torch.Size([5, 48]), (3, 4, 4))
    """

    def __init__(
        self,
        shape: Sequence[int],
        context_features: int = 0,
        *,
        kernel_size: int = 2,
        hidden_channels: Sequence[int] = (64, 64),
        dropped: nn.Module | None = None,
    ) -> None:
        sizes = check_image_shape(shape)
        kernel_size = check_count("kernel_size", kernel_size, least=2)
        channels, height, width = sizes
        if height % kernel_size or width % kernel_size:
            raise ValueError(
                f"kernel_size must divide height and width of the shape {sizes}; got {kernel_size}."
            )
        tiles = (height // kernel_size, width // kernel_size)
        others = channels * (kernel_size**2 - 1)
        size = others * math.prod(tiles)
        if dropped is None:
            conditioner = None
            if not context_features:
                conditioner = ConvConditioner(
                    (channels, *tiles), 2 * others, hidden_channels=hidden_channels
                )
            dropped = ConditionalNormal(
                size, channels * math.prod(tiles) + context_features, conditioner=conditioner
            )
        mix, shift = Conv1x1((channels, *tiles)), nn.Conv2d(others, channels, 1)
        super().__init__(mix, shift, context_features, as_base(dropped), dropped_features=size)
        self.shape = sizes
        self.kernel_size = kernel_size
        self.hidden_channels = tuple(hidden_channels)
        self._others = others

    @property
    def funnelled_shape(self) -> tuple[int, int, int]:
        """Shape of the image that z is, flattened."""
        channels, height, width = self.shape
        return channels, height // self.kernel_size, width // self.kernel_size

    def _part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        channels, height, width = self.funnelled_shape
        tiles = pixel_unshuffle(x.unflatten(-1, self.shape), self.kernel_size)
        pixels = tiles.reshape(*x.shape[:-1], channels, self.kernel_size**2, height, width)
        return pixels[..., 0, :, :].flatten(-3), pixels[..., 1:, :, :].flatten(-4)

    def _merge(self, kept: Tensor, y: Tensor) -> Tensor:
        channels, height, width = self.funnelled_shape
        first = kept.reshape(*kept.shape[:-1], channels, 1, height, width)
        others = y.reshape(*y.shape[:-1], channels, self.kernel_size**2 - 1, height, width)
        tiles = torch.cat([first, others], -3).flatten(-4, -3)
        return pixel_shuffle(tiles, self.kernel_size).flatten(-3)

    def _shift(self, y: Tensor) -> Tensor:
        _, height, width = self.funnelled_shape
        shift: Tensor = self.shift(y.reshape(-1, self._others, height, width))
        return shift.reshape(*y.shape[:-1], self.kept)
