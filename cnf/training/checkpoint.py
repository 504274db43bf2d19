"""Run directory: checkpoints, history, TensorBoard events."""

import hashlib
import importlib.util
import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf._checks import check_count
from cnf._files import as_path, write_atomically
from cnf._warnings import warn
from cnf.flows.flow import Flow
from cnf.saving import save
from cnf.training.fingerprint import differences
from cnf.training.history import History

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


FORMAT_VERSION = 1

CHECKPOINTS = "checkpoint_*.pt"

_DIGEST = b"\ncnf sha256 "
_DIGEST_SIZE = len(_DIGEST) + 64
_END_OF_ZIP, _END_OF_ZIP_SIZE = b"PK\5\6", 22


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Folder and frequency of the checkpoints of a run.

    The folder also gets ``history.csv``; ``best.safetensors``, the best flow so far, for `cnf.load`
    (a warning says why if it cannot be saved); and TensorBoard events if it is installed.

    Raises:
        TypeError: If the folder is no path, or a count not an int.
        ValueError: If a count is less than 1.

    Example:
        >>> Checkpoints(folder="runs/first", every=100).keep
        2
    """

    folder: str | os.PathLike[str]
    """Folder of a single run; created if it does not exist."""
    every: int = 500
    """Steps between checkpoints; the last step is saved too."""
    keep: int = 2
    """Number of newest checkpoints to keep."""

    def __post_init__(self) -> None:
        as_path("folder", self.folder)
        check_count("every", self.every)
        check_count("keep", self.keep)


def write_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> None:
    """Write a state and its digest, then remove all but the newest `keep` checkpoints."""
    content = io.BytesIO()
    torch.save({"format": FORMAT_VERSION, **state}, content)
    file = folder / f"checkpoint_{step:09d}.pt"
    state_and_digest = content.getvalue() + _DIGEST + _digest_of(content.getvalue())
    write_atomically(file, state_and_digest)
    others = [other for other in checkpoints_in(folder) if other != file]
    for old in others[keep - 1 :]:
        old.unlink()


def read_newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest readable file and its state, or None if there is no checkpoint.

    Warns of damaged files, and adds the suffix ``.damaged`` to them if another one can be read.

    Raises:
        ValueError: If all checkpoints are damaged, or one has a newer format.
    """
    damaged: list[Path] = []
    for file in checkpoints_in(folder):
        try:
            state = _read(file)
        except Exception as error:  # a crafted file makes torch.load raise anything
            warn(f"{str(file)!r} is damaged ({error}).")
            damaged.append(file)
            continue
        if state["format"] > FORMAT_VERSION:
            raise ValueError(
                f"{str(file)!r} has format {state['format']}, newer than the {FORMAT_VERSION} that "
                "this version of cnf reads. Upgrade cnf-flows."
            )
        for each in damaged:
            each.replace(each.with_name(f"{each.name}.damaged"))
        return file, state
    if damaged:
        raise ValueError(
            f"every checkpoint in {str(folder)!r} is damaged: "
            f"{', '.join(file.name for file in damaged)}. Restore one from a copy, or start again "
            "in another folder."
        )
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoint files, newest first."""
    return sorted(folder.glob(CHECKPOINTS), reverse=True)


def check_form(name: str, found: object, expected: object) -> None:
    """Refuse a part of a state with other keys, lengths, types, shapes or dtypes."""
    if _form_of(found) != _form_of(expected):
        raise ValueError(f"{name} must be {_form_of(expected)}; got {_form_of(found)}")
    if isinstance(expected, dict) and isinstance(found, dict):
        for key, value in expected.items():
            check_form(f"{name}[{key!r}]", found[key], value)
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        for i, (one, value) in enumerate(zip(found, expected, strict=True)):
            check_form(f"{name}[{i}]", one, value)


def _form_of(value: object) -> str:
    """Describe the type, shape or keys of a part of a state."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a mapping of {', '.join(sorted(map(repr, value)))}"
    size = f" of length {len(value)}" if isinstance(value, list | tuple) else ""
    return f"{type(value).__name__}{size}"


