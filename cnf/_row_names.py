"""Names of rows in messages, by the caller's indices."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
from torch import Tensor

Row = tuple[int, ...]
"""Index of a row in the batch axes."""

_ROWS_NAMED = 5
_caller_row: ContextVar[Callable[[Row], Row] | None] = ContextVar("_caller_row", default=None)


@contextmanager
def rows_of_caller(caller_row: Callable[[Row], Row]) -> Iterator[None]:
    """Let `name_rows` use the caller's indices, where a call gets a part of the rows.

    Example:
        >>> import torch
        >>> with rows_of_caller(counted_from(100)):
        ...     name_rows(torch.tensor([False, True]))
        'row 101'
    """
    outer = _caller_row.get()
    token = _caller_row.set(caller_row if outer is None else lambda row: outer(caller_row(row)))
    try:
        yield
    finally:
        _caller_row.reset(token)


def counted_from(start: int) -> Callable[[Row], Row]:
    """Return the map of indices for rows that begin at `start` of the last axis."""
    return lambda row: (*row[:-1], row[-1] + start)


def unflattened(row: int, batch: Sequence[int]) -> Row:
    """Return the index in the batch axes of a row of the flattened batch."""
    return tuple(map(int, np.unravel_index(row, batch)))


def name_rows(bad: Tensor) -> str:
    """Name the true rows of a mask ``(*batch,)`` for a message."""
    if bad.ndim == 0:
        return "the only row"
    rows = list(map(tuple, bad.nonzero().tolist()))
    caller_row = _caller_row.get()
    if caller_row is not None:
        rows = list(dict.fromkeys(map(caller_row, rows)))
    listed = ", ".join(str(row[0] if len(row) == 1 else row) for row in rows[:_ROWS_NAMED])
    word = "row" if len(rows) == 1 else "rows"
    of_all = f" of {bad.numel()}" if caller_row is None else ""
    rest = f", … ({len(rows)}{of_all})" if len(rows) > _ROWS_NAMED else ""
    return f"{word} {listed}{rest}"
