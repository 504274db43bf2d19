"""Checks of what users pass in: one message format, used once at the public door."""

import itertools
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

_ROWS_NAMED = 5


def name_rows(bad: Tensor) -> str:
    """Name the rows of a boolean mask of shape ``(*batch,)`` that are true, for a message."""
    if bad.ndim == 0:
        return "the only row"
    rows = bad.nonzero()
    listed = ", ".join(
        str(row[0] if len(row) == 1 else tuple(row)) for row in rows[:_ROWS_NAMED].tolist()
    )
    word = "row" if len(rows) == 1 else "rows"
    rest = f", … ({len(rows)} of {bad.numel()})" if len(rows) > _ROWS_NAMED else ""
    return f"{word} {listed}{rest}"


def non_finite_rows(x: Tensor, event_dim: int = 1) -> Tensor:
    """Mask of shape ``(*batch,)``: which rows of ``(*batch, *event)`` hold NaN or inf."""
    bad = ~x.isfinite()
    return bad.flatten(bad.ndim - event_dim).any(-1) if event_dim else bad


def check_vectors(name: str, x: Tensor, features: int, *, like: Tensor) -> None:
    """Refuse what is not a finite floating tensor of shape ``(*batch, features)``.

    Args:
        name: Name of the argument, for the message.
        x: The value passed in.
        features: Expected size of the last axis.
        like: A tensor of the model, whose dtype and device `x` must have.

    Raises:
        TypeError: If `x` is not a tensor.
        ValueError: If dtype, device, shape or a value is wrong.
    """
    if not isinstance(x, Tensor):
        hint = f" Try torch.as_tensor({name})." if isinstance(x, Sequence | np.ndarray) else ""
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}.{hint}")
    if not x.is_floating_point():
        raise ValueError(
            f"{name} must have a floating dtype; got {x.dtype}. "
            f"Convert it with {name}.to({like.dtype})."
        )
    if x.ndim < 1 or x.shape[-1] != features:
        raise ValueError(f"{name} must have shape (*batch, {features}); got {tuple(x.shape)}.")
    if x.dtype != like.dtype:
        raise ValueError(
            f"{name} must have the model's dtype {like.dtype}; got {x.dtype}. "
            f"Convert it with {name}.to({like.dtype}), or the model with model.to({x.dtype})."
        )
    if x.device != like.device:
        raise ValueError(
            f"{name} must be on the model's device {like.device}; got {x.device}. "
            f"Move it with {name}.to({str(like.device)!r})."
        )
    bad = non_finite_rows(x.detach())
    if bad.any():
        raise ValueError(
            f"{name} must be finite; got NaN or inf in {name_rows(bad)}. Drop or mend these rows."
        )


def reference_tensor(module: nn.Module) -> Tensor:
    """A tensor of the module, whose dtype and device its inputs must have."""
    return next(itertools.chain(module.parameters(), module.buffers()), torch.empty(0))


def check_context(context: Tensor | None, context_features: int, *, like: Tensor) -> None:
    """Refuse a context that is missing, superfluous, or not ``(*batch, context_features)``.

    Raises:
        TypeError: If `context` is not a tensor.
        ValueError: If it is missing or superfluous, or its dtype, device, shape or a value is
            wrong.
    """
    if context_features == 0:
        if context is not None:
            raise ValueError(
                "context must be None, because the model has context_features=0; "
                f"got a context of shape {_shape(context)}."
            )
    elif context is None:
        raise ValueError(
            f"context must have shape (*batch, {context_features}), because the model is "
            "conditional; got None."
        )
    else:
        check_vectors("context", context, context_features, like=like)


def joint_batch_shape(x: Tensor, context: Tensor | None) -> torch.Size:
    """Batch shape of `x` and `context` together, by broadcasting.

    Raises:
        ValueError: If the two do not broadcast.
    """
    if context is None:
        return x.shape[:-1]
    try:
        return torch.Size(torch.broadcast_shapes(x.shape[:-1], context.shape[:-1]))
    except RuntimeError:
        raise ValueError(
            "the batch shapes of x and context must broadcast; "
            f"got x {tuple(x.shape)} and context {tuple(context.shape)}."
        ) from None


def check_sample_shape(sample_shape: int | Sequence[int]) -> torch.Size:
    """Turn a number or a shape into a shape.

    Raises:
        TypeError: If it is neither.
        ValueError: If a size is negative.
    """
    sizes = tuple(sample_shape) if isinstance(sample_shape, Sequence) else (sample_shape,)
    if not all(_is_integer(size) for size in sizes):
        raise TypeError(f"sample_shape must be an int or a shape of ints; got {sample_shape!r}.")
    if any(size < 0 for size in sizes):
        raise ValueError(f"sample_shape must not be negative; got {sample_shape!r}.")
    return torch.Size(map(operator.index, sizes))


def check_type(name: str, value: object, expected: type, remedy: str) -> None:
    """Refuse what is not an instance of `expected`, and suggest the remedy.

    Raises:
        TypeError: If `value` is of another type.
    """
    if not isinstance(value, expected):
        raise TypeError(
            f"{name} must be a {expected.__name__}; got {type(value).__name__}. Perhaps {remedy}."
        )


def check_count(name: str, value: int, *, least: int = 1) -> int:
    """Refuse what is not an integer, of whatever library, of at least `least`; return an int.

    Raises:
        TypeError: If `value` is not an int.
        ValueError: If it is too small.
    """
    if not _is_integer(value):
        raise TypeError(f"{name} must be an int; got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")
    return operator.index(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, SupportsIndex) and not isinstance(value, bool | Tensor)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
