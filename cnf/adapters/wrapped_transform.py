"""What wraps a transform of another library: from its rows to ours, and back."""

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
    """A transform of another library, on vectors ``(*batch, features)``.

    It changes no value, the other library sees the context as it comes, and no result depends on
    `training`: each part is called in the one mode in which its values and its gradients are right.
    A part that starts from data does so in `initialize`, and in no other call; batch normalisation
    takes its statistics there, and keeps them. A subclass defines the two directions for rows, in
    the hooks `_rows_to_base` and `_rows_to_data`.

    Args:
        shape: Number of features, or shape of the event that a vector is, flattened in C order.
        context_features: Size of the context; 0 for none.
        latent_shape: Shape of the event at the base, if that is another.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, or the two shapes have different numbers of entries;
            when called, if NaN or inf comes out; from `initialize`, if there are less than two
            rows, which have no standard deviation.
        RuntimeError: When called, if a part has still to start from data.
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
        """Hook: z and ladj of rows ``(rows, *shape)``."""

    @abstractmethod
    def _rows_to_data(self, z: Tensor, context: Tensor | None) -> WithLadj:
        """Hook: x and ladj of rows ``(rows, *latent_shape)``."""

    @property
    def likelihood(self) -> Likelihood:
        """An estimate if a part is known to estimate its ladj at random, else exact."""
        return "estimate" if is_estimate(self, self.shape) else "exact"

    @property
    def needs_initialization(self) -> bool:
        """Whether a part, such as ActNorm, has still to start from data."""
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
        return self._trusted("x", self._rows_to_base, x, context, generator)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._trusted("z", self._rows_to_data, z, context, generator)

    def _trusted(
        self, name: str, call: _Map, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> WithLadj:
        waiting = {type(part).__name__ for part in parts_to_initialize(self)}
        if waiting:
            raise RuntimeError(
                f"{', '.join(sorted(waiting))} starts from data, and has not; call "
                "flow.initialize(x) first, with many rows. (fit does so by itself.)"
            )
        with correct_mode(self):
            shape = self.shape if name == "x" else self.latent_shape
            y, ladj = self._call(call, shape, x, context, generator)
        bad = non_finite_rows(y.detach()) | ~ladj.detach().isfinite()
        refuse_rows(name, bad, f"where {type(self).__name__} gives finite numbers")
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
        # A ladj may come in the default dtype, as 0-dim or as a column.
        ladj = ladj.to(x).reshape(-1).expand(len(rows))[: batch.numel()]
        return y.to(x)[: batch.numel()].reshape(*batch, self.features), ladj.reshape(batch)


def _rows(x: Tensor, batch: torch.Size, shape: tuple[int, ...]) -> Tensor:
    """A row for each entry of the batch; for an empty one, which some libraries refuse, one row."""
    rows = as_rows(x.expand(*batch, x.shape[-1]), shape)
    return rows if len(rows) else rows.new_zeros(1, *shape)
