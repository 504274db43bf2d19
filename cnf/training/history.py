"""History of a training run, and callbacks."""

import csv
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

from cnf._files import as_path, write_atomically
from cnf.flows.flow import Flow
from cnf.plots import plot_training
from cnf.plots.figures import Figure

WHOLE = ("step", "phase", "nfe")
"""Columns of whole numbers."""


@dataclass(repr=False)
class History:
    """History of a training run: columns with one entry for each step.

    Example:
        >>> history = History()
        >>> history.append(step=1, loss=2.5, learning_rate=1e-3, nfe=14, seconds=0.1)
        >>> history.loss
        [2.5]
    """

    step: list[int] = field(default_factory=list)
    """Steps taken, from 1, over all phases."""
    phase: list[int] = field(default_factory=list)
    """Phase of the step, from 1."""
    loss: list[float] = field(default_factory=list)
    """Loss of the minibatch before the step, by the objective of the phase."""
    learning_rate: list[float] = field(default_factory=list)
    """Learning rate of the step."""
    nfe: list[int] = field(default_factory=list)
    """Vector-field evaluations of the step, forward and backward, over the whole minibatch."""
    seconds: list[float] = field(default_factory=list)
    """Wall-clock time since the start of training, with validation, without interruptions."""
    validation: list[float] = field(default_factory=list)
    """Negative log-likelihood of the validation data after the step, in nats, or NaN; the loss of
    an objective that is kept whole."""

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
        """Columns by name."""
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
        """Read the file that `save` wrote.

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
                    if None in row:  # the key of DictReader for cells beyond the columns
                        raise ValueError(f"it has more than {len(history.columns)} cells")
                    for name, column in history.columns.items():
                        column.append((int if name in WHOLE else float)(row[name]))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{str(path)!r} is damaged in line {reader.line_num} ({error}). "
                    "Restore it from a copy."
                ) from error
        return history

    def plot(self) -> Figure:
        """Plot loss and validation against the step."""
        return plot_training(self.columns)


@dataclass(frozen=True)
class StepReport:
    """Argument of a callback: a step of training."""

    phase: int
    """Number of the phase, from 1."""
    step: int
    """Steps taken, from 1, over all phases."""
    row: Mapping[str, int | float]
    """Entry of the step in the `History`: a number for each column."""
    flow: Flow
    """Flow after the step, averaged if the phase has `ema`; not to be changed."""


@runtime_checkable
class Callback(Protocol):
    """Callable that `fit` calls after each step, and may stop the training.

    It is called after a validation and before a checkpoint; of several processes, in the first
    only.

    Example:
        >>> def stop_when_slow(report: StepReport) -> bool:
        ...     return report.row["nfe"] > 1000
    """

    def __call__(self, report: StepReport, /) -> bool | None:
        """Return True to end the training; this step is then validated, as the last one.

        An error passes through `fit`, which keeps the weights as after an interruption from the
        keyboard.
        """
