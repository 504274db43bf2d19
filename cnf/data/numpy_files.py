"""Reading of NumPy files."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnf._files import TooLargeError, check_unpacked
from cnf.data.cells import Table, cell_of_row, first_inexact
from cnf.data.memmap import DAMAGES, check_header
from cnf.data.names import find_columns, listed, numbered_names


def read_npy(path: Path, columns: tuple[str, ...] | None) -> Table:
    """Read columns of the array of an .npy file; see `read_table`."""
    return _table(path, columns, "the array", _open(path))


def read_npz(path: Path, columns: tuple[str, ...] | None, array: str | None = None) -> Table:
    """Read columns of an array of an .npz file; see `read_table`."""
    arrays = _open(path)
    if array is None:
        tables = [name for name, found in arrays.items() if found.ndim == 2]
        if len(tables) != 1:
            raise ValueError(
                f"{path} must have one array of two axes; it has "
                f"{listed([f'{name} {found.shape}' for name, found in arrays.items()])}. Save the "
                "right one in a file of its own: numpy.save(path, array). (In Python, "
                "read_table(path, array=NAME) reads it here.)"
            )
        array = tables[0]
    if array not in arrays:
        raise ValueError(f"{path} has no array {array!r}; it has {listed(list(arrays))}.")
    return _table(path, columns, f"the array {array}", arrays[array], arrays.get("columns"))


def _open(path: Path) -> Any:
    """Return the array of an .npy file, or the arrays of an .npz file by name."""
    try:
        with path.open("rb") as file:
            packed = file.read(4).startswith(b"PK")
            file.seek(0)
            if packed:
                _check_archive(path, file)
            else:
                check_header(file, path.stat().st_size)
            content = np.load(file, allow_pickle=False)
            return dict(content) if packed else content
    except TooLargeError:
        raise
    except DAMAGES as error:
        reason = (str(error) or repr(error)).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{path} must be a NumPy file of plain numbers; it is damaged, or holds Python "
            f"objects ({reason}). Save it again from NumPy."
        ) from error


def _check_archive(path: Path, file: io.BufferedIOBase) -> None:
    """Refuse an .npz file whose stated sizes are too large or wrong, before unpacking it."""
    with zipfile.ZipFile(file) as archive:
        check_unpacked(path, sum(entry.file_size for entry in archive.infolist()))
        for entry in archive.infolist():
            with archive.open(entry) as member:
                check_header(member, entry.file_size)
    file.seek(0)


def _table(
    path: Path,
    columns: tuple[str, ...] | None,
    what: str,
    values: Any,
    stated: NDArray[Any] | None = None,
) -> Table:
    """Return the table of an array, whose columns have the names `stated` if these fit."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        kind = getattr(values, "dtype", type(values).__name__)
        raise ValueError(f"{path} must hold real numbers; {what} holds {kind}.")
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2:
        raise ValueError(f"{path} must have shape (rows, columns); {what} has {values.shape}.")
    if values.size == 0:  # before a name is made for each of its columns, which may be many
        raise ValueError(f"{path} must have rows and columns; got the shape {values.shape}.")
    names = numbered_names(values.shape[1])
    if stated is not None and stated.dtype.kind == "U" and stated.shape == (values.shape[1],):
        names = tuple(map(str, stated))
    chosen = find_columns(str(path), names, columns)
    if columns is not None:
        values = values[:, chosen]
    names = tuple(names[index] for index in chosen)
    inexact = first_inexact(values)
    if inexact:
        (row, column), defect = inexact
        raise ValueError(f"{cell_of_row(path, row, names[column])}: {defect}")
    return Table(values.astype(np.float64), names)
