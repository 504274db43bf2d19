"""Invertible convolutions that mix neighbouring pixels, not channels alone.

The convolution of Truong et al. (2019), Generative Flow via Invertible nxn Convolution,
https://arxiv.org/abs/1905.10170, is not here: its Jacobian depends on a shift function that the
paper does not define.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from cnf._checks import check_count, check_image_shape
from cnf.transforms.base import Transform, WithLadj

_NOISE = 0.02
"""Standard deviation of a new kernel around the identity."""


class InvertibleConvolution(Transform):
    """Linear map of images, flattened in C order; all images have the same ladj.

    A subclass defines the map, its inverse and its ladj. All three keep the precision of x under
    autocast, which would round matrix products and break the inverse.

    Args:
        shape: Shape ``(channels, height, width)`` of the image that x is.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        sizes = check_image_shape(shape)
        super().__init__(math.prod(sizes))
        self.shape = sizes

    @abstractmethod
    def _images_to_base(self, x: Tensor) -> Tensor:
        """Hook: map images ``(rows, channels, height, width)``."""

    @abstractmethod
    def _images_to_data(self, z: Tensor) -> Tensor:
        """Hook: the inverse map."""

    @abstractmethod
    def _ladj(self) -> Tensor:
        """Hook: return the log absolute determinant, in nats."""

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        with torch.autocast(x.device.type, enabled=False):
            z = self._images_to_base(x.reshape(-1, *self.shape)).reshape(x.shape)
            return z, self._ladj().expand(x.shape[:-1])

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        with torch.autocast(z.device.type, enabled=False):
            x = self._images_to_data(z.reshape(-1, *self.shape)).reshape(z.shape)
            return x, -self._ladj().expand(z.shape[:-1])


