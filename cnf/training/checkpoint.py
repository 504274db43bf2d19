"""Checkpoints: what a run resumes from, as data in files that are whole or not there at all."""

import io
import os
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnf._checks import check_count
from cnf._files import write_atomically

FORMAT_VERSION = 1

CHECKPOINTS = "checkpoint_*.pt"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often a run is kept, so that it can resume.

    The folder also gets ``history.csv``, ``best.safetensors``, which is the flow as it would be
    kept now, for `cnf.load` (if it is made of parts of this package), and events for TensorBoard if
    that is installed.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If it is less than 1.

    Example:
        >>> Checkpoints(folder="runs/first", every=100).keep
        2
    """

    folder: str | os.PathLike[str]
    """Where to; made if it does not exist. One folder holds one run."""
    every: int = 500
    """Steps between checkpoints; the end of training is kept too."""
    keep: int = 2
    """Number of the newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_count("keep", self.keep)


def write_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> None:
    """Write a state, then remove all checkpoints but the newest.

    Raises:
        OSError: If the file cannot be written.
    """
    content = io.BytesIO()
    torch.save({"format": FORMAT_VERSION, **state}, content)
    file = folder / f"checkpoint_{step:09d}.pt"
    write_atomically(file, content.getvalue())
    others = [other for other in checkpoints_in(folder) if other != file]
    for old in others[keep - 1 :]:
        old.unlink()


def read_newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest state that can be read; None where there is no checkpoint.

    Warns of each damaged file that it passes over; if one can be read, the damaged ones get the
    suffix ``.damaged``, so that they are not the newest for ever.

    Raises:
        ValueError: If there are checkpoints, and all are damaged or of a newer version.
    """
    damaged: list[Path] = []
    for file in checkpoints_in(folder):
        try:
            state = _read(file)
        except (EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            warnings.warn(f"{str(file)!r} is damaged ({error}).", stacklevel=2)
            damaged.append(file)
            continue
        if state["format"] > FORMAT_VERSION:
            raise ValueError(
                f"{str(file)!r} has format {state['format']}, newer than the {FORMAT_VERSION} that "
                "this version of cnf reads. Upgrade cnf-flows."
            )
        for each in damaged:
            each.replace(each.with_name(f"{each.name}.damaged"))
        return state
    if damaged:
        raise ValueError(
            f"every checkpoint in {str(folder)!r} is damaged. Restore one from a copy, or start "
            "again in another folder."
        )
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The files, the newest first."""
    return sorted(folder.glob(CHECKPOINTS), reverse=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch.load itself does not look at the checksums
    except zipfile.BadZipFile as error:
        raise EOFError("it is cut short") from error
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    state: Any = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError("it holds no state of a run")
    return state
