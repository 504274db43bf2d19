"""Run an ablation: train, measure and keep every flow, and go on where it was stopped."""

import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cnf._building import Building
from cnf._files import write_atomically
from cnf.ablation.outcome import Outcome, Run, measure
from cnf.ablation.penalties import check_penalty
from cnf.ablation.settings import AblationSettings, Training, parts_of
from cnf.data.degeneracy import DegenerateDataWarning
from cnf.flows.cnf import CNF
from cnf.flows.flow import Flow
from cnf.objectives import MaximumLikelihood
from cnf.ode import ODEError
from cnf.saving import load, save
from cnf.tables.fit import TableRows
from cnf.training import TrainingConfig, TrainingError, fit
from cnf.transforms import Standardize
from cnf.transforms.continuous import ContinuousTransform

_FEW_ROWS = 4


def ablate(
    rows: TableRows,
    held_out: TableRows,
    settings: AblationSettings,
    folder: Path,
    *,
    replace: bool = False,
    progress: bool = False,
) -> Iterator[Outcome]:
    """Train flows with and without penalties; yield what each buys and costs, one by one.

    A flow is trained in float32 on all rows, and keeps its last weights; it is then calibrated and
    measured in float64. With one training, all penalties start from the same matched flow, and the
    same seed. Each flow is kept in the folder with its outcome, so that an ablation that was
    stopped goes on after its last finished training.

    Args:
        rows: Training rows, in random order: the first 1000 calibrate the flows.
        held_out: Rows to measure at.
        settings: Settings.
        folder: Folder of the flows and outcomes; made if it is missing.
        replace: Whether to replace outcomes of other settings or data in the folder.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If a penalty does not return a finite rate for each row, or the folder holds
            outcomes of other settings or data.

    Example:
        >>> import tempfile, torch
        >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> settings = AblationSettings(trainings=["scratch"], penalties=["kinetic"]).quick()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = list(ablate(TableRows(x[10:]), TableRows(x[:10]), settings, Path(folder)))
        >>> [str(outcome.run) for outcome in found]
        ['scratch, none', 'scratch, kinetic 0.01']
    """
    study = _Study(rows, held_out, settings, folder, progress=progress)
    runs = [
        Run(training=training, penalty=penalty, strength=strength)
        for training in settings.trainings
        for penalty, strength in settings.variants
    ]
    study.check_penalties()
    folder.mkdir(parents=True, exist_ok=True)
    found = {run: study.kept(str(run), replace=replace) for run in runs}
    for run, kept in found.items():
        if kept is None:
            yield study.train_and_keep(run, replace=replace)
        else:
            yield Outcome(**{**kept, "run": run})


class _Study:
    """Rows, settings and folder of an ablation."""

    def __init__(
        self,
        rows: TableRows,
        held_out: TableRows,
        settings: AblationSettings,
        folder: Path,
        *,
        progress: bool,
    ) -> None:
        self.rows, self.held_out, self.settings, self.folder = rows, held_out, settings, folder
        self.progress = progress
        self.scaling = Standardize.from_data(rows.x)
        self.training_data = {"x": self.scaling.to_base(rows.x).float()}
        if rows.context is not None:
            self.training_data["context"] = rows.context.float()
        self.penalties = {
            name: part for each in settings.penalties for name, part in parts_of(each).items()
        }
        ignored = ("penalties", "strengths", "trainings")
        self.identity = {
            **{
                name: value
                for name, value in dataclasses.asdict(settings).items()
                if name not in ignored
            },
            "data": _digest(*rows[:2], *held_out[:2]),
        }

    def check_penalties(self) -> None:
        """Refuse penalties that would fail after the matching phase."""
        few = {name: part[:_FEW_ROWS] for name, part in self.training_data.items()}
        (transform,) = self._new_flow(skip=True).transforms
        assert isinstance(transform, ContinuousTransform)  # noqa: S101 - for mypy
        for name, penalty in self.penalties.items():
            check_penalty(name, penalty, transform.vector_field, few["x"], few.get("context"))

    def train_and_keep(self, run: Run, *, replace: bool) -> Outcome:
        """Train, measure and keep one flow with its outcome."""
        parts = parts_of(run.penalty)
        try:
            flow, phases, seconds = self._start(run.training, replace=replace)
            *_, likelihood = phases
            weights = dict.fromkeys(parts.values(), run.strength)
            objective = partial(MaximumLikelihood, regularizers=weights)
            seconds += self._fit(flow, dataclasses.replace(likelihood, objective=objective))
            whole = Flow([self.scaling, *flow.double().transforms])
            outcome = measure(
                run,
                whole,
                self.rows,
                self.held_out,
                self.penalties,
                accuracy=self.settings.accuracy,
                seconds=seconds,
            )
            save(whole, self._path(str(run), ".safetensors"))
        except (ODEError, TrainingError) as error:
            outcome = Outcome(run=run, failure=str(error))
        self._keep(str(run), dataclasses.asdict(outcome))
        return outcome

    def _start(
        self, training: Training, *, replace: bool
    ) -> tuple[Flow, list[TrainingConfig], float]:
        """Return the flow that the likelihood phase starts from, the phases, and CPU seconds."""
        phases = self.settings.configs(training, len(self.rows.x), progress=self.progress)
        if training == "scratch":
            return self._new_flow(skip=False), phases, 0.0
        name = f"{training}, matched"
        path = self._path(name, ".safetensors")
        kept = self.kept(name, replace=replace)
        if kept is None or not path.is_file():
            flow = self._new_flow(skip=True)
            kept = {"seconds": self._fit(flow, phases[0])}
            save(flow, path)
            self._keep(name, kept)
        return load(path), phases, kept["seconds"]

    def _new_flow(self, *, skip: bool) -> Flow:
        context = self.rows.context
        with Building(seed=self.settings.seed):
            network = CNF(
                self.rows.x.shape[-1],
                0 if context is None else context.shape[-1],
                hidden_features=self.settings.hidden_features,
                skip=skip,
            )
        return Flow(network.transforms[1:]).float()  # rows are standardised in float64

    def _fit(self, flow: Flow, config: TrainingConfig) -> float:
        """Train a flow in one phase; return the CPU time in seconds."""
        started = time.process_time()
        with warnings.catch_warnings():  # of the same rows for each training
            warnings.simplefilter("ignore", DegenerateDataWarning)
            fit(flow, self.training_data, config, validation=None, accuracy=None)
        return time.process_time() - started

    def _path(self, name: str, suffix: str) -> Path:
        plain = name.replace(", ", "_").replace(":", ".").replace(" ", "_")
        return self.folder / f"{plain}{suffix}"

    def kept(self, name: str, *, replace: bool) -> dict[str, Any] | None:
        """Return the kept outcome of a training; None if there is none."""
        path = self._path(name, ".json")
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_bytes())
            if found["identity"] == json.loads(json.dumps(self.identity)):
                outcome: dict[str, Any] = found["outcome"]
                return outcome
        except (KeyError, TypeError, ValueError):  # damaged
            pass
        if replace:
            return None
        raise ValueError(
            f"{str(path)!r} is of other data or settings, or damaged. Choose another folder, or "
            "replace it by replace=True."
        )

    def _keep(self, name: str, outcome: Mapping[str, Any]) -> None:
        text = json.dumps({"identity": self.identity, "outcome": outcome}, indent=1)
        write_atomically(self._path(name, ".json"), text.encode())


def _digest(*parts: Tensor | None) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(b"" if part is None else str(tuple(part.shape)).encode())
        found.update(b"" if part is None else part.contiguous().numpy().tobytes())
    return found.hexdigest()
