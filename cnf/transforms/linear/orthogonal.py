"""Rotation of the features of a vector, or of the channels of an image, and a shift."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from cnf._checks import check_vector_or_image_shape
from cnf.transforms.base import Transform, WithLadj

_ORTHOGONAL = 1e-4
"""Largest error of the product of an orthogonal matrix with its transpose, in single precision."""


class Orthogonal(Transform):
    r"""Orthogonal matrix and a shift, ``z = U x + b``: the same for the channels of each pixel.

    For a vector, U mixes the features. :math:`U = \exp(A - A^\top) U_0`, with a learned A that
    starts at zero, and a fixed orthogonal :math:`U_0`, at first the identity. The ladj is 0.

    Args:
        shape: Number of features of a vector, or shape ``(channels, height, width)`` of the image
            that x is, flattened in C order.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If there are not three sizes, or one is less than 1.

    References:
        Máté, Klein, Golling & Fleuret (2022), Flowification. https://arxiv.org/abs/2205.15209

    Example:
        >>> z, ladj = Orthogonal(2).to_base_and_ladj(torch.tensor([3.0, 4.0]))
        >>> z.norm().item(), ladj.item()
        (5.0, 0.0)
    """

    is_conformal = True

    def __init__(self, shape: int | Sequence[int]) -> None:
        channels, height, width = check_vector_or_image_shape(shape)
        super().__init__(channels * height * width)
        self.shape: int | tuple[int, int, int] = (
            (channels, height, width) if isinstance(shape, Sequence) else channels
        )
        self.channels = channels
        self.skew = nn.Parameter(torch.zeros(channels, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("start", torch.eye(channels))
        self.start: Tensor

    def extra_repr(self) -> str:
        """Shape of x."""
        return f"shape={self.shape}"

    @torch.no_grad()
    def set_to(self, matrix: Tensor, bias: Tensor) -> None:
        """Set U to an orthogonal matrix, and b.

        Raises:
            ValueError: If a shape does not fit, or the matrix is not orthogonal.
        """
        size = self.channels
        if matrix.shape != (size, size) or bias.shape != (size,):
            raise ValueError(
                f"matrix and bias must have shapes {(size, size)} and {(size,)}; got "
                f"{tuple(matrix.shape)} and {tuple(bias.shape)}."
            )
        product = matrix.double() @ matrix.double().mT
        error = float((product - torch.eye(size).to(product)).abs().max())
        if not error <= _ORTHOGONAL:
            raise ValueError(
                f"matrix must be orthogonal; its product with its transpose is off the identity by "
                f"{error:.3g}. Take the Q of torch.linalg.qr(matrix)."
            )
        self.start.copy_(matrix)
        self.skew.zero_()
        self.bias.copy_(bias)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        z = self._rotated(x.unflatten(-1, (self.channels, -1)), self._matrix())
        return (z + self.bias.unsqueeze(-1)).flatten(-2), x.new_zeros(x.shape[:-1])

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        pixels = z.unflatten(-1, (self.channels, -1)) - self.bias.unsqueeze(-1)
        return self._rotated(pixels, self._matrix().mT).flatten(-2), z.new_zeros(z.shape[:-1])

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        return torch.zeros_like(x)

    def _matrix(self) -> Tensor:
        return rotation(self.skew) @ self.start.double()

    def _rotated(self, pixels: Tensor, matrix: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, enabled=False):  # which lowers the precision
            return torch.einsum("ij,...jp->...ip", matrix.to(pixels.dtype), pixels)


def rotation(weight: Tensor) -> Tensor:
    """Return the rotations ``exp(A - A^T)`` of matrices A, in double precision."""
    weight = weight.double()
    matrix: Tensor = torch.linalg.matrix_exp(weight - weight.mT)
    return matrix
