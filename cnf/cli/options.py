"""What the commands have in common: options, and the reading of their values."""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
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
    """What every command has."""

    quiet: bool = False
    """Show no progress bar. (There is none either where stderr is no terminal.)"""
    debug: bool = False
    """Show where an error comes from, in place of one line."""

    @property
    def progress(self) -> bool:
        """Whether to show a progress bar."""
        return not self.quiet and sys.stderr.isatty()

    @abstractmethod
    def run(self) -> int:
        """Do what is asked for; return the exit code."""


@dataclass(frozen=True, kw_only=True)
class TableCommand(Command):
    """What every command has that reads a table."""

    header: bool = False
    """The first line of a table of text holds names, even if they are numbers."""
    no_header: bool = False
    """The first line of a table of text is a row. (If nothing is said, it is one if it holds a
    number, and a warning says so.)"""

    def __post_init__(self) -> None:
        if self.header and self.no_header:
            raise ValueError("give one of --header and --no-header, not both.")

    @property
    def has_header(self) -> bool | None:
        """Whether the first line holds names; None if nobody said so."""
        return self.header if self.header or self.no_header else None


def assigned(option: str, entries: Sequence[str]) -> dict[str, str]:
    """The values by column of an option such as ``--support a=positive b=integer``.

    Raises:
        ValueError: If an entry is not of this form, or a column comes twice.
    """
    pairs = [entry.rpartition("=") for entry in entries]
    for entry, (column, _, value) in zip(entries, pairs, strict=True):
        if not column or not value:
            raise ValueError(f"{option} must be like COLUMN=VALUE; got {entry!r}.")
    found = {column: value for column, _, value in pairs}
    if len(found) < len(pairs):
        raise ValueError(f"{option} must have one value for each column; got {' '.join(entries)}.")
    return found


def assigned_numbers(option: str, entries: Sequence[str]) -> dict[str, float]:
    """The finite numbers by column of an option such as ``--context a=1 b=2.5``.

    Raises:
        ValueError: If an entry is not of this form.
    """
    return {column: number(option, text) for column, text in assigned(option, entries).items()}


def number(option: str, text: str) -> float:
    """The finite number that a text stands for.

    Raises:
        ValueError: If it stands for none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{option} must be a finite number; got {text!r}.")
    return value


def check_table_name(path: Path) -> None:
    """Refuse a file that is neither a table that can be written nor ``-``.

    Raises:
        ValueError: If the suffix is another.
    """
    if path != STDOUT and path.suffix.lower() not in _TABLES:
        raise ValueError(f"out must end in {', '.join(_TABLES)}, or be -; got {str(path)!r}.")


def check_new_file(path: Path, *, force: bool, reads: Iterable[Path] = ()) -> None:
    """Refuse to write over a file unasked, over what is read, or into a folder that is not there.

    Args:
        path: The file to write.
        force: Whether an old file may be replaced.
        reads: Files that the command reads, which are never replaced.

    Raises:
        OSError: If the file exists and `force` is False, or its folder does not exist.
        ValueError: If it is one of those that are read, by whatever name.
    """
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
    """Refuse to replace a file that is read, be it by another spelling or link.

    Raises:
        ValueError: If `path` is one of `reads`.
    """
    for read in reads:
        if path.exists() and read.exists() and path.samefile(read):
            raise ValueError(
                f"out must not be a file that is read; {str(path)!r} is {str(read)!r}. Choose "
                "another name."
            )


def files_of(model: Path) -> Iterator[Path]:
    """The files of the folder of a model."""
    return model.glob("*")


def write_rows(path: Path, values: Tensor, columns: Sequence[str], *, replace: bool) -> None:
    """Write a table to a file, or to stdout as CSV.

    Raises:
        OSError: If it cannot be written, or is there and `replace` is False.
    """
    if path == STDOUT:
        print(to_csv(values.numpy(), columns, delimiter=","), end="")
    else:
        write_table(path, values.numpy(), columns, replace=replace)


class MeanAndError(NamedTuple):
    """The mean of some numbers, and its standard error; None if there is only one number."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Tensor) -> "MeanAndError":
        """That of one number or more."""
        error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
        return cls(float(values.mean()), error)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.error is None else f"{self.mean:.4f} ± {self.error:.4f}"


def refuse_rows_outside(
    data: Path, x: Tensor, names: Sequence[str], supports: Sequence[Support], *, header: bool | None
) -> None:
    """Refuse rows of a table that are outside of the support of a column.

    Raises:
        ValueError: If there is one; it names the first.
    """
    for index, (column, support) in enumerate(zip(names, supports, strict=True)):
        allowed = Unconstrain([support]).support
        outside = (~allowed.check(x[:, index : index + 1])).nonzero().flatten().tolist()
        if outside:
            raise ValueError(
                f"{place_of_row(data, outside[0], names, header=header)}, column "
                f"{shortened(column)!r}: must be "
                f"{_stated(support)}, as support says; got "
                f"{float(x[outside[0], index]):g}. {len(outside)} of {len(x)} rows are not."
            )


def _stated(support: Support) -> str:
    if isinstance(support, str):
        return support
    kind, low, high = support[:3]
    ends = "the ends excluded" if kind == "interval" else "the ends included"
    return f"from {low:g} to {high:g}, {ends}"
