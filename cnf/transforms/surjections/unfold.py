"""Patches of an image, as a convolution sees them: pixels in several patches are copied."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import fold, pad, unfold

from cnf._checks import check_count, check_image_shape
from cnf.transforms.base import Transform, WithLadj


class Unfold(Transform):
    r"""Patches of a flattened image, as channels of one pixel for each patch.

    A pixel in N patches is copied N times, and noise u is added to the copies, in the directions
    orthogonal to :math:`(1, \dots, 1)`; padding is filled with noise e. Towards the data the copies
    are averaged, and the padding is dropped. Both are normal with a learned standard deviation:

    .. math:: \log p(x) \ge \mathbb{E} \Big[ \log p(z) + \tfrac 1 2 \sum \log N
        - \log q(u) - \log q(e) \Big]

    If no patches overlap and there is no padding, there is no noise, and this is a rearrangement
    with ladj 0.

    Args:
        shape: Shape ``(channels, height, width)`` of the image that x is, flattened in C order.
        kernel_size: Height and width of a patch.
        stride: Step from patch to patch, at most `kernel_size`; None for `kernel_size`.
        padding: Pixels added on each side.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, or a pixel would be in no patch.

    References:
        Máté, Klein, Golling & Fleuret (2022), Flowification, section 3.3.
        https://arxiv.org/abs/2205.15209

    Example:
        >>> patches = Unfold((1, 4, 4), 3, stride=1, padding=1)
        >>> patches.unfolded_shape, patches.likelihood
        ((9, 4, 4), 'lower_bound')
    """

    def __init__(
        self, shape: Sequence[int], kernel_size: int, *, stride: int | None = None, padding: int = 0
    ) -> None:
        sizes = check_image_shape(shape)
        super().__init__(math.prod(sizes))
        self.shape = sizes
        self.kernel_size = check_count("kernel_size", kernel_size)
        stride = self.kernel_size if stride is None else stride
        self.stride = check_count("stride", stride, most=self.kernel_size)
        self.padding = check_count("padding", padding, least=0, most=self.kernel_size - 1)
        channels, *sides = self.shape
        steps = [self._steps(side) for side in sides]
        self.unfolded_shape = (channels * self.kernel_size**2, steps[0], steps[1])
        # In how many patches each pixel is, with the padding around it.
        counts = self._fold(torch.ones(1, self.base_features))[0, 0]
        self.register_buffer("_counts", counts, persistent=False)
        self._counts: Tensor
        self._half_log_counts = 0.5 * channels * float(counts.double().log().sum())
        if self.stochastic_to_base:
            self.log_std = nn.Parameter(torch.zeros(()))

    def extra_repr(self) -> str:
        """Shape of x, and the patches."""
        return (
            f"shape={self.shape}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}"
        )

    @property
    def base_features(self) -> int:
        """Number of entries of z."""
        return math.prod(self.unfolded_shape)

    @property
    def stochastic_to_base(self) -> bool:
        """Whether patches overlap, or there is padding."""
        return self.base_features > self.features

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        images = x.reshape(-1, *self.shape)
        if not self.stochastic_to_base:
            return self._unfold(images).reshape(*x.shape[:-1], self.base_features), x.new_zeros(
                x.shape[:-1]
            )
        std = self.log_std.exp()
        noise = std * self._normal((len(images), self.base_features), x, generator)
        u = noise - self._unfold(self._fold(noise) / self._counts)
        e = std * self._normal((len(images), self.shape[0], *self._counts.shape), x, generator)
        e = torch.where(self._is_padding(), e, 0.0)
        padded = pad(images, [self.padding] * 4) + e
        z = self._unfold(padded) + u
        shape = x.shape[:-1]
        return z.reshape(*shape, self.base_features), self._ladj(u, e).reshape(shape)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        patches = z.reshape(-1, self.base_features)
        padded = self._fold(patches) / self._counts
        rows, columns = self._inside
        x = padded[..., rows, columns].reshape(*z.shape[:-1], self.features)
        if not self.stochastic_to_base:
            return x, z.new_zeros(z.shape[:-1])
        u = patches - self._unfold(padded)
        e = torch.where(self._is_padding(), padded, 0.0)
        return x, -self._ladj(u, e).reshape(z.shape[:-1])

    def _ladj(self, u: Tensor, e: Tensor) -> Tensor:
        """Return half the logarithms of the counts, minus the log-density of the noise."""
        numbers = self.base_features - self.features
        squares = u.square().sum(-1) + e.square().flatten(1).sum(-1)
        log_q = -0.5 * squares * (-2 * self.log_std).exp() - numbers * (
            self.log_std + 0.5 * math.log(2 * math.pi)
        )
        return self._half_log_counts - log_q

    def _steps(self, side: int) -> int:
        """Return the number of patches along a side."""
        rest = side + 2 * self.padding - self.kernel_size
        if rest < 0 or rest % self.stride:
            raise ValueError(
                f"shape must have height and width that the patches cover to the end; got "
                f"{self.shape} for kernel_size={self.kernel_size}, stride={self.stride} and "
                f"padding={self.padding}. Perhaps change the padding."
            )
        return rest // self.stride + 1

    @property
    def _inside(self) -> tuple[slice, slice]:
        """The pixels of the image within its padding."""
        _, height, width = self.shape
        start = self.padding
        return slice(start, start + height), slice(start, start + width)

    def _is_padding(self) -> Tensor:
        mask = torch.ones_like(self._counts, dtype=torch.bool)
        mask[self._inside] = False
        return mask

    def _unfold(self, images: Tensor) -> Tensor:
        return unfold(images, self.kernel_size, stride=self.stride).flatten(1)

    def _fold(self, patches: Tensor) -> Tensor:
        """Return the sum of the copies of each pixel."""
        _, height, width = self.shape
        sides = (height + 2 * self.padding, width + 2 * self.padding)
        columns = patches.unflatten(-1, (self.unfolded_shape[0], -1))
        return fold(columns, sides, self.kernel_size, stride=self.stride)

    def _normal(self, shape: Sequence[int], like: Tensor, generator: Generator | None) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
