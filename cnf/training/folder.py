"""The files of a run."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnf._warnings import warn
from cnf.flows.flow import Flow
from cnf.saving import save
from cnf.training.checkpoint import (
    CHECKPOINTS,
    Checkpoints,
    checkpoints_in,
    read_newest_checkpoint,
    write_checkpoint,
)
from cnf.training.fingerprint import differences
from cnf.training.history import History

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_HISTORY, _BEST, _EVENTS = "history.csv", "best.safetensors", "events.out.tfevents*"


class RunFolder:
    """The folder of a run: checkpoints, and what others read.

    Args:
        settings: Where and how often.
        fingerprint: What the run depends on.
    """

    def __init__(self, settings: Checkpoints, fingerprint: dict[str, str]) -> None:
        self.folder = Path(settings.folder)
        self.every = settings.every
        self.keep = settings.keep
        self.fingerprint = fingerprint
        self._events: SummaryWriter | None = None
        self._rows_shown = 0
        self._has_warned = False

    def open(self, *, resume: bool) -> tuple[Path, dict[str, Any]] | None:
        """The file and the state to resume from; None where the run is to begin.

        Raises:
            FileExistsError: If the folder holds a run, and `resume` is false.
            ValueError: If the run in the folder is another one, or cannot be read.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            self._refuse_to_overwrite()
            return None
        self._remove_half_files()
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
        """Write all up to now, the checkpoint last: what it says is done is not done again."""
        history.save(self.folder / _HISTORY)
        self._save(kept)
        self._show(history)
        state = {**state, "fingerprint": self.fingerprint}
        write_checkpoint(self.folder, len(history.step), state, keep=self.keep)

    def close(self, history: History) -> None:
        """Write the record as it is in the end, however the run ended."""
        history.save(self.folder / _HISTORY)
        if self._events is not None:
            self._events.close()

    def _save(self, kept: Flow) -> None:
        """Write the flow to keep, or say once why it cannot be: the checkpoint has its weights."""
        try:
            save(kept, self.folder / _BEST)
        except (TypeError, ValueError) as error:
            if not self._has_warned:
                warn(
                    f"{str(self.folder / _BEST)!r} was not written, because {error} The "
                    "checkpoints hold its weights, and the run can resume."
                )
            self._has_warned = True

    def _refuse_to_overwrite(self) -> None:
        others = [file for name in (_HISTORY, _BEST, _EVENTS) for file in self.folder.glob(name)]
        present = [file.name for file in (*checkpoints_in(self.folder), *others)]
        if present:
            raise FileExistsError(
                f"{str(self.folder)!r} holds a run already ({', '.join(present[:3])}). Go on with "
                "it by resume=True, choose another folder, or move these files away."
            )

    def _remove_half_files(self) -> None:
        """Remove what a process that was killed while writing has left."""
        for name in (CHECKPOINTS, _HISTORY, _BEST):
            for half in self.folder.glob(f".{name}.*"):
                half.unlink()

    def _show(self, history: History) -> None:
        """Write the events since the last call; the first of a process begins from step 1."""
        if importlib.util.find_spec("tensorboard") is None:
            return
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            # Hides what a process that was killed wrote, perhaps up to a later step than this one.
            self._events = SummaryWriter(str(self.folder), purge_step=0)
        columns = history.columns
        steps = columns.pop("step")
        for row in range(self._rows_shown, len(steps)):
            for name, column in columns.items():
                if column[row] == column[row]:  # NaN stands for what was not measured
                    self._events.add_scalar(name, column[row], steps[row])
        self._rows_shown = len(steps)
        self._events.flush()