class EmergingConv(InvertibleConvolution):
    """Emerging convolution: one masked convolution of earlier pixels, one of later pixels.

    In the order of pixels, and of channels within a pixel, the first matrix is lower triangular and
    the second is upper triangular with a diagonal of ones; together they reach all neighbours. With
    kernels of one pixel this is a 1 x 1 convolution by a product of two triangular matrices.

    The way to the data solves one row of pixels after another, for all images at once.

    Args:
        shape: Shape ``(channels, height, width)`` of the image that x is, flattened in C order.
        kernel_size: Height and width of each kernel; odd.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, or `kernel_size` is even.

    References:
        Hoogeboom, van den Berg & Welling (2019), Emerging Convolutions for Generative Normalizing
        Flows. https://arxiv.org/abs/1901.11137

    Example:
        >>> EmergingConv((3, 8, 8), 3).to_base(torch.randn(5, 192)).shape
        torch.Size([5, 192])
    """

    def __init__(self, shape: Sequence[int], kernel_size: int) -> None:
        super().__init__(shape)
        self.kernel_size = check_count("kernel_size", kernel_size)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd; got {self.kernel_size}.")
        channels = self.shape[0]
        kernels = (2, channels, channels, self.kernel_size, self.kernel_size)
        self.weight = nn.Parameter(_NOISE * torch.randn(kernels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("_mask", _taps_before_the_centre(*kernels[1:]), persistent=False)
        self.register_buffer("_identity", _identity_kernel(*kernels[2:]), persistent=False)
        self._mask: Tensor
        self._identity: Tensor

    def extra_repr(self) -> str:
        """Shape of the image and size of the kernels."""
        return f"shape={self.shape}, kernel_size={self.kernel_size}"

    def _images_to_base(self, x: Tensor) -> Tensor:
        first, second = self._kernels()
        margin = self.kernel_size // 2
        x = _convolved(x, first, margin, margin)
        return _reversed(_convolved(_reversed(x), second, margin, margin))

    def _images_to_data(self, z: Tensor) -> Tensor:
        first, second = self._kernels()
        return _deconvolved(_reversed(_deconvolved(_reversed(z), second)), first)

    def _ladj(self) -> Tensor:
        return self.shape[1] * self.shape[2] * self.log_scale.sum()

    def _kernels(self) -> tuple[Tensor, Tensor]:
        """Return both kernels; the second applies to the reversed image."""
        first, second = self.weight * self._mask
        scale = self.log_scale.exp().reshape(-1, 1, 1, 1)
        return first + scale * self._identity, second + self._identity


class PeriodicConv(InvertibleConvolution):
    r"""Periodic convolution: the image continues at its opposite edge.

    The Fourier transform turns it into a matrix of channels for each frequency, so that

    .. math:: \text{ladj} = \sum_{u, v} \log \left| \det \hat K(u, v) \right|

    and the inverse takes one matrix inverse for each frequency. Determinants and inverses are
    computed in float64.

    Args:
        shape: Shape ``(channels, height, width)`` of the image that x is, flattened in C order.
        kernel_size: Height and width of the kernel.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is less than 1, or the kernel larger than the image.

    References:
        Hoogeboom, van den Berg & Welling (2019), Emerging Convolutions for Generative Normalizing
        Flows. https://arxiv.org/abs/1901.11137

    Example:
        >>> PeriodicConv((3, 8, 8), 3).to_base(torch.randn(5, 192)).shape
        torch.Size([5, 192])
    """

    def __init__(self, shape: Sequence[int], kernel_size: int) -> None:
        super().__init__(shape)
        self.kernel_size = check_count("kernel_size", kernel_size)
        if self.kernel_size > min(self.shape[1:]):
            raise ValueError(
                "kernel_size must be at most the height and width of the image, "
                f"{self.shape[1:]}; got {self.kernel_size}."
            )
        identity = _identity_kernel(self.shape[0], self.kernel_size, self.kernel_size)
        self.weight = nn.Parameter(identity + _NOISE * torch.randn(identity.shape))

    def extra_repr(self) -> str:
        """Shape of the image and size of the kernel."""
        return f"shape={self.shape}, kernel_size={self.kernel_size}"

    def _images_to_base(self, x: Tensor) -> Tensor:
        return self._filtered(x, self._spectrum())

    def _images_to_data(self, z: Tensor) -> Tensor:
        return self._filtered(z, torch.linalg.inv(self._spectrum()))

    def _ladj(self) -> Tensor:
        log_det: Tensor = torch.linalg.slogdet(self._spectrum()).logabsdet
        # rfft2 keeps one of each pair of frequencies (u, v) and (-u, -v) of a real image.
        width = self.shape[2]
        pairs = torch.full_like(log_det[0], 2)
        pairs[0] = 1
        if width % 2 == 0:
            pairs[width // 2] = 1
        return (pairs * log_det).sum().to(self.weight.dtype)

    def _spectrum(self) -> Tensor:
        """Return the matrix of each frequency, ``(height, width // 2 + 1, out, in)``."""
        _, height, width = self.shape
        right, below = width - self.kernel_size, height - self.kernel_size
        kernel = functional.pad(self.weight.double(), (0, right, 0, below))
        centre = self.kernel_size // 2
        # The conjugate, because a "convolution" of neural networks does not flip its kernel.
        spectrum: Tensor = torch.fft.rfft2(kernel.roll((-centre, -centre), (-2, -1))).conj()
        return spectrum.movedim((-2, -1), (0, 1))

    def _filtered(self, image: Tensor, spectrum: Tensor) -> Tensor:
        if image.numel() == 0:
            return image  # MKL refuses empty ones
        waves = torch.fft.rfft2(image)
        waves = torch.einsum("uvoc,bcuv->bouv", spectrum.to(waves.dtype), waves)
        filtered: Tensor = torch.fft.irfft2(waves, s=self.shape[1:])
        return filtered


def _identity_kernel(channels: int, height: int, width: int) -> Tensor:
    """Return the kernel of the identity: ones from each channel to itself at the centre."""
    kernel = torch.zeros(channels, channels, height, width)
    kernel[:, :, height // 2, width // 2] = torch.eye(channels)
    return kernel


def _taps_before_the_centre(outputs: int, inputs: int, height: int, width: int) -> Tensor:
    """Return the mask of a kernel's earlier pixels, and earlier channels of the same pixel."""
    pixels = torch.arange(height * width).reshape(height, width)
    centre = pixels[height // 2, width // 2]
    mask = (pixels < centre) * torch.ones(outputs, inputs, height, width)
    mask[:, :, height // 2, width // 2] = torch.ones(outputs, inputs).tril(-1)
    return mask


def _reversed(image: Tensor) -> Tensor:
    return image.flip((-3, -2, -1))


def _convolved(image: Tensor, kernel: Tensor, above: int, beside: int) -> Tensor:
    """Convolve with zero padding of `above` rows and `beside` columns at both ends of the image."""
    # A matrix product, because float32 convolutions of cuDNN keep ten bits by default (TF32).
    patches = functional.unfold(image, kernel.shape[2:], padding=(above, beside))
    rows: Tensor = (kernel.flatten(1) @ patches).unflatten(-1, (-1, image.shape[-1]))
    return rows


def _deconvolved(image: Tensor, kernel: Tensor) -> Tensor:
    """Return the inverse of `_convolved` with a masked kernel: substitution, row after row."""
    rows, channels, _, width = image.shape
    margin = kernel.shape[-1] // 2
    size = width * channels
    # The matrix of a row, applied from the right to its pixels and channels, in that order.
    basis = torch.eye(size, dtype=image.dtype, device=image.device)
    basis = basis.reshape(size, width, channels).mT.unsqueeze(-2)
    matrix = _convolved(basis, kernel[:, :, margin : margin + 1], 0, margin)
    matrix = matrix.squeeze(-2).mT.flatten(1)
    blank = image.new_zeros(rows, channels, width)
    solved = [blank] * margin
    for i, row in enumerate(image.unbind(-2)):
        seen = torch.stack([*solved[i : i + margin], blank], -2)
        rest = row - _convolved(seen, kernel[:, :, : margin + 1], 0, margin).squeeze(-2)
        rest = rest.mT.flatten(1)
        pixels = torch.linalg.solve_triangular(matrix, rest, upper=True, left=False)
        solved.append(pixels.reshape(rows, width, channels).mT)
    return torch.stack(solved[margin:], -2)