def _digest_of(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _read(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    if content[-_DIGEST_SIZE:].startswith(_DIGEST):
        content, digest = content[:-_DIGEST_SIZE], content[-64:]
        if _digest_of(content) != digest:
            raise ValueError("its bytes changed since it was written")
    elif not content[-_END_OF_ZIP_SIZE:].startswith(_END_OF_ZIP):  # the end of files without digest
        raise EOFError("it is cut short, or its digest is damaged")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, which no checkpoint is")
        damaged = archive.testzip()  # torch.load verifies no checksum
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise ValueError("it holds no training state")
    if state["format"] <= FORMAT_VERSION:
        told = state.get("fingerprint")
        if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
            raise ValueError("it has no fingerprint of a run")
    return state


_HISTORY, _BEST, _EVENTS = "history.csv", "best.safetensors", "events.out.tfevents*"


class RunFolder:
    """Run directory: checkpoints, history, best flow and TensorBoard events."""

    def __init__(self, settings: Checkpoints, fingerprint: dict[str, str]) -> None:
        self.folder = Path(settings.folder)
        self.every = settings.every
        self.keep = settings.keep
        self.fingerprint = fingerprint
        self._events: SummaryWriter | None = None
        self._rows_shown = 0
        self._has_warned = False

    def open(self, *, resume: bool) -> tuple[Path, dict[str, Any]] | None:
        """Return the file and the state to resume from; None for a new run.

        Raises:
            FileExistsError: If the folder holds a run, and `resume` is false.
            ValueError: If the run in the folder is another one, or cannot be read.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            names = (CHECKPOINTS, _HISTORY, _BEST, _EVENTS)
            present = [file.name for name in names for file in self.folder.glob(name)]
            if present:
                raise FileExistsError(
                    f"{str(self.folder)!r} holds a run already ({', '.join(present[:3])}). Go on "
                    "with it by resume=True, choose another folder, or move these files away."
                )
            return None
        for name in (CHECKPOINTS, _HISTORY, _BEST):
            for half in self.folder.glob(f".{name}.*"):  # of a process killed while it wrote
                half.unlink()
        newest = read_newest_checkpoint(self.folder)
        if newest is None:
            return None
        other = differences(newest[1]["fingerprint"], self.fingerprint)
        if other:
            raise ValueError(
                f"the checkpoints in {str(self.folder)!r} are of another run ({other}). Resume "
                "with its settings, data and flow, or choose another folder."
            )
        return newest

    def write(self, state: dict[str, Any], history: History, kept: Flow) -> None:
        """Write all files, the checkpoint last, because a resumed run starts after it."""
        history.save(self.folder / _HISTORY)
        try:
            save(kept, self.folder / _BEST)
        except (TypeError, ValueError) as error:
            if not self._has_warned:
                warn(
                    f"{str(self.folder / _BEST)!r} was not written, because {error} The "
                    "checkpoints hold its weights, and the run can resume."
                )
            self._has_warned = True
        self._show(history)
        state = {**state, "fingerprint": self.fingerprint}
        write_checkpoint(self.folder, len(history.step), state, keep=self.keep)

    def close(self, history: History) -> None:
        """Write the final history and close the events."""
        history.save(self.folder / _HISTORY)
        if self._events is not None:
            self._events.close()

    def _show(self, history: History) -> None:
        """Write the events since the last call; the first call starts from step 1."""
        if importlib.util.find_spec("tensorboard") is None:
            return
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            # Hides the events of a killed process, which may have reached a later step.
            self._events = SummaryWriter(str(self.folder), purge_step=0)
        columns = history.columns
        steps = columns.pop("step")
        for row in range(self._rows_shown, len(steps)):
            for name, column in columns.items():
                if column[row] == column[row]:  # NaN if it was not measured
                    self._events.add_scalar(name, column[row], steps[row])
        self._rows_shown = len(steps)
        self._events.flush()
