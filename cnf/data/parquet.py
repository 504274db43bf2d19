"""Reading of Parquet files; the only module that imports pyarrow."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnf._files import check_unpacked
from cnf.data.cells import Table, cell_of_row, first_inexact
from cnf.data.names import find_columns, shortened


def read_parquet(path: Path, columns: tuple[str, ...] | None) -> Table:
    """Read columns of a Parquet file; see `read_table`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path} needs pyarrow, which is not installed: pip install pyarrow, or convert it to "
            "CSV."
        ) from error
    try:
        file = parquet.ParquetFile(path)
        check_unpacked(path, 8 * file.metadata.num_rows * file.metadata.num_columns)
        table = file.read()
        index = (table.schema.pandas_metadata or {}).get("index_columns", [])
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: of damaged notes
        reason = (str(error) or repr(error)).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} must be a Parquet file ({reason}).") from error
    names = tuple(table.column_names)
    for name in names if columns is None else ():  # the metadata of a range index is a mapping
        if name in index or re.fullmatch(r"__index_level_\d+__", name):
            raise ValueError(
                f"{path}, column {shortened(name)!r}: must hold data; it is the index of a pandas "
                "frame. Write the file without it (in pandas, index=False), or choose the columns, "
                "with or without this one."
            )
    chosen = find_columns(str(path), names, columns)
    values = [_column(path, table, index) for index in chosen]
    matrix = np.column_stack(values) if values else np.empty((0, 0))
    return Table(matrix, tuple(names[index] for index in chosen))


def _column(path: Path, table: Any, index: int) -> NDArray[np.float64]:
    column, name = table.column(index), table.column_names[index]
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise ValueError(
            f"{cell_of_row(path, row, name)}: must be a number; the cell is empty, a missing "
            "value. Fill it or drop the row."
        )
    values: NDArray[Any] = column.to_numpy()
    if values.dtype.kind not in "fiub":
        raise ValueError(
            f"{path}, column {shortened(name)!r}: must hold numbers; got {column.type}. Choose "
            "other columns."
        )
    inexact = first_inexact(values)
    if inexact:
        (row,), defect = inexact
        raise ValueError(f"{cell_of_row(path, row, name)}: {defect}")
    return values.astype(np.float64)
