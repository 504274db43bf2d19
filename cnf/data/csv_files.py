"""CSV files: parsed by `numpy.loadtxt`, with defects located by line and column.

The file is read a second time, cell by cell, if parsing fails, or if `numpy.loadtxt` cannot detect
uneven lines: where there are quotes, or columns are left out.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

import numpy as np
from numpy.typing import NDArray

from cnf._warnings import warn
from cnf.data.cells import EXACT, Table, cell_defect, is_missing, number
from cnf.data.names import find_columns, listed, numbered_names, shortened

_ENCODING = "utf-8-sig"
"""UTF-8; a byte-order mark at the start is skipped."""
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
_DELIMITERS = "\t;,"
"""In this order, because numbers and names may hold commas."""
_SAY_WHICH = "say header=True if it holds names, header=False if it is a row"
_MAYBE_HEADER = " If the line is a header, say so by header=True."
_UTF8 = "Save the file as UTF-8"


class _Layout(NamedTuple):
    delimiter: str
    names: tuple[str, ...]
    header_lines: int
    """Lines before the first row of numbers."""
    guessed: bool
    """Whether the first line was taken for a row without header=False."""
    hint: str
    """Remedy if the first line may be a comment."""


def read_csv(path: Path, columns: tuple[str, ...] | None, header: bool | None = None) -> Table:
    """Read columns of a text file; see `cnf.data.table_files.read_table`."""
    has_quotes = _has_quotes(path)
    try:
        layout = _layout(path, columns, header)
        chosen = find_columns(f"{path}, line {layout.header_lines or 1}", layout.names, columns)
        if has_quotes or columns is not None:  # lines may be uneven beyond the chosen columns
            _refuse_first_defect(path, layout, ())
        try:
            values = np.loadtxt(
                str(path),
                delimiter=layout.delimiter,
                quotechar='"',
                comments=None,
                skiprows=layout.header_lines,
                usecols=None if chosen == tuple(range(len(layout.names))) else chosen,
                ndmin=2,
                encoding=_ENCODING,
            )
        except ValueError as error:
            _refuse_first_defect(path, layout, chosen)
            reason = str(error).rstrip(".")
            raise ValueError(
                f"{path} could not be read as a table of numbers ({reason})."
            ) from error
        if values.shape[1] != len(chosen) or not (np.abs(values) <= EXACT).all():
            _refuse_first_defect(path, layout, chosen)
    except UnicodeDecodeError:
        _refuse_encoding(path)
    if layout.guessed:
        _doubt_first_row(path, values)
    return Table(values, tuple(layout.names[index] for index in chosen))


def line_of_row(
    path: Path, row: int, columns: tuple[str, ...] | None, header: bool | None = None
) -> int:
    """Return the line number of a row, counted from 0, of a file that `read_csv` has read."""
    layout = _layout(path, columns, header)
    lines = (line for line, _ in _rows(path, layout.delimiter) if line > layout.header_lines)
    return next(itertools.islice(lines, row, None))


def to_csv(values: NDArray[np.generic], columns: Sequence[str] | None, *, delimiter: str) -> str:
    """Format a table as text, with a header if there are names, each without line breaks."""
    if columns is not None and len(columns) != values.shape[1]:
        raise ValueError(f"columns must be {values.shape[1]} names; got {len(columns)}.")
    for name in columns or ():
        if "\n" in name or "\r" in name:
            raise ValueError(f"columns must be names of one line; got {name!r}. Rename it.")
    text = io.StringIO()
    writer = partial(csv.writer, text, delimiter=delimiter, lineterminator="\n")
    if columns is not None:
        # Quotes keep a name that begins with # from being read as a comment.
        marked = any(name.lstrip().startswith("#") for name in columns[:1])
        writer(quoting=csv.QUOTE_ALL if marked else csv.QUOTE_MINIMAL).writerow(columns)
    # Python writes doubles as NumPy does, and faster, but has no single precision.
    writer().writerows((values.astype(str) if values.dtype == np.float32 else values).tolist())
    return text.getvalue()


def _layout(path: Path, columns: tuple[str, ...] | None, header: bool | None) -> _Layout:
    with path.open(encoding=_ENCODING, newline="") as file:
        first = next((line for line in file if line.strip()), "")
    if not first:
        raise ValueError(f"{path}, line 1: must hold a table; the file is empty.")
    unquoted = "".join(first.split('"')[::2])
    delimiter = next((mark for mark in _DELIMITERS if mark in unquoted), ",")
    rows = _rows(path, delimiter)
    line, cells = next(rows)
    cells = [cell.strip() for cell in cells]
    if not (_is_header(f"{path}, line {line}", cells, columns) if header is None else header):
        hint = _about_comment(path, first)
        return _Layout(delimiter, numbered_names(len(cells)), 0, header is None, hint)
    if next(rows, None) is None:
        raise ValueError(
            f"{path}, line {line + 1}: must hold numbers; the file ends after the header."
        )
    if first.lstrip().startswith("#"):  # which was said to be a header, be it of numbers
        cells[0] = cells[0].lstrip("# ") or cells[0]
    return _Layout(delimiter, tuple(cells), line, False, _about_comment(path, first))


def _is_header(where: str, cells: Sequence[str], columns: tuple[str, ...] | None) -> bool:
    """Return whether the first line holds names; refuse a line that may be either."""
    if columns and set(columns) <= set(cells):
        return True
    numbered = len(cells) > 1 and list(cells) == list(map(str, range(len(cells))))
    if numbered or all(map(is_missing, cells)):
        raise ValueError(
            f"{where}: must be clearly names or a row of numbers; {listed(cells)} may be either. "
            f"Please {_SAY_WHICH}."
        )
    return all(number(cell) is None for cell in cells)


def _doubt_first_row(path: Path, values: NDArray[np.float64]) -> None:
    """Warn that the first line was taken for a row; refuse one that looks like a numeric header.

    Numeric headers rise evenly, out of the range of the other rows.
    """
    first, others = values[0], values[1:]
    steps = np.diff(first)
    if len(others) and len(steps) and steps[0] > 0 and np.allclose(steps, steps.mean(), rtol=1e-2):
        outside = (first < others.min(0)) | (first > others.max(0))
        if outside.all():
            raise ValueError(
                f"{path}, line 1: must be clearly names or a row of numbers; "
                f"{listed([f'{value:g}' for value in first])} may be either, because they rise "
                f"evenly and lie outside the range of the other rows. Please {_SAY_WHICH}."
            )
    warn(
        f"{path}, line 1 holds numbers and was read as a row, so the columns are called "
        f"{listed(numbered_names(values.shape[1]))}: {_SAY_WHICH}."
    )


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line that is not blank."""
    with path.open(encoding=_ENCODING, newline="") as file:
        reader = csv.reader(_lines(path, file, delimiter), delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: must be text of cells and lines ({error})."
            ) from error


