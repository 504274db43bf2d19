"""Flattening, permutation and squeezing: transforms that rearrange the entries of x."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from cnf._checks import check_count, check_shape
from cnf.transforms.base import Transform, WithLadj


class Rearrangement(Transform):
    """Rearrangement of the entries of x, with ladj 0. The next transform defines the support."""

    support = None
    is_conformal = True

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        return torch.zeros_like(self._rearranged(x))

    def _rearranged(self, numbers: Tensor) -> Tensor:
        return self._to_base_value(numbers, None, None)


class Flatten(Rearrangement):
    """Flattens events of any shape, such as images, to vectors in C order; first in a flow.

    Args:
        shape: Shape of an event, such as ``(channels, height, width)``.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If there is no size, or one is less than 1.

    Example:
        >>> Flatten((3, 8, 8)).to_base(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 192])
    """

    def __init__(self, shape: Sequence[int]) -> None:
        sizes = check_shape(shape)
        super().__init__(math.prod(sizes))
        self.shape = sizes

    def extra_repr(self) -> str:
        """Shape of an event."""
        return f"shape={self.shape}"

    @property
    def event_shape(self) -> torch.Size:
        """Shape of a single x."""
        return torch.Size(self.shape)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        z = x.flatten(-len(self.shape))
        return z, _zero_ladj(z)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return z.reshape(*z.shape[:-1], *self.shape), _zero_ladj(z)


class Permute(Rearrangement):
    """Fixed permutation of the features: ``z[..., i] = x[..., order[i]]``.

    Args:
        order: Each of the numbers from 0 to features - 1, once.

    Raises:
        TypeError: If an entry is not an int.
        ValueError: If `order` is not a permutation.

    Example:
        >>> Permute([2, 0, 1]).to_base(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    def __init__(self, order: Sequence[int]) -> None:
        if not isinstance(order, Sequence):
            raise TypeError(f"order must be places such as [1, 0]; got {type(order).__name__}.")
        places = tuple(check_count("each of order", place, least=0) for place in order)
        if not places or sorted(places) != list(range(len(places))):
            raise ValueError(
                f"order must hold each of 0, 1, …, features - 1 once; got {list(places)}."
            )
        super().__init__(len(places))
        self.order = places
        there = torch.tensor(places)
        self.register_buffer("_there", there, persistent=False)
        self.register_buffer("_back", there.argsort(), persistent=False)
        self._there: Tensor
        self._back: Tensor

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return x[..., self._there], _zero_ladj(x)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return z[..., self._back], _zero_ladj(z)


class Squeeze(Rearrangement):
    """Turns each 2 x 2 square of a flattened image into four channels of one pixel.

    Channels of the result count the places within a square fastest, as in
    `torch.nn.functional.pixel_unshuffle`.

    Args:
        shape: Shape ``(channels, height, width)`` of the image that x is, flattened in C order.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If there are not three sizes, one is less than 1, or height or width is odd.

    References:
        Dinh et al. (2017), Density Estimation Using Real NVP. https://arxiv.org/abs/1605.08803

    Example:
        >>> Squeeze((3, 8, 8)).squeezed_shape
        (12, 4, 4)
    """

    def __init__(self, shape: Sequence[int]) -> None:
        sizes = check_shape(shape)
        if len(sizes) != 3 or sizes[1] % 2 or sizes[2] % 2:
            raise ValueError(
                f"shape must be (channels, height, width), the last two even; got {sizes}."
            )
        super().__init__(math.prod(sizes))
        self.shape = sizes

    def extra_repr(self) -> str:
        """Shape of the image."""
        return f"shape={self.shape}"

    @property
    def squeezed_shape(self) -> tuple[int, int, int]:
        """Shape ``(4 channels, height / 2, width / 2)`` of the image that z is, flattened."""
        channels, height, width = self.shape
        return 4 * channels, height // 2, width // 2

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        channels, height, width = self.shape
        squares = x.reshape(*x.shape[:-1], channels, height // 2, 2, width // 2, 2)
        return squares.movedim((-3, -1), (-4, -3)).flatten(-5), _zero_ladj(x)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        channels, height, width = self.shape
        squares = z.reshape(*z.shape[:-1], channels, 2, 2, height // 2, width // 2)
        return squares.movedim((-4, -3), (-3, -1)).flatten(-5), _zero_ladj(z)


def _zero_ladj(vectors: Tensor) -> Tensor:
    return vectors.new_zeros(vectors.shape[:-1])
