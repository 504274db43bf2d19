"""Elementwise affine transforms: learned, conditional, and standardisation."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from cnf._checks import (
    check_count,
    check_events,
    check_vector_or_image_shape,
    check_vectors,
    refuse_rows,
)
from cnf._moments import column_moments
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


class Standardize(ElementwiseAffine):
    """Standardisation to mean 0 and standard deviation 1: ``x = mean + std * z``, not learned.

    `initialize` sets mean and standard deviation once, from the given rows; `fit` calls it with its
    training rows; until then this is the identity. `from_data` returns an initialised one. Both
    raise the same errors.

    Args:
        features: Size of x.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.

    Example:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> Standardize.from_data(x).mean
        tensor([ 2., 20.])
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("log_std", torch.zeros(features))
        self.register_buffer("is_initialized", torch.zeros((), dtype=torch.bool))
        self.mean: Tensor
        self.log_std: Tensor
        self.is_initialized: Tensor

    def extra_repr(self) -> str:
        """Mean and standard deviation."""
        return f"mean={self.mean.tolist()}, std={self.log_std.exp().tolist()}"

    @classmethod
    def from_data(
        cls, x: Float[Tensor, "rows features"], *, weight: Float[Tensor, " rows"] | None = None
    ) -> "Standardize":
        """Return the standardisation of the rows of `x`, in its dtype and on its device.

        Args:
            x: At least two rows.
            weight: Weight of each row, on any scale; None for equal weights.

        Raises:
            TypeError: If `x` is not a tensor.
            ValueError: If `x` is not a finite floating tensor of shape ``(rows, features)`` with
                at least two rows, or a feature is constant, too large for its dtype, or varies by
                less than a few of its rounding steps.
        """
        if isinstance(x, Tensor) and x.ndim != 2:
            raise ValueError(
                f"x must have shape (rows, features) with at least 2 rows; got {tuple(x.shape)}."
            )
        check_vectors("x", x, x.shape[-1] if isinstance(x, Tensor) else 0, like=x)
        if weight is not None:
            check_events("weight", weight, (), like=weight if isinstance(weight, Tensor) else x)
            if weight.shape != x.shape[:1]:
                raise ValueError(f"weight must have shape ({len(x)},); got {tuple(weight.shape)}.")
            refuse_rows("weight", weight < 0, "at least 0")
        transform = cls(x.shape[-1]).to(x)
        transform._set(x, weight)
        return transform

    @property
    def needs_initialization(self) -> bool:
        """Whether `initialize` has yet to set mean and standard deviation."""
        return not self.is_initialized

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        self._set(x.reshape(-1, self.features))

    def keep_identity(self) -> None:
        """Stay the identity if not yet initialised, as for a flow trained without data."""
        if self.needs_initialization:
            self.is_initialized.fill_(True)

    def _set(self, x: Tensor, weight: Tensor | None = None) -> None:
        mean, std = column_moments("x", x, weight)
        if not (std > 0).all():
            constant = (std <= 0).nonzero().flatten().tolist()
            raise ValueError(
                f"x must vary in every feature; it is constant in {constant}. Drop these columns: "
                "a constant has no density."
            )
        self.mean.copy_(mean)
        self.log_std.copy_(std.log())
        self.is_initialized.fill_(True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # State dicts from before `is_initialized` existed hold initialised scalings.
        if f"{prefix}mean" in state_dict:
            state_dict.setdefault(f"{prefix}is_initialized", torch.ones((), dtype=torch.bool))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _loc_and_log_scale(
        self, context: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return self.mean, self.log_std
