"""Standardisation of features."""

from typing import Any

import torch
from torch import Tensor

from cnf.transforms.elementwise import ElementwiseAffine
from cnf.transforms.from_data.base import DataTransform


class Standardize(DataTransform, ElementwiseAffine):
    """Standardisation to mean 0 and standard deviation 1: ``x = mean + std * z``, not learned.

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
        self.mean: Tensor
        self.log_std: Tensor

    def extra_repr(self) -> str:
        """Mean and standard deviation."""
        return f"mean={self.mean.tolist()}, std={self.log_std.exp().tolist()}"

    def _set(self, rows: Tensor, share: Tensor, mean: Tensor, std: Tensor) -> None:
        self.mean.copy_(mean)
        self.log_std.copy_(std.log())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # State dicts from before `is_initialized` existed hold initialised scalings.
        if f"{prefix}mean" in state_dict:
            state_dict.setdefault(f"{prefix}is_initialized", torch.ones((), dtype=torch.bool))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _loc_and_log_scale(
        self, context: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return self.mean, self.log_std
