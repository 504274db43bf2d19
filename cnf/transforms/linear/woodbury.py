"""Woodbury transformation: low-rank maps of the channels and of the pixels of an image."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf._checks import check_count
from cnf.transforms.linear.convolutions import InvertibleConvolution


class WoodburyConv(InvertibleConvolution):
    r"""Woodbury transformation: the identity plus a low-rank map, of the channels, then the pixels.

    .. math:: Z = (I + U_c V_c) \, X \, (I + U_s V_s)^\top

    for the image as a matrix X of C channels by N pixels. Every pixel depends on every other, at
    the cost of a few products in both directions: by Sylvester's identity

    .. math:: \text{ladj} = N \log | \det (I + V_c U_c) | + C \log | \det (I + V_s U_s) |

    and by Woodbury's identity the inverse takes inverses of the same small matrices; both are
    computed in float64. A new one is the identity.

    Args:
        shape: Shape ``(channels, height, width)`` of the image that x is, flattened in C order.
        rank_channels: Rank of the map of the channels, beside the identity.
        rank_space: Rank of the map of the pixels, beside the identity.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is less than 1.

    References:
        Lu & Huang (2020), Woodbury Transformations for Deep Generative Flows.
        https://arxiv.org/abs/2002.12229

    Example:
        >>> WoodburyConv((3, 8, 8), 2, 16).to_base(torch.randn(5, 192)).shape
        torch.Size([5, 192])
    """

    def __init__(self, shape: Sequence[int], rank_channels: int, rank_space: int) -> None:
        super().__init__(shape)
        self.rank_channels = check_count("rank_channels", rank_channels)
        self.rank_space = check_count("rank_space", rank_space)
        channels, pixels = self.shape[0], self.shape[1] * self.shape[2]
        self.channels_out = nn.Parameter(torch.zeros(channels, self.rank_channels))
        self.channels_in = nn.Parameter(torch.randn(self.rank_channels, channels) / channels**0.5)
        self.space_out = nn.Parameter(torch.zeros(pixels, self.rank_space))
        self.space_in = nn.Parameter(torch.randn(self.rank_space, pixels) / pixels**0.5)

    def extra_repr(self) -> str:
        """Shape of the image and both ranks."""
        ranks = f"rank_channels={self.rank_channels}, rank_space={self.rank_space}"
        return f"shape={self.shape}, {ranks}"

    def _images_to_base(self, x: Tensor) -> Tensor:
        x = _applied(self.channels_out, self.channels_in, x.flatten(-2))
        return _applied(self.space_out, self.space_in, x.mT).mT.reshape(-1, *self.shape)

    def _images_to_data(self, z: Tensor) -> Tensor:
        z = _solved(self.space_out, self.space_in, z.flatten(-2).mT).mT
        return _solved(self.channels_out, self.channels_in, z).reshape(-1, *self.shape)

    def _ladj(self) -> Tensor:
        channels, pixels = self.channels_in.shape[1], self.space_in.shape[1]
        channels_ladj = torch.linalg.slogdet(_core(self.channels_out, self.channels_in)).logabsdet
        space_ladj = torch.linalg.slogdet(_core(self.space_out, self.space_in)).logabsdet
        ladj: Tensor = pixels * channels_ladj + channels * space_ladj
        return ladj.to(self.space_in.dtype)


def _core(left: Tensor, right: Tensor) -> Tensor:
    """Return ``I + right left``, which is small, in float64."""
    product = right.double() @ left.double()
    return product + torch.eye(len(product), dtype=product.dtype, device=product.device)


def _applied(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """Return ``(I + left right) x``."""
    return x + left @ (right @ x)


def _solved(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """Return ``(I + left right)**-1 x``."""
    core: Tensor = torch.linalg.inv(_core(left, right)).to(x.dtype)
    return x - left @ (core @ (right @ x))
