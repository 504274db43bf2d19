"""Elementwise transforms: affine ones, learned and conditional, and the leaky rectifier."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from cnf._checks import check_count, check_number, check_vector_or_image_shape, is_positive
from cnf.transforms.base import Transform, WithLadj
from cnf.vector_fields.conditioning import ContextScaling, scaled_context


class ElementwiseAffine(Transform):
    """Elementwise affine map ``x = loc + exp(log_scale) * z``; a subclass defines both numbers."""

    @abstractmethod
    def _loc_and_log_scale(
        self, context: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Hook: return loc and log_scale, each ``(features,)`` or ``(*batch, features)``."""

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        loc, log_scale = self._loc_and_log_scale(context, x.dtype)
        return (x - loc) * (-log_scale).exp(), (-log_scale.sum(-1)).expand(x.shape[:-1])

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        loc, log_scale = self._loc_and_log_scale(context, z.dtype)
        return loc + log_scale.exp() * z, log_scale.sum(-1).expand(z.shape[:-1])

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        return -self._loc_and_log_scale(context, x.dtype)[1].expand_as(x)


class Affine(ElementwiseAffine):
    """Learnable scaling and shift of each feature: ``x = loc + exp(log_scale) * z``.

    Args:
        features: Size of x.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.

    Example:
        >>> Affine(2).to_base(torch.tensor([3.0, -1.0]))
        tensor([ 3., -1.], grad_fn=<MulBackward0>)
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.loc = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))

    def _loc_and_log_scale(
        self, context: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return self.loc, self.log_scale


class ConditionalAffine(ElementwiseAffine):
    """Conditional scaling and shift: ``x = loc(context) + exp(log_scale(context)) * z``.

    `loc` and `log_scale` are affine in the context and start as the identity. At the end of a flow
    this is a base of independent normal features with learned means and standard deviations: one
    Gaussian for each class, if the context is a class in one-hot form.

    Args:
        shape: Number of features of a vector, or shape ``(channels, height, width)`` of the image
            that x is, flattened in C order, with one scale and shift for each channel.
        context_features: Size of the context.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is less than 1, or an image does not have three.

    References:
        Kingma & Dhariwal (2018), Glow. https://arxiv.org/abs/1807.03039

    Example:
        >>> classes = torch.nn.functional.one_hot(torch.tensor([0, 2, 2, 1]), 3)
        >>> transform = ConditionalAffine(2, context_features=3)
        >>> transform.to_base(torch.zeros(4, 2), classes.float()).shape
        torch.Size([4, 2])
    """

    def __init__(self, shape: int | Sequence[int], context_features: int) -> None:
        sizes = check_vector_or_image_shape(shape)
        super().__init__(math.prod(sizes), check_count("context_features", context_features))
        self.shape: int | tuple[int, int, int] = sizes if isinstance(shape, Sequence) else sizes[0]
        self.pixels = math.prod(sizes[1:])
        self.context_scaling = ContextScaling(self.context_features)
        self.layer = nn.Linear(self.context_features, 2 * sizes[0])
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def extra_repr(self) -> str:
        """Shape of x."""
        return f"shape={self.shape}"

    def _loc_and_log_scale(
        self, context: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        channels = self.layer(scaled_context(self, context)).to(dtype)  # autocast lowers the dtype
        loc, log_scale = channels.repeat_interleave(self.pixels, -1).chunk(2, -1)
        return loc, log_scale


class LeakyReLU(Transform):
    """Leaky rectifier of each feature, an invertible activation: z is x, or slope * x if x < 0.

    Args:
        features: Size of x.
        negative_slope: The slope for negative numbers, positive.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> LeakyReLU(2, negative_slope=0.5).to_base(torch.tensor([-1.0, 1.0]))
        tensor([-0.5000,  1.0000])
    """

    def __init__(self, features: int, *, negative_slope: float = 0.01) -> None:
        super().__init__(features)
        self.negative_slope = check_number(
            "negative_slope", negative_slope, "positive and finite", is_positive
        )

    def extra_repr(self) -> str:
        """Slope for negative numbers."""
        return f"negative_slope={self.negative_slope}"

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        z = torch.where(x < 0, self.negative_slope * x, x)
        return z, self._contributions(x, context).sum(-1)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        x = torch.where(z < 0, z / self.negative_slope, z)
        return x, -self._contributions(z, context).sum(-1)

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        return (x < 0).to(x.dtype) * math.log(self.negative_slope)
