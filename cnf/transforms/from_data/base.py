"""Base class of fixed transforms that are set from rows of data, once."""

from abc import abstractmethod
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from cnf._moments import check_rows_and_weight, column_moments
from cnf.transforms.base import Transform

_MOST_OF_ALL = 0.99

AnyDataTransform = TypeVar("AnyDataTransform", bound="DataTransform")


class DataTransform(Transform):
    """Transform that rows of data set, once, and training does not change.

    `initialize` sets it from the given rows; `fit` calls it with its training rows; until then this
    is the identity. `from_data` returns one that is set. Both raise the same errors.
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("is_initialized", torch.zeros((), dtype=torch.bool))
        self.is_initialized: Tensor

    @classmethod
    def from_data(
        cls: type[AnyDataTransform],
        x: Float[Tensor, "rows features"],
        *,
        weight: Float[Tensor, " rows"] | None = None,
    ) -> AnyDataTransform:
        """Return the transform for the rows of `x`, in their dtype and on their device.

        Args:
            x: At least two rows.
            weight: Weight of each row, on any scale; None for equal weights.

        Raises:
            TypeError: If `x` is not a tensor.
            ValueError: If `x` is not a finite floating tensor of shape ``(rows, features)`` with
                at least two rows, or a feature is constant, too large for its dtype, or varies by
                less than a few of its rounding steps.
        """
        check_rows_and_weight("x", x, weight)
        transform = cls(x.shape[-1]).to(x)
        transform._set_from(x, weight)
        return transform

    @property
    def needs_initialization(self) -> bool:
        """Whether `initialize` has yet to set this transform."""
        return not self.is_initialized

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        self._set_from(x.reshape(-1, self.features), None)

    def keep_identity(self) -> None:
        """Stay the identity if not yet initialised, as for a flow trained without data."""
        if self.needs_initialization:
            self.is_initialized.fill_(True)

    @torch.no_grad()
    def _set_from(self, x: Tensor, weight: Tensor | None) -> None:
        if weight is not None and not (weight > 0).sum() > 1:
            raise ValueError("weight must be positive in at least 2 rows.")
        mean, std = column_moments("x", x, weight)
        if not (std > 0).all():
            constant = (std <= 0).nonzero().flatten().tolist()
            raise ValueError(
                f"x must vary in every feature; it is constant in {constant}. Drop these columns: "
                "a constant has no density."
            )
        rows = x.detach().to("cpu", torch.float64)
        if weight is None:
            share = rows.new_full((len(rows),), 1 / len(rows))
        else:
            share = weight.detach().to("cpu", torch.float64)
            rows, share = rows[share > 0], share[share > 0]
            share = share / share.max()
            share = share / share.sum()
            if share.max() > _MOST_OF_ALL:
                raise ValueError(
                    "weight must not be nearly all in a single row, at which the best density is "
                    f"infinite; one has {float(share.max()):.4%} of the total."
                )
        self._set(rows, share, mean, std)
        self.is_initialized.fill_(True)

    @abstractmethod
    def _set(self, rows: Tensor, share: Tensor, mean: Tensor, std: Tensor) -> None:
        """Hook: set the buffers.

        Args:
            rows: Rows of data in float64, ``(rows, features)``, that vary in each feature.
            share: Share of each row in their weight, ``(rows,)``.
            mean: Mean of each feature.
            std: Standard deviation of each feature.
        """
