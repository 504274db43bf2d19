"""Base class of the wrappers of transforms of other libraries."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from cnf._checks import check_count, check_shape, joint_batch_shape, non_finite_rows, refuse_rows
from cnf.adapters.library_modes import (
    as_rows,
    correct_mode,
    drawing_from,
    is_estimate,
    parts_to_initialize,
)
from cnf.bases import Likelihood
from cnf.transforms.base import Transform, WithLadj
from cnf.vector_fields.jacobian.autograd import outside_inference_mode

_Map = Callable[[Tensor, Tensor | None], WithLadj]
"""From rows ``(rows, *shape)`` and contexts ``(rows, context_features)`` to values and ladj."""


class WrappedTransform(Transform):
    """Wrapper of a transform of another library, on vectors ``(*batch, features)``.

    Values agree with the other library, which gets the context unscaled. No result depends on
    `training`: each part is called in the mode with correct values and gradients. Parts that start
    from data are initialised by `initialize` alone; batch normalisation fixes its statistics there.
    A subclass defines the two directions for rows, in the hooks `_rows_to_base` and
    `_rows_to_data`.

    Args:
        shape: Number of features, or shape of the event, flattened in C order to a vector.
        context_features: Size of the context; 0 for none.
        latent_shape: Shape of the event at the base, if it differs.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, or the two shapes have different numbers of entries;
            when called, if a result is NaN or inf; from `initialize`, if there are less than two
            rows, which have no standard deviation.
        RuntimeError: When called, if a part is not yet initialised from data.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        context_features: int = 0,
        *,
        latent_shape: Sequence[int] | None = None,
    ) -> None:
        if isinstance(shape, Sequence):
            sizes = check_shape(shape)
        else:
            sizes = (check_count("features", shape),)
        latent_sizes = sizes if latent_shape is None else check_shape(latent_shape)
        if math.prod(sizes) != math.prod(latent_sizes):
            raise ValueError(
                f"latent_shape must have as many entries as shape; got {latent_sizes} and {sizes}."
            )
        super().__init__(math.prod(sizes), context_features)
        self.shape = sizes
        self.latent_shape = latent_sizes

    @abstractmethod
    def _rows_to_base(self, x: Tensor, context: Tensor | None) -> WithLadj:
        """Hook: return z and ladj of rows ``(rows, *shape)``."""

    @abstractmethod
    def _rows_to_data(self, z: Tensor, context: Tensor | None) -> WithLadj:
        """Hook: return x and ladj of rows ``(rows, *latent_shape)``."""

    @property
    def likelihood(self) -> Likelihood:
        """An estimate if a part has a random estimate of its ladj, else exact."""
        return "estimate" if is_estimate(self, self.shape) else "exact"

    @property
    def needs_initialization(self) -> bool:
        """Whether a part, such as ActNorm, is not yet initialised from data."""
        return super().needs_initialization or bool(parts_to_initialize(self))

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        super()._initialize(x, context, generator)
        if not parts_to_initialize(self):
            return
        if x.numel() < 2 * self.features:
            raise ValueError(f"x must have at least 2 rows; got shape {tuple(x.shape)}.")
        with correct_mode(self, starting=True):
            self._call(self._rows_to_base, self.shape, x, context, generator)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._checked("x", self._rows_to_base, x, context, generator)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._checked("z", self._rows_to_data, z, context, generator)

    def _checked(
        self, name: str, call: _Map, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> WithLadj:
        waiting = {type(part).__name__ for part in parts_to_initialize(self)}
        if waiting:
            raise RuntimeError(
                f"{', '.join(sorted(waiting))} must be initialised from data; call "
                "flow.initialize(x) first, with many rows. (fit does so by itself.)"
            )
        with correct_mode(self):
            shape = self.shape if name == "x" else self.latent_shape
            y, ladj = self._call(call, shape, x, context, generator)
        bad = non_finite_rows(y.detach()) | ~ladj.detach().isfinite()
        refuse_rows(name, bad, f"where {type(self).__name__} returns finite numbers")
        return y, ladj

    def _call(
        self,
        call: _Map,
        shape: tuple[int, ...],
        x: Tensor,
        context: Tensor | None,
        generator: Generator | None,
    ) -> WithLadj:
        batch = joint_batch_shape(x, context)
        with outside_inference_mode(), drawing_from(generator, self):
            rows = _rows(x, batch, shape)
            contexts = None if context is None else _rows(context, batch, context.shape[-1:])
            y, ladj = call(rows, contexts)
        # A ladj may have the default dtype, and be 0-dim or a column.
        ladj = ladj.to(x).reshape(-1).expand(len(rows))[: batch.numel()]
        return y.to(x)[: batch.numel()].reshape(*batch, self.features), ladj.reshape(batch)


def _rows(x: Tensor, batch: torch.Size, shape: tuple[int, ...]) -> Tensor:
    """Return a row for each entry of the batch; one row for an empty batch, as some refuse none."""
    rows = as_rows(x.expand(*batch, x.shape[-1]), shape)
    return rows if len(rows) else rows.new_zeros(1, *shape)
