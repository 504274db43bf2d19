"""Tables, and checks of their cells: valid numbers, missing values and loss of digits."""

import math
import re
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cnf.data.names import shortened

LARGEST = float(np.finfo(np.float32).max)
"""Largest number that single precision holds, in which flows are trained."""
EXACT = 2.0**53 - 1
"""Largest integer up to which double precision represents every integer and its successor."""

_MISSING = {
    *("", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "nil", "missing", r"\n"),
    *("?", "-", "--", ".", ".."),
}
"""Spellings of a missing value, in lower case."""


class Table(NamedTuple):
    """Rows of numbers with column names."""

    values: NDArray[np.float64]
    """``(rows, columns)``, finite."""
    columns: tuple[str, ...]
    """One name for each column; ``x1, x2, …`` where the file has none."""


def number(cell: str) -> float | None:
    """Parse the number in a cell as NumPy does; None if it is not a number."""
    if not cell.isascii() or "_" in cell:  # Python accepts these, NumPy does not
        return None
    try:
        return float(cell)
    except ValueError:
        return None


def is_missing(cell: str) -> bool:
    """Return whether a cell holds a spelling of a missing value."""
    return cell.strip().lower() in _MISSING


def cell_defect(cell: str) -> str | None:
    """Describe the defect of a cell of text; None if it is a valid number."""
    if is_missing(cell):
        shown = f"got {cell.strip()}, which stands for a missing value"
        found = shown if cell.strip() else "the cell is empty, a missing value"
        return f"must be a number; {found}. Fill it or drop the line."
    value = number(cell)
    if value is None:
        return (
            f"must be a number; got {shortened(cell)!r}. Separate cells by comma, semicolon or "
            "tab, and decimals by a point; choose other columns if this one holds text."
        )
    if abs(value) > LARGEST:
        return unacceptable(shortened(cell.strip()), value)
    if abs(value) > EXACT and re.fullmatch(r"\s*[+-]?\d+(\.0*)?\s*", cell):
        return inexact(int(re.sub(r"^\s*([+-]?)0*(\d+).*", r"\1\2", cell)))
    return None


def cell_of_row(path: Path, row: int, name: str) -> str:
    """Name a cell of a binary file by its row and column."""
    return f"{path}, row {row + 1} (from 1), column {shortened(name)!r}"


def unacceptable(cell: str, value: float) -> str:
    """Describe the defect of a number that is not finite, or too large for single precision."""
    if math.isfinite(value):
        return (
            f"must be at most {LARGEST:.2g} in size, to fit single precision; got {cell}. "
            "Rescale the column."
        )
    kind = ", a missing value" if math.isnan(value) else ""
    return f"must be a finite number; got {cell}{kind}. Mend the cell or drop the line."


def inexact(whole: int) -> str | None:
    """Describe the loss of digits of an integer in double precision; None if it has none."""
    if abs(whole) > LARGEST:
        return unacceptable(shortened(str(whole)), LARGEST)
    held = int(float(whole))
    if held == whole:
        return None
    return (
        f"must be an integer that double precision can represent; got {whole}, which would become "
        f"{held}. Subtract a constant from the column first, or leave it out if it only names "
        "the rows."
    )


def refuse_unless_numbers(name: str, values: Any) -> None:
    """Refuse an array that NumPy would convert to wrong numbers.

    These are masked values, dates, texts, and integers that lose digits in double precision.
    """
    parts = values if isinstance(values, list | tuple) else [values]
    masked = sum(int(np.ma.getmaskarray(part).sum()) for part in parts if np.ma.isMA(part))
    if masked:
        raise ValueError(
            f"{name} must have no masked values; got {masked}. Leave these rows out, or fill them: "
            f"{name}.filled(value)."
        )
    # As objects, because NumPy makes doubles of lists and frames that mix integers and others.
    array = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=object)
    _refuse_kind(name, array.dtype.kind)
    for value in array.flat if array.dtype.kind == "O" else ():
        if isinstance(value, str | bytes):
            _refuse_kind(name, "U")
        if isinstance(value, date | timedelta | np.datetime64 | np.timedelta64):
            _refuse_kind(name, "M")
        defect = inexact(int(value)) if isinstance(value, int | np.integer) else None
        if defect:
            raise ValueError(f"{name} {defect}")
    found = first_inexact(array)
    if found:
        place, defect = found
        raise ValueError(f"{name} {defect} It is at {place}.")


def _refuse_kind(name: str, kind: str) -> None:
    if kind in "mM":
        raise ValueError(
            f"{name} must hold numbers; got dates or times. Make them numbers first, such as days: "
            f'({name} - {name}.min()) / numpy.timedelta64(1, "D").'
        )
    if kind == "V":
        raise ValueError(
            f"{name} must hold numbers; got records. Make them rows first: "
            f"numpy.lib.recfunctions.structured_to_unstructured({name})."
        )
    if kind in "UST":
        raise ValueError(
            f"{name} must hold numbers; got text. If it spells numbers, convert it first: "
            f"{name}.astype(float)."
        )


def first_inexact(values: NDArray[Any]) -> tuple[tuple[int, ...], str] | None:
    """Return the place and defect of the first integer that loses digits; None if there is none."""
    if values.dtype.kind not in "iu" or values.dtype.itemsize < 8:
        return None
    for place in np.argwhere((values > 2**53) | (values < -(2**53))):
        defect = inexact(int(values[tuple(place)]))
        if defect:
            return tuple(map(int, place)), defect
    return None
