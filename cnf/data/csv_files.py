"""Tables of numbers as text: read at the speed of NumPy, and any defect found by line and column.

A file is parsed by `numpy.loadtxt`. Only if that fails is it walked through once more, cell by
cell, for the message.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

import numpy as np
from numpy.typing import NDArray

LARGEST = float(np.finfo(np.float32).max)
"""Largest number that single precision holds, in which flows are trained."""

_ENCODING = "utf-8-sig"
"""UTF-8; a byte-order mark at the start is skipped."""
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
_DELIMITERS = "\t;,"
"""In this order, for numbers and names may hold commas."""
_MAYBE_HEADER = " If the line is a header, give the columns names that are no numbers."
_UTF8 = "Save the file as UTF-8"


class _Layout(NamedTuple):
    delimiter: str
    names: tuple[str, ...]
    header_lines: int
    """Lines before the first row of numbers."""


def read_csv(
    path: Path, columns: tuple[str, ...] | None
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Values and names of columns of a file of text; see `cnf.data.tabular.read_table`.

    Raises:
        ValueError: If anything is wrong with the file.
    """
    _refuse_wide_characters(path)
    try:
        layout = _layout(path)
        chosen = find_columns(f"{path}, line 1", layout.names, columns)
        try:
            values = _parse(path, layout, chosen)
        except ValueError as error:
            _refuse_first_defect(path, layout, chosen, str(error))
        even = values.shape[1] == len(chosen) and (columns is None or _has_even_lines(path, layout))
        if not even or not (np.abs(values) <= LARGEST).all():
            _refuse_first_defect(path, layout, chosen, "its lines have different lengths")
    except UnicodeDecodeError:
        _refuse_encoding(path)
    except csv.Error as error:
        raise ValueError(f"{path} must be text of cells and lines ({error}).") from error
    return values, tuple(layout.names[index] for index in chosen)


def to_csv(values: NDArray[np.generic], columns: Sequence[str] | None, *, delimiter: str) -> str:
    """A table as text, with a header if there are names.

    Raises:
        ValueError: If there is not one name for each column.
    """
    if columns is not None and len(columns) != values.shape[1]:
        raise ValueError(f"columns must be {values.shape[1]} names; got {len(columns)}.")
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    if columns is not None:
        writer.writerow(columns)
    # Python writes doubles as NumPy does, and faster, but knows no single precision.
    writer.writerows((values.astype(str) if values.dtype == np.float32 else values).tolist())
    return text.getvalue()


def numbered_names(count: int) -> tuple[str, ...]:
    """Names for columns that have none, from x1 on."""
    return tuple(f"x{number}" for number in range(1, count + 1))


def find_columns(
    where: str, names: Sequence[str], columns: Sequence[str] | None
) -> tuple[int, ...]:
    """Positions of `columns` among the `names` of a table, or of all of them.

    Raises:
        ValueError: If a name is asked for twice or not there, or names are missing or alike.
    """
    for number, name in enumerate(names, 1):
        if not name:
            raise ValueError(
                f"{where}, column {number}: must have a name; it is empty. Give it one, or write "
                "the file without it (in pandas, index=False)."
            )
        if name in names[: number - 1]:
            first = names.index(name) + 1
            raise ValueError(
                f"{where}, column {number}: must have a name of its own; {name!r} is that of "
                f"column {first} too."
            )
    if columns is None:
        return tuple(range(len(names)))
    if not columns or len(set(columns)) < len(columns):
        raise ValueError(f"columns must be one or more different names; got {list(columns)}.")
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(
            f"{where}: has no column {missing[0]!r}; it has {', '.join(map(repr, names))}."
        )
    return tuple(names.index(name) for name in columns)


def unacceptable(cell: str, value: float) -> str:
    """Says why a cell that is a number is not one that a flow can take."""
    if math.isfinite(value):
        return (
            f"must be at most {LARGEST:.2g} in size, as single precision holds; got {cell}. "
            "Rescale the column."
        )
    return f"must be a finite number; got {cell}. Mend the cell or drop the line."


def _layout(path: Path) -> _Layout:
    with path.open(encoding=_ENCODING, newline="") as file:
        first = next((line for line in file if line.strip()), "")
        if not first:
            raise ValueError(f"{path}, line 1: must hold a table; the file is empty.")
        unquoted = "".join(first.split('"')[::2])
        delimiter = next((mark for mark in _DELIMITERS if mark in unquoted), ",")
        file.seek(0)
        rows = _rows(file, delimiter)
        line, cells = next(rows)
        if any(_number(cell) is not None for cell in cells):
            _refuse_numbered_columns(f"{path}, line {line}", cells)
            return _Layout(delimiter, numbered_names(len(cells)), 0)
        if next(rows, None) is None:
            raise ValueError(
                f"{path}, line {line + 1}: must hold numbers; the file ends after the header."
            )
    return _Layout(delimiter, tuple(cell.strip() for cell in cells), line)


