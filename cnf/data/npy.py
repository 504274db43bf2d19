"""Rows of a file that may be larger than memory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class NpyRows(Dataset[Tensor]):
    """The rows of a ``.npy`` file, each read when it is asked for and not before.

    To give rows contexts or weights, stack two files by name with torch's
    ``StackDataset(x=NpyRows("x.npy"), context=NpyRows("context.npy"))``.

    Args:
        path: File of an array with at least one axis; the first is that of the rows.
        dtype: What rows are converted to; None to leave them as they are.

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
        self.path = Path(path).resolve()
        self.dtype = dtype
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        """All but the content of the file, which may be too large to send to another process."""
        return {"path": self.path, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """The rows at these places, read at once."""
        some = self.array[list(indices)]  # such an index makes a copy
        rows = torch.from_numpy(some.astype(some.dtype.newbyteorder("="), copy=False))
        return list(rows if self.dtype is None else rows.to(self.dtype))

    def _open(self) -> None:
        path = self.path
        try:
            self.array = np.lib.format.open_memmap(self.path, mode="r")
        except (EOFError, ValueError) as error:
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
