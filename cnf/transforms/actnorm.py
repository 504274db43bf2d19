"""Scaling and shift of each feature or channel, set from the first data."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from cnf._checks import check_count, check_shape
from cnf.transforms.base import Transform, WithLadj


class ActNorm(Transform):
    """Learnable scaling and shift that start from the data: ``z = (x - loc) * exp(-log_scale)``.

    `initialize` gives each feature, or each channel of an image, mean 0 and standard deviation 1
    over the rows it is given; until then this is the identity. `fit` does it with its first rows.
    A feature or channel that is constant over them keeps the scale 1.

    Args:
        shape: Number of features of a vector, or shape ``(channels, height, width)`` of the image
            that x is, flattened in C order, with one scale and shift for each channel.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is less than 1, or `initialize` is given no row.

    References:
        Kingma & Dhariwal (2018), Glow. https://arxiv.org/abs/1807.03039

    Example:
        >>> transform = ActNorm(2)
        >>> transform.initialize(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        >>> transform.to_base(torch.tensor([2.0, 20.0])).tolist()
        [0.0, 0.0]
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        sizes = (check_count("shape", shape),) if isinstance(shape, int) else check_shape(shape)
        super().__init__(math.prod(sizes))
        self.shape = shape if isinstance(shape, int) else sizes
        self.pixels = math.prod(sizes[1:])
        self.loc = nn.Parameter(torch.zeros(sizes[0]))
        self.log_scale = nn.Parameter(torch.zeros(sizes[0]))
        self.register_buffer("is_initialized", torch.zeros((), dtype=torch.bool))
        self.is_initialized: Tensor

    def extra_repr(self) -> str:
        """Shape of x."""
        return f"shape={self.shape}"

    @property
    def needs_initialization(self) -> bool:
        """Whether loc and scale are still to be set by `initialize`."""
        return not self.is_initialized

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        if x.numel() == 0:
            raise ValueError(f"x must have at least one row; got shape {tuple(x.shape)}.")
        columns = x.reshape(-1, len(self.loc), self.pixels).movedim(1, 0).flatten(1)
        std, mean = torch.std_mean(columns, dim=1, correction=0)
        self.loc.copy_(mean)
        self.log_scale.copy_(std.where(std > 0, 1).log())
        self.is_initialized.fill_(True)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        loc, log_scale = self._of_features()
        return (x - loc) * (-log_scale).exp(), -log_scale.sum().expand(x.shape[:-1])

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        loc, log_scale = self._of_features()
        return loc + log_scale.exp() * z, log_scale.sum().expand(z.shape[:-1])

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        return -self._of_features()[1].expand_as(x)

    def _of_features(self) -> tuple[Tensor, Tensor]:
        return self.loc.repeat_interleave(self.pixels), self.log_scale.repeat_interleave(
            self.pixels
        )
