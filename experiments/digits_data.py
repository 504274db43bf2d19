"""Digits of 8 x 8 pixels and 17 levels, from scikit-learn or from a file."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEVELS = 17
SIDE = 8
CLASSES = 10
PARTS = ("train", "val", "test")
LEAST_ROWS = (SIDE * SIDE + 1, 2, 2)
"""For a covariance of full rank, and for a standard error."""


class Digits(NamedTuple):
    """Images ``(rows, 1, 8, 8)`` of integers from 0 to 16, as floating numbers; or their labels."""

    train: Tensor
    validation: Tensor
    test: Tensor


def read(path: Path) -> Digits:
    """The digits of an .npz file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no .npz file, or an array is missing or wrong.
    """
    names = [f"x_{part}" for part in PARTS]
    return Digits(*map(checked, names, arrays_of(path, names), LEAST_ROWS))


def read_scikit_learn() -> Digits:
    """The 1797 digits of scikit-learn, always split in the same way.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    return Digits(*map(checked, Digits._fields, split_of_scikit_learn("images"), LEAST_ROWS))


def read_labels(path: Path | None) -> Digits:
    """The labels ``(rows,)``, from 0 to 9 of int64, of a file's digits or of scikit-learn's.

    Raises:
        ModuleNotFoundError: If scikit-learn is needed, and is not installed.
        OSError: If the file cannot be read.
        ValueError: If it is no .npz file, or an array is missing or wrong.
    """
    names = [f"y_{part}" for part in PARTS]
    arrays = split_of_scikit_learn("target") if path is None else arrays_of(path, names)
    for name, labels in zip(names, arrays, strict=True):
        if labels.ndim != 1 or not np.isin(labels, np.arange(CLASSES)).all():
            raise ValueError(f"{name} must hold a label from 0 to {CLASSES - 1} for each image.")
    return Digits(*(torch.as_tensor(labels.astype(np.int64)) for labels in arrays))


def arrays_of(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The named arrays of an .npz file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no .npz file, or an array is missing.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            return [content[name] for name in names]
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} must be an .npz file with the arrays {', '.join(names)} ({error})."
        ) from error


def split_of_scikit_learn(name: str) -> list[np.ndarray]:
    """An array of scikit-learn's digits, in parts for training, validation and test.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - needed for this alone
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn, "
            "or name a file by --data."
        ) from error
    array = load_digits()[name]
    order = np.random.RandomState(0).permutation(len(array))
    validation, test, train = np.split(array[order], [200, 500])
    return [train, validation, test]


def checked(name: str, images: np.ndarray, least_rows: int) -> Tensor:
    """The images as a tensor ``(rows, 1, 8, 8)``, if they are digits.

    Raises:
        ValueError: If shape or values are wrong.
    """
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or len(images) < least_rows:
        raise ValueError(
            f"{name} must have shape (rows, {SIDE}, {SIDE}) with at least {least_rows} rows; "
            f"got {images.shape}."
        )
    if not np.isin(images, np.arange(LEVELS)).all():
        raise ValueError(f"{name} must hold integers from 0 to {LEVELS - 1}; got other values.")
    return torch.as_tensor(images, dtype=torch.float32).unsqueeze(1)
