"""A run with everything that a checkpoint must keep; as a script, it kills it and resumes it.

``python tests/killable.py FOLDER=KILL,... ...`` trains for each FOLDER in child processes that die
by SIGKILL, as each KILL says: ``step:N`` after step N of the run, ``forward:N`` in the N-th
evaluation of the loss, ``write:N`` in the middle of the N-th file that it writes, ``after:S`` S
seconds after it started.
Then it lets a last child go through, and prints for each folder how the children ended.
"""

import importlib
import os
import signal
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import torch

from cnf import CNF, Checkpoints, Flow, History, Hutchinson, ODESolver, TrainingConfig, fit
from cnf.objectives import MaximumLikelihood

CHEAP = ODESolver(method="rk4", steps=1, gradient="backprop")


def phases() -> tuple[TrainingConfig, ...]:
    """With an average, with parts of a minibatch, and one that surely ends early, after 6 steps.

    That one learns so fast that its validations cannot but be worse, on any processor. So the run
    has 25 + 6 + 14 steps wherever it goes.
    """
    likelihood = partial(MaximumLikelihood, solver=CHEAP, random_end_time=0.1)
    common = partial(TrainingConfig, objective=likelihood, progress=False)
    return (
        common(
            steps=25,
            batch_size=15,
            learning_rate=0.01,
            ema=0.9,
            validate_every=4,
            accumulation_steps=2,
        ),
        common(
            steps=60,
            batch_size=20,
            learning_rate=0.2,
            schedule="constant",
            validate_every=3,
            patience=2,
            seed=1,
        ),
        common(
            steps=14,
            learning_rate=0.01,
            schedule="constant",
            ema=0.8,
            validate_every=5,
            accumulation_steps=3,
        ),
    )


def train(folder: Path, **settings: object) -> tuple[Flow, History]:
    """Train from the beginning, or from what is in the folder."""
    torch.manual_seed(0)
    x = torch.randn(60, 2) @ torch.tensor([[1.0, -0.8], [0.0, 0.5]])
    settings_of_flow = {"divergence": Hutchinson(), "solver": CHEAP, "standardize": False}
    settings_of_flow |= {"skip": False, "frequency": 4.0}  # one step would not solve the skip
    flow = CNF(2, hidden_features=(8, 8), **settings_of_flow)
    checkpoints = Checkpoints(folder=folder, every=7, keep=3)
    data = {"validation": x[:20] + 1, "checkpoints": checkpoints, "resume": True}
    with warnings.catch_warnings():  # one step is too coarse
        warnings.filterwarnings("ignore", "log_prob of the trained flow|a solver chosen by hand")
        history = fit(flow, x, phases(), **data, **settings)
    return flow, history


def die() -> None:
    """Leave as nothing that Python does could."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill: str) -> None:
    """Prepare to die at a moment."""
    kind, _, moment = kill.partition(":")
    seen = 0

    def count() -> bool:
        nonlocal seen
        seen += 1
        return seen == int(moment)

    if kind == "after":
        threading.Timer(float(moment), die).start()
    elif kind == "forward":
        loss = MaximumLikelihood._loss

        def deadly_loss(self: MaximumLikelihood, *given: object) -> object:
            if count():
                die()
            return loss(self, *given)

        MaximumLikelihood._loss = deadly_loss
    elif kind == "write":
        fsync = os.fsync

        def deadly_fsync(file: int) -> None:
            if count():
                os.ftruncate(file, os.fstat(file).st_size // 2)
                die()
            fsync(file)

        os.fsync = deadly_fsync


def child(folder: Path, kill: str | None) -> None:
    """Train until done or dead."""
    callbacks = []
    if kill is not None and kill.startswith("step:"):
        moment = int(kill.removeprefix("step:"))
        callbacks = [lambda report: die() if report.step == moment else None]
    elif kill is not None:
        arm(kill)
    flow, history = train(folder, callbacks=callbacks)
    columns = {name: column for name, column in history.columns.items() if name != "seconds"}
    torch.save({"flow": flow.state_dict(), "history": columns}, folder / "result")


def main(folder: Path, kills: list[str]) -> None:
    """Kill and resume."""
    for kill in (*kills, None):
        pid = os.fork()
        if pid == 0:
            try:
                child(folder, kill)
            finally:  # a child must not return to the caller
                os._exit(sys.exc_info()[0] is not None)
        _, status = os.waitpid(pid, 0)
        ended = "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        sys.stdout.write(f"{folder} {kill}: {ended}\n")
        sys.stdout.flush()  # or a child writes it once more


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    for slow in ("lightning_fabric", "torch.utils.tensorboard"):
        importlib.import_module(slow)  # once, and not in each child
    for argument in sys.argv[1:]:
        to, _, kills = argument.partition("=")
        main(Path(to), kills.split(","))
