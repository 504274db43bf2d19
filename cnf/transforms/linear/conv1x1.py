"""Invertible 1 x 1 convolution, or linear map of the features of a vector."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from cnf._checks import check_flag, check_vector_or_image_shape
from cnf.transforms.base import Transform, WithLadj


class Conv1x1(Transform):
    r"""Invertible 1 x 1 convolution: the same matrix W multiplies the channels of each pixel.

    For a vector, W mixes the features. The ladj is the number of pixels times log|det W|, the same
    for every row. W starts as a random rotation. Log-determinant and inverse are computed in
    float64.

    With ``lu``, :math:`W = P L (U + \mathrm{diag}(s))`: P is a permutation, L lower triangular with
    ones on its diagonal, U strictly upper triangular. P and the signs of s are fixed; L, U and
    log|s| are learned. So log|det W| is the sum of log|s|, and W stays invertible.

    Args:
        shape: Number of features of a vector, or shape ``(channels, height, width)`` of the image
            that x is, flattened in C order.
        lu: Whether W is learned in the form above; else its entries are learned.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If there are not three sizes, or one is less than 1.

    References:
        Kingma & Dhariwal (2018), Glow. https://arxiv.org/abs/1807.03039

    Example:
        >>> Conv1x1((12, 4, 4)).to_base(torch.zeros(5, 192)).shape
        torch.Size([5, 192])
    """

    def __init__(self, shape: int | Sequence[int], *, lu: bool = True) -> None:
        channels, height, width = check_vector_or_image_shape(shape)
        super().__init__(channels * height * width)
        self.shape: int | tuple[int, int, int] = (
            (channels, height, width) if isinstance(shape, Sequence) else channels
        )
        self.channels = channels
        self.pixels = height * width
        self.lu = check_flag("lu", lu)
        self.matrix: InvertibleMatrix = LUMatrix(channels) if lu else DenseMatrix(channels)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Shape of x."""
        return f"shape={self.shape}"

    def reset_parameters(self, *, generator: Generator | None = None) -> None:
        """Reset the matrix to another random rotation."""
        self.matrix.set_to(_random_rotation(self.channels, generator))

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._mixed(x, self.matrix.value()), self._ladj(x)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._mixed(z, self.matrix.inverse()), -self._ladj(z)

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        return (self._ladj(x) / self.features).unsqueeze(-1).expand_as(x)

    def _mixed(self, x: Tensor, matrix: Tensor) -> Tensor:
        pixels = x.unflatten(-1, (self.channels, self.pixels))
        with torch.autocast(x.device.type, enabled=False):  # which lowers the precision
            return torch.einsum("ij,...jp->...ip", matrix.to(x.dtype), pixels).flatten(-2)

    def _ladj(self, x: Tensor) -> Tensor:
        return (self.pixels * self.matrix.log_abs_det()).to(x.dtype).expand(x.shape[:-1])


class InvertibleMatrix(nn.Module, ABC):
    """Learnable square matrix, its inverse and log-determinant, all in float64."""

    @abstractmethod
    def set_to(self, matrix: Float[Tensor, "size size"]) -> None:
        """Set the value of the matrix."""

    @abstractmethod
    def value(self) -> Float[Tensor, "size size"]:
        """Return the matrix."""

    @abstractmethod
    def inverse(self) -> Float[Tensor, "size size"]:
        """Return the inverse."""

    @abstractmethod
    def log_abs_det(self) -> Float[Tensor, ""]:
        """Return the logarithm of the absolute value of the determinant."""


class DenseMatrix(InvertibleMatrix):
    """Square matrix whose entries are learned."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(size))

    @torch.no_grad()
    def set_to(self, matrix: Float[Tensor, "size size"]) -> None:
        """Set the value of the matrix."""
        self.weight.copy_(matrix)

    def value(self) -> Float[Tensor, "size size"]:
        """Return the matrix."""
        return self.weight.double()

    def inverse(self) -> Float[Tensor, "size size"]:
        """Return the inverse."""
        inverse: Tensor = torch.linalg.inv(self.value())
        return inverse

    def log_abs_det(self) -> Float[Tensor, ""]:
        """Return the logarithm of the absolute value of the determinant, at cubic cost."""
        log_abs_det: Tensor = torch.linalg.slogdet(self.value()).logabsdet
        return log_abs_det


class LUMatrix(InvertibleMatrix):
    """Matrix P L (U + diag(s)), where P and the signs of s are fixed."""

    def __init__(self, size: int) -> None:
        super().__init__()
        # L below the diagonal, log|s| on it, and U above.
        self.packed = nn.Parameter(torch.zeros(size, size))
        self.register_buffer("permutation", torch.eye(size))
        self.register_buffer("sign", torch.ones(size))
        self.permutation: Tensor
        self.sign: Tensor

    @torch.no_grad()
    def set_to(self, matrix: Float[Tensor, "size size"]) -> None:
        """Set the value of the matrix, with P and the signs of s."""
        permutation, lower, upper = torch.linalg.lu(matrix)
        diagonal = upper.diagonal()
        self.permutation.copy_(permutation)
        self.sign.copy_(diagonal.sign())
        self.packed.copy_(lower.tril(-1) + diagonal.abs().log().diag() + upper.triu(1))

    def value(self) -> Float[Tensor, "size size"]:
        """Return the matrix."""
        lower, upper = self._triangles()
        return self.permutation.double() @ lower @ upper

    def inverse(self) -> Float[Tensor, "size size"]:
        """Return the inverse, by two triangular solves."""
        lower, upper = self._triangles()
        unpermuted = self.permutation.double().mT
        inner = torch.linalg.solve_triangular(lower, unpermuted, upper=False, unitriangular=True)
        inverse: Tensor = torch.linalg.solve_triangular(upper, inner, upper=True)
        return inverse

    def log_abs_det(self) -> Float[Tensor, ""]:
        """Return the logarithm of the absolute value of the determinant, at linear cost."""
        return self.packed.double().diagonal().sum()

    def _triangles(self) -> tuple[Tensor, Tensor]:
        packed = self.packed.double()
        lower = packed.tril(-1) + torch.eye(len(packed), dtype=packed.dtype, device=packed.device)
        scale = self.sign.double() * packed.diagonal().exp()
        return lower, packed.triu(1) + scale.diag()


def _random_rotation(size: int, generator: Generator | None) -> Tensor:
    """Draw a uniformly distributed rotation, in float64."""
    device = "cpu" if generator is None else generator.device
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64, device=device)
    q, r = torch.linalg.qr(normal)
    rotation: Tensor = q * r.diagonal().sign()
    rotation[:, 0] *= torch.linalg.det(rotation).sign()
    return rotation
