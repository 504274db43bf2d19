"""Names of the columns of a table."""

from collections.abc import Sequence

_LISTED = 8
_LONGEST = 40
_LONGEST_LISTED = 80


def numbered_names(count: int) -> tuple[str, ...]:
    """Return default column names: x1, x2, …."""
    return tuple(f"x{number}" for number in range(1, count + 1))


def shortened(text: str, longest: int = _LONGEST) -> str:
    """Truncate a long text for a message or a figure."""
    return text if len(text) <= longest else f"{text[:longest]}…"


def listed(texts: Sequence[str]) -> str:
    """Join texts for a message: the first few, and their number; "none" if there are none.

    Example:
        >>> listed(numbered_names(1024))
        'x1, x2, x3, x4, x5, x6, x7, x8, … (1024 in all)'
    """
    shown = ", ".join(shortened(text, _LONGEST_LISTED) for text in texts[:_LISTED]) or "none"
    return f"{shown}, … ({len(texts)} in all)" if len(texts) > _LISTED else shown


def quoted(names: Sequence[str]) -> str:
    """Join names in quotes for a message."""
    return listed([repr(shortened(name)) for name in names])


def find_columns(
    where: str, names: Sequence[str], columns: Sequence[str] | None
) -> tuple[int, ...]:
    """Return the positions of `columns` among the `names` of a table; None for all columns.

    Other columns may have any name, also none or the same.
    """
    if columns is not None and (not columns or len(set(columns)) < len(columns)):
        raise ValueError(f"columns must be one or more different names; got {quoted(columns)}.")
    for column in columns or ():
        if column not in names:
            raise ValueError(f"{where}: has no column {column!r}; it has {quoted(names)}.")
    positions: dict[str, int] = {}
    for index, name in enumerate(names):
        if columns is not None and name not in columns:
            continue
        if not name:
            raise ValueError(
                f"{where}, column {index + 1}: must have a name; it is empty. Give it one, write "
                "the file without it (in pandas, index=False), or choose other columns."
            )
        if name in positions:
            raise ValueError(
                f"{where}, column {index + 1}: must have a unique name; column "
                f"{positions[name] + 1} is called {shortened(name)!r} too. Rename one, or choose "
                "other columns."
            )
        positions[name] = index
    return tuple(positions[name] for name in (names if columns is None else columns))
