"""Standardisation of features."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from cnf._checks import check_type
from cnf.manifolds import Manifold
from cnf.transforms.elementwise import ElementwiseAffine
from cnf.transforms.from_data.base import DataTransform


class Standardize(DataTransform, ElementwiseAffine):
    """Standardisation to mean 0 and standard deviation 1: ``x = mean + std * z``, not learned.

    Args:
        features: Size of x.
        manifold: Manifold that the rows are on, of which only Euclidean factors are standardised:
            angles and directions stay as they are. None for real numbers.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `features` is less than 1, or not those of the manifold.

    Example:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> Standardize.from_data(x).mean
        tensor([ 2., 20.])
    """

    def __init__(self, features: int, *, manifold: Manifold | None = None) -> None:
        super().__init__(features)
        self._manifold = manifold
        if manifold is not None:
            check_type("manifold", manifold, Manifold, "use a Product such as that of Torus(1)")
            if manifold.features != features:
                raise ValueError(
                    f"features must be the {manifold.features} of {manifold}; got {features}."
                )
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("log_std", torch.zeros(features))
        self.mean: Tensor
        self.log_std: Tensor

    @property
    def manifold(self) -> Manifold | None:
        """The manifold, or None for real numbers."""
        return self._manifold

    @property
    def support(self) -> constraints.Constraint | None:
        """Real vectors, or points on the manifold."""
        return super().support if self._manifold is None else self._manifold.support

    @property
    def codomain(self) -> constraints.Constraint | None:
        """The same as `support`."""
        return self.support

    def extra_repr(self) -> str:
        """Mean and standard deviation."""
        return f"mean={self.mean.tolist()}, std={self.log_std.exp().tolist()}"

    def _set(self, rows: Tensor, share: Tensor, mean: Tensor, std: Tensor) -> None:
        self.mean.copy_(mean)
        self.log_std.copy_(std.log())
        if self._manifold is not None:
            stays = ~torch.tensor(self._manifold.euclidean_columns, device=self.mean.device)
            self.mean[stays] = self.log_std[stays] = 0.0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # State dicts from before `is_initialized` existed hold initialised scalings.
        if f"{prefix}mean" in state_dict:
            state_dict.setdefault(f"{prefix}is_initialized", torch.ones((), dtype=torch.bool))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _loc_and_log_scale(
        self, context: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return self.mean, self.log_std