def _refuse_numbered_columns(where: str, cells: Sequence[str]) -> None:
    """Refuse a first line that numbers the columns, as a header of pandas may."""
    if len(cells) > 1 and cells == list(map(str, range(len(cells)))):
        raise ValueError(
            f"{where}: must be names or a row of numbers; {','.join(cells)} may be either. If "
            "it is a header, name the columns (in pandas, header=False writes none); if it is a "
            "row, put a header above it."
        )


def _rows(file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line, and the cells, of each row that is not blank."""
    reader = csv.reader(file, delimiter=delimiter)
    for cells in reader:
        if cells:
            yield reader.line_num, cells


def _parse(path: Path, layout: _Layout, chosen: tuple[int, ...]) -> NDArray[np.float64]:
    whole = chosen == tuple(range(len(layout.names)))
    return np.loadtxt(
        str(path),
        delimiter=layout.delimiter,
        quotechar='"',
        comments=None,
        skiprows=layout.header_lines,
        usecols=None if whole else chosen,
        ndmin=2,
        encoding=_ENCODING,
    )


def _has_even_lines(path: Path, layout: _Layout) -> bool:
    """Whether each line has as many cells as there are columns, also among those left out."""
    with path.open(encoding=_ENCODING, newline="") as file:
        return all(len(cells) == len(layout.names) for _, cells in _rows(file, layout.delimiter))


def _number(cell: str) -> float | None:
    """The number that a cell holds, as NumPy reads it; None if it holds none."""
    if not cell.isascii() or "_" in cell:  # which Python's own numbers may have
        return None
    try:
        return float(cell)
    except ValueError:
        return None


def _refuse_first_defect(
    path: Path, layout: _Layout, chosen: tuple[int, ...], reason: str
) -> NoReturn:
    """Raise a `ValueError` for the first line or cell that is not as it must be."""
    count = len(layout.names)
    with path.open(encoding=_ENCODING, newline="") as file:
        for row, (line, cells) in enumerate(_rows(file, layout.delimiter)):
            if line <= layout.header_lines:
                continue
            hint = _MAYBE_HEADER if row == 0 else ""
            if len(cells) != count:
                column = min(len(cells), count)
                raise ValueError(
                    f"{path}, line {line}, column {column}: must be the last of {count} cells, as "
                    f"in the first line; the line has {len(cells)}. Complete or drop the line."
                )
            for index in chosen:
                defect = _defect(cells[index])
                if defect:
                    raise ValueError(
                        f"{path}, line {line}, column {layout.names[index]!r}: {defect}{hint}"
                    )
    raise ValueError(f"{path} could not be read as a table of numbers ({reason.rstrip('.')}).")


def _defect(cell: str) -> str | None:
    """What is wrong with a cell, if anything."""
    value = _number(cell)
    if value is None and not cell.strip():
        return "must be a number; the cell is empty. Fill it or drop the line."
    if value is None:
        shown = cell if len(cell) <= 40 else f"{cell[:40]}…"
        return (
            f"must be a number; got {shown!r}. Cells are parted by comma, semicolon or tab, and "
            "decimals by a point; choose other columns if this one holds text."
        )
    if not abs(value) <= LARGEST:
        return unacceptable(cell.strip(), value)
    return None


def _refuse_wide_characters(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(_WIDE_MARKS) or b"\0" in start:
        raise ValueError(
            f"{path}, line 1, column 1: must be UTF-8 text; it is UTF-16 or no text. {_UTF8}, for "
            f"instance by: iconv -f UTF-16 -t UTF-8 {path.name} > new.csv"
        )


def _refuse_encoding(path: Path) -> NoReturn:
    """Raise a `ValueError` for the first byte that is not UTF-8."""
    with path.open("rb") as file:
        bad = ((number, line, _first_bad_byte(line)) for number, line in enumerate(file, 1))
        number, line, at = next(found for found in bad if found[2] >= 0)
    column = max(line.count(mark.encode(), 0, at) for mark in _DELIMITERS) + 1
    raise ValueError(
        f"{path}, line {number}, column {column}: must be UTF-8 text; got the byte "
        f"0x{line[at]:02x}. {_UTF8}, for instance by: "
        f"iconv -f LATIN1 -t UTF-8 {path.name} > new.csv"
    ) from None


def _first_bad_byte(line: bytes) -> int:
    """Where the first byte stands that is not UTF-8; -1 if there is none."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return error.start
    return -1
