"""What each process does that torchrun starts for `test_distributed.py`; see `main`."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from cnf import CNF, Checkpoints, Flow, History, Hutchinson, ODESolver, TrainingConfig, fit
from cnf.objectives import MaximumLikelihood
from cnf.training import StepReport, TrainingError

RANK = int(os.environ.get("RANK", "0"))
SOLVER = ODESolver(method="rk4", steps=4, gradient="backprop")


def train(folder: Path | None, *, parts: int = 1, **settings: object) -> tuple[Flow, History]:
    """Train on rows with contexts, of which 41 are held out; the initial weights are of rank 0."""
    torch.manual_seed(RANK)
    noise = torch.Generator().manual_seed(0)
    x, context = torch.randn(100, 2, generator=noise), torch.randn(100, 1, generator=noise)
    flow = CNF(2, 1, hidden_features=(8, 8), solver=SOLVER)
    likelihood = partial(MaximumLikelihood, solver=SOLVER, divergence=Hutchinson())
    common = partial(
        TrainingConfig,
        objective=likelihood,
        batch_size=30,
        accumulation_steps=parts,
        progress=False,
    )
    history = fit(
        flow,
        (x + context, context),
        (common(steps=12, ema=0.8, validate_every=5), common(steps=10, validate_every=2)),
        validation=(x[:41] + 1, context[:41]),
        checkpoints=None if folder is None else Checkpoints(folder=folder, every=4),
        **{"resume": folder is not None, **settings},
    )
    return flow, history


class FailsInOne(MaximumLikelihood):
    """Goes wrong in the process of rank 1 alone, at its third call."""

    calls = 0

    def _loss(self, *given: object) -> torch.Tensor:
        """The loss, or an error."""
        self.calls += 1
        if RANK == 1 and self.calls == 3:
            self.solver = ODESolver(max_evaluations=1)
        return super()._loss(*given)


def failure() -> list[object]:
    """The message and record of a run that fails in one process, and the weights it leaves."""
    torch.manual_seed(0)
    flow = CNF(2, hidden_features=(4, 4))
    config = TrainingConfig(steps=5, batch_size=10, progress=False)
    try:
        fit(FailsInOne(flow, solver=SOLVER), torch.randn(20, 2), config, validation=None)
    except TrainingError as error:
        return [str(error), error.history.loss, flow.state_dict()]
    return ["no error", [], {}]


def refusal(folder: Path) -> str:
    """The message of a second run in the same folder, which only rank 0 can see."""
    try:
        train(folder, resume=False)
    except FileExistsError as error:
        return str(error)
    return "no error"


def killed(report: StepReport) -> None:
    """Die at a step of the second phase, as nothing that Python does could."""
    if report.step == 18:
        os.kill(os.getpid(), signal.SIGKILL)


def steps_of_a_budget() -> int:
    """The steps of a budget of 4.5 s by the clock of rank 0; the other clock is faster."""
    clock = time.perf_counter
    seconds = iter(range(10**6))
    time.perf_counter = lambda: next(seconds) * (1 + 2 * RANK)
    try:
        config = TrainingConfig(steps=500, batch_size=10, max_seconds=4.5, progress=False)
        return len(fit(CNF(2, solver=SOLVER), torch.randn(20, 2), config, validation=None).step)
    finally:
        time.perf_counter = clock


def told(flow: Flow, history: History) -> dict[str, object]:
    """What a run ended with."""
    columns = {name: column for name, column in history.columns.items() if name != "seconds"}
    return {"flow": flow.state_dict(), "history": columns}


def main(what: str, folder: Path) -> None:
    """Begin to train and be killed, or resume; and tell what came of it in a file per rank."""
    writes = 0
    fsync = os.fsync

    def counted(file: int) -> None:
        nonlocal writes
        writes += 1
        fsync(file)

    os.fsync = counted
    if what == "killed":
        train(folder / "run", callbacks=[killed])
    resumed = told(*train(folder / "run"))
    result = told(*train(folder / "whole"))
    result |= {"resumed": resumed, "writes": writes}
    result["refusal"] = refusal(folder / "run")
    result["failure"] = failure()
    stopped = train(None, callbacks=[lambda report: report.step == 3])[1]
    result["steps until stopped"] = len(stopped.step)
    result["steps of a budget"] = steps_of_a_budget()
    torch.save(result, folder / f"{what}{RANK}")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
