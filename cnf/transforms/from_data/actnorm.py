"""Activation normalisation: scaling and shift of each feature or channel, set from data."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from cnf._checks import check_count, check_shape
from cnf.transforms.elementwise import ElementwiseAffine


class ActNorm(ElementwiseAffine):
    """Learnable scaling and shift that start from the data: ``z = (x - loc) * exp(-log_scale)``.

    `initialize` gives each feature, or each channel of an image, mean 0 and standard deviation 1
    over the given rows; until then this is the identity. `fit` initialises it with its first rows.
    A feature or channel that is constant over these rows keeps the scale 1.

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
        """Whether `initialize` has yet to set loc and scale."""
        return not self.is_initialized

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        if x.numel() == 0:
            raise ValueError(f"x must have at least one row; got shape {tuple(x.shape)}.")
        columns = x.reshape(-1, len(self.loc), self.pixels).movedim(1, 0).flatten(1)
        std, mean = torch.std_mean(columns, dim=1, correction=0)
        self.loc.copy_(mean)
        self.log_scale.copy_(std.where(std > 0, 1).log())
        self.is_initialized.fill_(True)

    def _loc_and_log_scale(
        self, context: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        pixels = self.pixels
        return self.loc.repeat_interleave(pixels), self.log_scale.repeat_interleave(pixels)
