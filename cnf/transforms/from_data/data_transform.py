"""Base class of fixed transforms whose numbers are set from rows of data, once."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from typing_extensions import Self

from cnf._checks import check_events, check_vectors, refuse_rows
from cnf.transforms.base import Transform


class DataTransform(Transform):
    """Transform with numbers from data, not learned: the identity until `initialize` sets it."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("is_initialized", torch.zeros((), dtype=torch.bool))
        self.is_initialized: Tensor

    @classmethod
    def from_data(
        cls, x: Float[Tensor, "rows features"], *, weight: Float[Tensor, " rows"] | None = None
    ) -> Self:
        """Return the transform for the rows of `x`, in its dtype and on its device.

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
        transform.is_initialized.fill_(True)
        return transform

    @property
    def needs_initialization(self) -> bool:
        """Whether `initialize` has yet to set it."""
        return not self.is_initialized

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        self._set(x.reshape(-1, self.features), None)
        self.is_initialized.fill_(True)

    @abstractmethod
    def _set(self, x: Tensor, weight: Tensor | None) -> None:
        """Hook: set the buffers from rows."""
