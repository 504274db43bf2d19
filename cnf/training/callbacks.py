"""What `fit` calls after each step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cnf.flows.flow import Flow


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
