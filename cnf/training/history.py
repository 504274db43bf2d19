"""The record of a training run, and what is reported after each step."""

import csv
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from cnf._files import as_path, write_atomically
from cnf.flows.flow import Flow
from cnf.plots import plot_training

if TYPE_CHECKING:
    import matplotlib.figure

WHOLE = ("step", "phase", "nfe")
"""The columns of whole numbers."""


@dataclass(repr=False)
class History:
    """One entry for each step, in every column.

    Example:
        >>> history = History()
        >>> history.append(step=1, loss=2.5, learning_rate=1e-3, nfe=14, seconds=0.1)
        >>> history.loss
        [2.5]
    """

    step: list[int] = field(default_factory=list)
    """Steps taken, from 1, over all phases."""
    phase: list[int] = field(default_factory=list)
    """Phase of training that the step belongs to, from 1."""
    loss: list[float] = field(default_factory=list)
    """Loss of the minibatch by the objective of the phase, before the step."""
    learning_rate: list[float] = field(default_factory=list)
    """Learning rate of the step."""
    nfe: list[int] = field(default_factory=list)
    """Vector-field evaluations of the step, forward and backward, over all parts of its
    minibatch."""
    seconds: list[float] = field(default_factory=list)
    """Wall-clock time since the start of training, validation included, without that between an
    interruption and the resumption from a checkpoint."""
    validation: list[float] = field(default_factory=list)
    """Negative log-likelihood of the validation data after the step, in nats; NaN if not taken."""

    def __repr__(self) -> str:
        last = f", loss {self.loss[-1]:.4f}" if self.loss else ""
        return f"{type(self).__name__}({len(self.step)} steps{last})"

    def append(
        self,
        *,
        step: int,
        loss: float,
        learning_rate: float,
        nfe: int,
        seconds: float,
        phase: int = 1,
        validation: float = math.nan,
    ) -> None:
        """Add a step."""
        row = (step, phase, loss, learning_rate, nfe, seconds, validation)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The columns by name."""
        return {column.name: getattr(self, column.name) for column in fields(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the columns as CSV, atomically.

        Raises:
            OSError: If the file cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(zip(*self.columns.values(), strict=True))
        write_atomically(path, text.getvalue().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "History":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file was not written by `save`, or is damaged.
        """
        history = cls()
        with as_path("path", path).open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != list(history.columns):
                raise ValueError(
                    f"{str(path)!r} must have the columns {', '.join(history.columns)}; "
                    f"got {reader.fieldnames}."
                )
            try:
                for row in reader:
                    if None in row:  # what DictReader calls cells beyond the columns
                        raise ValueError(f"it has more than {len(history.columns)} cells")
                    for name, column in history.columns.items():
                        column.append((int if name in WHOLE else float)(row[name]))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{str(path)!r} is damaged in line {reader.line_num} ({error}). "
                    "Restore it from a copy."
                ) from error
        return history

    def plot(self) -> "matplotlib.figure.Figure":
        """Loss and validation against the step."""
        return plot_training(self.columns)


@dataclass(frozen=True)
class StepReport:
    """What a callback is told."""

    phase: int
    """Number of the phase, from 1."""
    step: int
    """Steps taken, from 1, over all phases."""
    row: Mapping[str, int | float]
    """The entry of the step in the `History`: a number for each column."""
    flow: Flow
    """The flow after the step, averaged if the phase has `ema`: to look at, not to change."""


@runtime_checkable
class Callback(Protocol):
    """Any callable of this form.

    It is called after each step, after the validation and before the checkpoint if they are due;
    among several processes in the first one only.

    Example:
        >>> def stop_when_slow(report: StepReport) -> bool:
        ...     return report.row["nfe"] > 1000
    """

    def __call__(self, report: StepReport, /) -> bool | None:
        """Look at the step; True ends the training, as if this had been its last step.

        The last step is validated, also where none was due.

        An error passes through `fit`, with the weights kept as for an interruption from the
        keyboard.
        """
