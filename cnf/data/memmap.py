"""Memory-mapped rows of a file that may be larger than memory."""

import io
import lzma
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cnf._files import as_path

DAMAGES = (
    *(EOFError, OSError, OverflowError, RuntimeError, SyntaxError, ValueError),
    *(lzma.LZMAError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
"""Exceptions of NumPy and its libraries for damaged files."""

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class NpyRows(Dataset[Tensor]):
    """Dataset of the rows of a ``.npy`` file, each read on access.

    For contexts or weights, stack files by name with torch's
    ``StackDataset(x=NpyRows("x.npy"), context=NpyRows("context.npy"))``.

    Args:
        path: File of an array with at least one axis; the first axis counts the rows.
        dtype: Dtype of the returned rows; None for the dtype of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not ``.npy``, or holds no rows of numbers.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/x.npy"
        >>> np.save(path, np.arange(6.0).reshape(3, 2))
        >>> rows = NpyRows(path, dtype=torch.float32)
        >>> len(rows), rows[2]
        (3, tensor([4., 5.]))
    """

    def __init__(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        self.path = as_path("path", path).resolve()
        self.dtype = dtype
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the array, which may be too large for another process."""
        return {"path": self.path, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the rows at several indices, read at once."""
        some = self.array[list(indices)]  # a copy
        rows = torch.from_numpy(some.astype(some.dtype.newbyteorder("="), copy=False))
        return list(rows if self.dtype is None else rows.to(self.dtype))

    def _open(self) -> None:
        path = self.path
        try:
            with path.open("rb") as file:
                check_header(file, path.stat().st_size)
            self.array = np.lib.format.open_memmap(self.path, mode="r")
        except (FileNotFoundError, PermissionError):
            raise
        except DAMAGES as error:
            raise ValueError(
                f"{str(path)!r} is not a .npy file of numbers, or is cut short ({error}). Write "
                "it with numpy.save."
            ) from error
        if self.array.ndim == 0 or self.array.dtype.kind not in "biuf":
            raise ValueError(
                f"{str(path)!r} must hold rows of numbers; it holds an array of shape "
                f"{self.array.shape} of {self.array.dtype}."
            )
        try:
            torch.from_numpy(np.empty(0, self.array.dtype.newbyteorder("=")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} must hold numbers of a dtype that torch has; it holds "
                f'{self.array.dtype}. Convert it by numpy.save(path, array.astype("float64")).'
            ) from error


def check_header(file: IO[bytes] | io.BufferedIOBase, size: int) -> None:
    """Refuse an array whose header states more numbers than follow, or no plain numbers."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"its format has version {version}, which is not for plain numbers")
    shape, _, dtype = _HEADERS[version](file)
    if math.prod(shape) * dtype.itemsize > size - file.tell():
        raise ValueError(f"it states the shape {shape}, for which it is too short")
    file.seek(0)
