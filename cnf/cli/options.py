"""Options that commands share, and parsing of their values."""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from torch import Tensor
from tyro.conf import Positional, arg

from cnf.data.csv_files import to_csv
from cnf.data.names import shortened
from cnf.data.table_files import place_of_row, write_table
from cnf.transforms import Unconstrain
from cnf.transforms.support.columns import Support

ModelFolder = Annotated[Positional[Path], arg(metavar="MODEL")]
DataFile = Annotated[Positional[Path], arg(metavar="DATA")]
Assignments = Annotated[tuple[str, ...], arg(metavar="COLUMN=VALUE ...")]

STDOUT = Path("-")
_TABLES = (".csv", ".tsv", ".npy")


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """Base class of commands."""

    quiet: bool = False
    """Show no progress bar. (There is none if stderr is no terminal.)"""
    debug: bool = False
    """Show the traceback of an error, in place of one line."""

    @property
    def progress(self) -> bool:
        """Whether to show a progress bar."""
        return not self.quiet and sys.stderr.isatty()

    @abstractmethod
    def run(self) -> int:
        """Run the command and return the exit code."""


@dataclass(frozen=True, kw_only=True)
class TableCommand(Command):
    """Base class of commands that read a table."""

    header: bool = False
    """The first line of a text table holds names, even if they are numbers."""
    no_header: bool = False
    """The first line of a text table is a row. (By default it is one if it holds a number, with a
    warning.)"""

    def __post_init__(self) -> None:
        if self.header and self.no_header:
            raise ValueError("give one of --header and --no-header, not both.")

    @property
    def has_header(self) -> bool | None:
        """Whether the first line holds names; None without --header and --no-header."""
        return self.header if self.header or self.no_header else None


def assigned(option: str, entries: Sequence[str]) -> dict[str, str]:
    """Parse the values by column of an option such as ``--support a=positive b=integer``."""
    pairs = [entry.rpartition("=") for entry in entries]
    for entry, (column, _, value) in zip(entries, pairs, strict=True):
        if not column or not value:
            raise ValueError(f"{option} must be like COLUMN=VALUE; got {entry!r}.")
    found = {column: value for column, _, value in pairs}
    if len(found) < len(pairs):
        raise ValueError(f"{option} must have one value for each column; got {' '.join(entries)}.")
    return found


def assigned_numbers(option: str, entries: Sequence[str]) -> dict[str, float]:
    """Parse the finite numbers by column of an option such as ``--context a=1 b=2.5``."""
    return {column: number(option, text) for column, text in assigned(option, entries).items()}


def number(option: str, text: str) -> float:
    """Parse a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{option} must be a finite number; got {text!r}.")
    return value


def check_table_name(path: Path) -> None:
    """Refuse a file name without the suffix of a writable table, other than ``-``."""
    if path != STDOUT and path.suffix.lower() not in _TABLES:
        raise ValueError(f"out must end in {', '.join(_TABLES)}, or be -; got {str(path)!r}.")


def check_new_file(path: Path, *, force: bool, reads: Iterable[Path] = ()) -> None:
    """Refuse to replace a file without --force or a file that is read, and missing folders."""
    if path == STDOUT:
        return
    refuse_overwriting(path, reads)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path} to.")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; give the name of a file.")
    if path.exists() and not force:
        raise FileExistsError(f"there is a file {str(path)!r}; replace it by --force.")


def refuse_overwriting(path: Path, reads: Iterable[Path]) -> None:
    """Raise a ValueError if `path` is one of `reads`, also by another spelling or link."""
    for read in reads:
        if path.exists() and read.exists() and path.samefile(read):
            raise ValueError(
                f"out must not be a file that is read; {str(path)!r} is {str(read)!r}. Choose "
                "another name."
            )


def write_rows(path: Path, values: Tensor, columns: Sequence[str], *, replace: bool) -> None:
    """Write a table to a file, or to stdout as CSV."""
    if path == STDOUT:
        print(to_csv(values.numpy(), columns, delimiter=","), end="")
    else:
        write_table(path, values.numpy(), columns, replace=replace)


class MeanAndError(NamedTuple):
    """Mean of numbers, and its standard error; None for a single number."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Tensor) -> "MeanAndError":
        """Return the mean and standard error of one or more numbers."""
        error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
        return cls(float(values.mean()), error)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.error is None else f"{self.mean:.4f} ± {self.error:.4f}"


def refuse_rows_outside(
    data: Path, x: Tensor, names: Sequence[str], supports: Sequence[Support], *, header: bool | None
) -> None:
    """Raise a ValueError for the first row of a table outside of the support of a column."""
    for index, (column, support) in enumerate(zip(names, supports, strict=True)):
        allowed = Unconstrain([support]).support
        outside = (~allowed.check(x[:, index : index + 1])).nonzero().flatten().tolist()
        if outside:
            raise ValueError(
                f"{place_of_row(data, outside[0], names, header=header)}, column "
                f"{shortened(column)!r}: must be {_stated(support)}, by its support; got "
                f"{float(x[outside[0], index]):g}. {len(outside)} of {len(x)} rows are not."
            )


def _stated(support: Support) -> str:
    if isinstance(support, str):
        return support
    kind, low, high = support[:3]
    ends = "the ends excluded" if kind == "interval" else "the ends included"
    return f"from {low:g} to {high:g}, {ends}"