def _lines(path: Path, file: TextIO, delimiter: str) -> Iterator[str]:
    """Yield the lines; refuse one with an open quote, which would swallow the following lines."""
    cell = rf'(?:"(?:[^"\r\n]|"")*"|[^"{delimiter}\r\n]*)'
    row = re.compile(rf"{cell}(?:{delimiter}{cell})*[\r\n]*")
    begun = False
    for number_of_line, found in enumerate(file, 1):
        line = found if begun else _without_mark(found, delimiter)
        begun = begun or not found.isspace()
        if '"' in line and not row.fullmatch(line):
            raise ValueError(
                f"{path}, line {number_of_line}: must have quotes around whole cells only, each "
                'closed in its line, and "" for a quote inside a cell; got '
                f"{shortened(line.strip())!r}. Mend the quotes; a cell cannot hold a line break."
                f"{_about_comment(path, line)}"
            )
        yield line


def _without_mark(line: str, delimiter: str) -> str:
    """Strip the # that `numpy.savetxt` puts before names; a row of numbers keeps it."""
    names = re.sub(rf"^\s*#[#\s]*(?=[^#\s{delimiter}])", "", line)
    cells = names.split(delimiter)
    return line if any(number(cell.strip(' "\r\n')) is not None for cell in cells) else names


def _refuse_first_defect(path: Path, layout: _Layout, chosen: tuple[int, ...]) -> None:
    """Raise a `ValueError` for the first uneven line or invalid chosen cell, if any."""
    count = len(layout.names)
    for row, (line, cells) in enumerate(_rows(path, layout.delimiter)):
        if line <= layout.header_lines:
            continue
        if len(cells) != count:
            hint = layout.hint or _about_comment(path, cells[0])
            column = min(len(cells), count)
            raise ValueError(
                f"{path}, line {line}, column {column}: must be the last of {count} cells, as "
                f"in the first line; the line has {len(cells)}. Complete or drop the line.{hint}"
            )
        for index in chosen:
            defect = cell_defect(cells[index])
            if defect:
                hint = layout.hint or _about_comment(path, cells[0])
                hint = hint or (_MAYBE_HEADER if row == 0 else "")
                name = shortened(layout.names[index])
                raise ValueError(f"{path}, line {line}, column {name!r}: {defect}{hint}")


def _about_comment(path: Path, line: str) -> str:
    """Return the remedy for a line that may be a comment, else an empty text."""
    if not line.lstrip().startswith("#"):
        return ""
    return (
        " Lines that begin with # are not skipped; take comments out, for instance by: "
        f"grep -v '^ *#' {path.name} > new.csv"
    )


def _has_quotes(path: Path) -> bool:
    """Return whether there are quotes in a file; refuse UTF-16 and NUL bytes."""
    found, line = False, 1
    with path.open("rb") as file:
        start = file.read(4096)
        if start.startswith(_WIDE_MARKS) or 4 * start.count(b"\0") > len(start):
            raise ValueError(
                f"{path}, line 1, column 1: must be UTF-8 text; it is UTF-16 or binary. {_UTF8}, "
                f"for instance by: iconv -f UTF-16 -t UTF-8 {path.name} > new.csv"
            )
        file.seek(0)
        while block := file.read(1 << 20):
            before, nul, _ = block.partition(b"\0")
            line += before.count(b"\n")
            if nul:
                raise ValueError(
                    f"{path}, line {line}: must be text; it holds a NUL byte, as damaged and "
                    "binary files do. Mend or drop the line."
                )
            found = found or b'"' in block
    return found


def _refuse_encoding(path: Path) -> NoReturn:
    """Raise a `ValueError` for the first byte that is not UTF-8."""
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        at = error.start
    *lines, line = content[:at].split(b"\n")
    column = max(line.count(mark.encode()) for mark in _DELIMITERS) + 1
    raise ValueError(
        f"{path}, line {len(lines) + 1}, column {column}: must be UTF-8 text; got the byte "
        f"0x{content[at]:02x}. {_UTF8}, for instance by: "
        f"iconv -f LATIN1 -t UTF-8 {path.name} > new.csv"
    ) from None
