"""Reading and writing of tables of numbers: text, NumPy and Parquet files.

Every defect of a file raises a `ValueError` of one line with the file, the line, the column and the
cell.
"""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cnf._files import as_path, write_atomically
from cnf._warnings import warn
from cnf.data.cells import LARGEST, Table, cell_of_row, refuse_unless_numbers, unacceptable
from cnf.data.csv_files import line_of_row, read_csv, to_csv
from cnf.data.degeneracy import DegenerateDataWarning
from cnf.data.names import listed, shortened
from cnf.data.numpy_files import read_npy, read_npz
from cnf.data.parquet import read_parquet

_RAW_FILL_VALUES = (-32768, 32767, 65535)
"""Limits of 16-bit integers, which raw data use for missing values."""


def read_table(
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    *,
    array: str | None = None,
    header: bool | None = None,
) -> Table:
    r"""Read a table of finite numbers from a file.

    The suffix defines the format: text (``.csv``, ``.tsv``, ``.txt``), ``.npy``, ``.npz`` or
    ``.parquet`` (which needs pyarrow). Text is UTF-8, with or without byte-order mark; comma,
    semicolon or tab separate cells, which may be quoted. Each row is one line; blank lines are
    skipped.

    Args:
        path: The file.
        columns: Names of the columns to read, in this order; None for all. Other columns may hold
            anything.
        array: Name of the array in an ``.npz`` file; None if only one has two axes. An array of
            text called ``columns`` holds the names.
        header: Whether the first line of text holds names. None: it does unless it holds a number;
            a line taken for a row gives a warning.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another format, damaged or empty, lacks a column, has lines of
            different length, numbers beyond single precision, integers beyond double precision,
            other cells, or a first line that may be a header or a row. The message names line and
            column.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "points.csv"
        >>> _ = path.write_text("name,height,width\nA,1.5,2\nB,3,4.5\n")
        >>> read_table(path, ["width", "height"])
        Table(values=array([[2. , 1.5], [4.5, 3. ]]), columns=('width', 'height'))
    """
    path = as_path("path", path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r} to read a table from.")
    if isinstance(columns, str):
        raise TypeError(f"columns must be a list of names; got the text {columns!r}.")
    if header is not None and not isinstance(header, bool):
        raise TypeError(f"header must be True, False or None; got {header!r}.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path} must be one of {', '.join(_READERS)}; got the suffix {path.suffix!r}. "
            "Rename it if it is one of them."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path}, line 1: must hold a table; the file is empty.")
    if array is not None and reader is not read_npz:
        raise ValueError(f"array must be None unless the file is an .npz; got {array!r}.")
    wanted = None if columns is None else tuple(columns)
    if reader is read_csv:
        return read_csv(path, wanted, header)
    if header is not None:
        raise ValueError(f"header must be None unless the file is text; got {header} for {path}.")
    table = reader(path, wanted) if array is None else read_npz(path, wanted, array)
    _check(path, table)
    return table


def place_of_row(
    path: Path, row: int, columns: Sequence[str] | None = None, *, header: bool | None = None
) -> str:
    """Return the place of a row, counted from 0, in a file that `read_table` has read."""
    if _READERS[path.suffix.lower()] is read_csv:
        wanted = None if columns is None else tuple(columns)
        return f"{path}, line {line_of_row(path, row, wanted, header)}"
    return f"{path}, row {row + 1} (from 1)"


def write_table(
    path: str | os.PathLike[str],
    values: ArrayLike,
    columns: Sequence[str] | None = None,
    *,
    replace: bool = True,
) -> None:
    """Write a table atomically as ``.csv``, ``.tsv`` or ``.npy``, by the suffix.

    Text has all digits, so that reading it returns the same numbers.

    Args:
        path: The file; its folder must exist.
        values: ``(rows, columns)``.
        columns: Names for the header of text; None for no header. ``.npy`` keeps no names.
        replace: Whether an existing file may be replaced.

    Raises:
        OSError: If the file cannot be written, or exists and `replace` is False.
        ValueError: If the suffix is another, the names do not fit the values, or values are masked
            or no numbers.
    """
    path = as_path("path", path)
    refuse_unless_numbers("values", values)
    table = np.asarray(values)
    if table.ndim != 2:
        raise ValueError(f"values must have shape (rows, columns); got {table.shape}.")
    suffix, content = path.suffix.lower(), io.BytesIO()
    if suffix == ".npy":
        np.save(content, table, allow_pickle=False)
    elif suffix in (".csv", ".tsv"):
        text = to_csv(table, columns, delimiter="\t" if suffix == ".tsv" else ",")
        content.write(text.encode())
    else:
        raise ValueError(f"{path} must end in .csv, .tsv or .npy; got {path.suffix!r}.")
    write_atomically(path, content.getvalue(), replace=replace)


def check_for_training(table: Table, name: str = "the table") -> None:
    """Refuse a table with fewer than two rows or a constant column; messages use its `name`."""
    if len(table.values) < 2:
        raise ValueError(f"{name} must have at least 2 rows to fit; got {len(table.values)}.")
    constant = np.flatnonzero((table.values == table.values[0]).all(0))
    if len(constant):
        found = [
            f"{shortened(table.columns[i])!r} (always {table.values[0, i]:g})" for i in constant
        ]
        raise ValueError(
            f"{name} must vary in every column, because a constant has no density; it does not in "
            f"{listed(found)}. Leave such columns out."
        )


def warn_of_fill_values(table: Table, name: str = "the table") -> None:
    """Warn of outliers such as 1e20 or -999 that may stand for missing values.

    The least or greatest value of a column is one if its distance from the others is more than 30
    times their range; 3 times, if it is repeated or a usual mark of missing values.
    """
    found = [
        f"{value:g} in {count} of {len(column)} rows of {shortened(label)!r}"
        for label, column in zip(table.columns, table.values.T, strict=True)
        for value, count in _fill_values(column)
    ]
    if found:
        warn(
            f"{name} has values far outside of all others in their column, which may stand for "
            f"missing ones: {listed(found)}. Drop or mend these rows, because a density follows "
            "all its rows.",
            DegenerateDataWarning,
        )


def _fill_values(column: NDArray[np.float64]) -> list[tuple[float, int]]:
    """Return the values of a column that may stand for missing ones, and their counts."""
    low, high = float(column.min()), float(column.max())
    others = column[(column > low) & (column < high)]
    if not len(others):
        return []
    least, greatest = float(others.min()), float(others.max())
    found = []
    for value, distance in ((low, least - low), (high, high - greatest)):
        count = int((column == value).sum())
        by_custom = value in _RAW_FILL_VALUES or set(f"{abs(value):g}") == {"9"}
        ranges = 3 if count > 1 or by_custom else 30
        if distance > ranges * (greatest - least) > 0:
            found.append((value, count))
    return found


def _check(path: Path, table: Table) -> None:
    """Refuse an empty table, and numbers beyond single precision."""
    if table.values.size == 0:
        raise ValueError(f"{path} must have rows and columns; got the shape {table.values.shape}.")
    bad = ~(np.abs(table.values) <= LARGEST)
    if bad.any():
        row, column = map(int, np.argwhere(bad)[0])
        value = table.values[row, column]
        place = cell_of_row(path, row, table.columns[column])
        raise ValueError(f"{place}: {unacceptable(str(value), value)}")


_READERS: dict[str, Callable[[Path, tuple[str, ...] | None], Table]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), read_csv),
    ".npy": read_npy,
    ".npz": read_npz,
    ".parquet": read_parquet,
}
