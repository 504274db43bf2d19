"""Training run: phases, history, checkpoints and the best weights."""

import contextlib
import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cnf._checks import NotFiniteError
from cnf.flows.flow import Flow
from cnf.flows.unnormalized.target import TargetError
from cnf.objectives import Objective
from cnf.ode import ODEError
from cnf.training.checkpoint import Checkpoints, RunFolder, check_form
from cnf.training.config import TrainingConfig
from cnf.training.data import TrainingData
from cnf.training.distributed import OtherProcessError, Processes
from cnf.training.fingerprint import fingerprint
from cnf.training.history import WHOLE, Callback, History, StepReport
from cnf.training.phase import Phase, check_finite, copy_of_tensors, kept_of
from cnf.training.phases import Plan
from cnf.training.validation import validation_loss

_FAILURES = (NotFiniteError, ODEError, OtherProcessError, TargetError)


class TrainingError(RuntimeError):
    """Training stopped because a loss, gradient or target was not finite, or a solve failed.

    The flow holds the weights of the best validation or, without validation, the last weights with
    a finite loss and gradient; `history` holds the steps before the failed one.
    """

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message, history)  # all arguments, so that it can be pickled
        self.history = history

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(eq=False)
class Run:
    """Training run: one call of `fit`."""

    plan: Plan
    flow: Flow
    rows: TrainingData | None
    validation: TrainingData | None
    processes: Processes
    callbacks: Sequence[Callback]
    folder: RunFolder | None = None
    history: History = field(default_factory=History)
    finished_phases: int = 0
    phase: Phase | None = None
    best: dict[str, Tensor] | None = None
    best_nll: float = math.inf
    stopped: bool = False
    started: float = 0.0

    def keep_in(self, checkpoints: Checkpoints, *, resume: bool) -> None:
        """Write checkpoints to a folder; with `resume`, load the run in it if there is one."""
        told = fingerprint(self.plan, self.flow, self.rows, self.validation, self.processes)
        folder = self.folder = RunFolder(checkpoints, told)
        found = self.processes.from_first(lambda: folder.open(resume=resume))
        if found is None:
            return
        file, state = found
        try:
            self._load_state_dict(state)
        except Exception as error:  # a crafted file makes torch raise anything
            raise ValueError(
                f"{str(file)!r} holds no state of this run ({str(error) or error!r}). Restore it "
                "from a copy, or remove it to go on from the one before."
            ) from error

    def go(self) -> None:
        """Train, and leave the weights to keep in the flow, also after an error."""
        seconds_before = self.history.seconds[-1] if self.history.seconds else 0.0
        self.started = time.perf_counter() - seconds_before
        if self.best is None and not self.history.step:
            self._validate_start()
        try:
            if self.finished_phases < len(self.plan):
                while self.finished_phases < len(self.plan):
                    self._go_through(self.phase or self._begin())
                self._write_checkpoint()
        finally:
            self._kept.load_state_dict(self._weights_to_keep())
            for objective, _ in self.plan:
                objective.zero_grad()
            if self.folder is not None and self.processes.is_first:
                self.folder.close(self.history)

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint, after checks of its whole form."""
        self._check_numbers(state)
        history = _history_of(state["history"])
        self.finished_phases = state["finished_phases"]
        check_form("its objective", state["objective"], self._objective.state_dict())
        if state["best"] is not None:
            check_form("its best weights", state["best"], self._kept.state_dict())
        if state["phase"] is not None:
            self._begin().check_state(state["phase"])
        self.history = history
        self.best, self.best_nll = state["best"], state["best_nll"]
        self.stopped = state["stopped"]
        self._objective.load_state_dict(state["objective"])
        if self.phase is not None:
            self.phase.load_state_dict(state["phase"])

    def _check_numbers(self, state: dict[str, Any]) -> None:
        plain = {"finished_phases": 0, "best_nll": 0.0, "stopped": False}
        check_form("its progress", {name: state.get(name) for name in plain}, plain)
        if not 0 <= state["finished_phases"] <= len(self.plan) - (state["phase"] is not None):
            raise ValueError(f"{state['finished_phases']} of its {len(self.plan)} phases are over")
        if math.isnan(state["best_nll"]):
            raise ValueError("its best validation is NaN")

    def _state_dict(self) -> dict[str, Any]:
        """Return the state of the run for a checkpoint."""
        return {
            "history": {name: _as_tensor(column) for name, column in self.history.columns.items()},
            "finished_phases": self.finished_phases,
            "best": self.best,
            "best_nll": self.best_nll,
            "stopped": self.stopped,
            "objective": self._objective.state_dict(),
            "phase": None if self.phase is None else self.phase.state_dict(),
        }

    @property
    def _objective(self) -> Objective:
        """Objective of the running phase, or of the last one."""
        return self.plan[min(self.finished_phases, len(self.plan) - 1)][0]

    @property
    def _kept(self) -> Flow | Objective:
        """The flow, or all of the objective: validated, and left at its best."""
        return kept_of(self._objective)

    def _begin(self) -> Phase:
        objective, config = self.plan[self.finished_phases]
        number = self.finished_phases + 1
        self.phase = Phase(objective, self.flow, config, number, self.rows, self.processes)
        return self.phase

    def _go_through(self, phase: Phase) -> None:
        """Take the steps of a phase, and leave the initial weights of the next one in the flow."""
        hidden = not (phase.config.progress and self.processes.is_first)
        with tqdm(total=phase.config.steps, initial=phase.step, disable=hidden, unit="step") as bar:
            while not (phase.is_over or self.stopped):
                self._take_step(phase, bar)
        keep_best = phase.is_out_of_patience
        weights = self._weights_to_keep() if keep_best else copy_of_tensors(phase.result)
        self._kept.load_state_dict(weights)
        self.finished_phases = len(self.plan) if self.stopped else phase.number
        self.phase = None

    def _take_step(self, phase: Phase, bar: tqdm) -> None:
        with self._keeping_good_weights(phase):
            entry = phase.advance()
            nll = self._validate(phase) if phase.is_validated else math.nan
        step = len(self.history.step) + 1
        seconds = time.perf_counter() - self.started
        self.history.append(step=step, phase=phase.number, **entry, seconds=seconds, validation=nll)
        bar.set_description(f"loss {entry['loss']:.4f}, nfe {entry['nfe']}", refresh=False)
        if not math.isnan(nll):
            bar.set_postfix_str(f"validation {nll:.4f}", refresh=False)
        bar.update()
        self.stopped = self._is_told_to_stop(phase)
        if self.stopped and not phase.is_validated:
            with self._keeping_good_weights(phase):
                self.history.validation[-1] = self._validate(phase)
        # Last, so that nothing of this step is left to do when the run resumes.
        if self.folder is not None and step % self.folder.every == 0:
            self._write_checkpoint()

    def _validate(self, phase: Phase) -> float:
        """Return the loss of validation data, or NaN; keep the best weights."""
        if self.validation is None:
            return math.nan
        nll = validation_loss(phase.result, self.validation, self.processes)
        check_finite("validation loss", nll)
        if nll < self.best_nll:
            self.best, self.best_nll = copy_of_tensors(phase.result), nll
        before = [past for past in self.history.validation if not math.isnan(past)]
        phase.stale_validations = (
            0 if nll < min(before, default=math.inf) else (phase.stale_validations + 1)
        )
        return nll

    def _validate_start(self) -> None:
        """Count the initial weights among those to keep, if their loss is finite.

        They do not count for early stopping: training by another objective may begin below them.
        """
        if self.validation is None:
            return
        with contextlib.suppress(*_FAILURES):
            nll = validation_loss(self._kept, self.validation, self.processes)
            if math.isfinite(nll):
                self.best, self.best_nll = copy_of_tensors(self._kept), nll

    def _is_told_to_stop(self, phase: Phase) -> bool:
        if not self.callbacks:
            return False
        row = {name: column[-1] for name, column in self.history.columns.items()}
        report = StepReport(
            phase.number, row["step"], MappingProxyType(row), _flow_of(phase.result)
        )
        return self.processes.from_first(
            lambda: True in [bool(callback(report)) for callback in self.callbacks]
        )

    def _weights_to_keep(self) -> dict[str, Tensor]:
        """Return the best weights or, without validation, the present ones."""
        return self.best or copy_of_tensors(self._kept if self.phase is None else self.phase.result)

    def _write_checkpoint(self) -> None:
        folder = self.folder
        if folder is not None:
            kept = copy.deepcopy(self._kept)
            kept.load_state_dict(self._weights_to_keep())
            best = _flow_of(kept)
            self.processes.from_first(lambda: folder.write(self._state_dict(), self.history, best))

    @contextlib.contextmanager
    def _keeping_good_weights(self, phase: Phase) -> Iterator[None]:
        """Restore the last good weights in the flow if the step fails."""
        try:
            yield
        except Exception as error:
            phase.fall_back()
            if not isinstance(error, _FAILURES):
                raise
            place = f"step {phase.step} of {phase.config.steps}"
            if len(self.plan) > 1:
                place += f" of phase {phase.number}"
            raise TrainingError(
                f"training stopped at {place}: {str(error).rstrip('.')}. The flow keeps its best "
                f"or last good weights. Objective: {type(phase.objective).__name__}. Settings: "
                f"{_in_words(phase.config)}. Try a lower learning_rate, a smaller gradient_clip "
                "or a tighter tolerance, and look for outliers in the data.",
                self.history,
            ) from error


def _flow_of(kept: nn.Module) -> Flow:
    """Return the flow, which may be in its objective."""
    return kept.flow if isinstance(kept, Objective) else cast(Flow, kept)


def _in_words(config: TrainingConfig) -> str:
    """Describe the settings but the objective, which may not come from them."""
    names = [setting.name for setting in fields(config) if setting.name != "objective"]
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in names)


def _history_of(columns: dict[str, Tensor]) -> History:
    """Return the history from the tensors of a checkpoint."""
    steps = len(columns["step"])
    whole, real = torch.empty(steps, dtype=torch.int64), torch.empty(steps, dtype=torch.float64)
    expected = {name: whole if steps == 0 or name in WHOLE else real for name in History().columns}
    check_form("its record", columns, expected)
    return History(**{name: column.tolist() for name, column in columns.items()})


def _as_tensor(column: Sequence[int] | Sequence[float]) -> Tensor:
    whole = all(isinstance(value, int) for value in column)
    return torch.tensor(column, dtype=torch.int64 if whole else torch.float64)
