"""A CNF beside every discrete flow, at the same number of parameters.

Run as ``python -m experiments.compare``; ``--help`` lists the settings. Toy sets of the plane, a
table if one is named, and digits of 8 x 8 pixels. Each flow is trained with a cosine schedule, on
the same rows, for as many CPU-seconds at most, and keeps the weights that are best on validation
rows: the CNF by the recipe of `fit`, the others by maximum likelihood with Adam, with an average of
the weights, in as many steps as the seconds allow. Flows whose size is a number of components or
layers (gf, gmm, planar, radial) keep their default, as it would take thousands.

What the likelihood of each is in training (exact, an estimate or a bound) stands beside it;
residual flows are measured with exact log-determinants all the same. Times are CPU-seconds on one
thread. The round trip is the largest error of x -> z -> x in single precision, in standard
deviations of each feature, of what noise has made of x where that is whole numbers.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.files import write_text
from benchmarks.settings import check_counts
from benchmarks.timing import describe, machine, one_thread
from cnf import CNF, Flow, TrainingConfig, baselines, fit, recipe
from cnf.data.toy import TOY_NAMES
from cnf.training import TrainingError
from cnf.transforms import ExactLogDet, ResidualFlow
from experiments.compare_report import Result, draw, tables
from experiments.compare_tasks import Task, digits_task, table_task, toy_tasks

CNF_NAME = "cnf"
BASELINES = {baseline.name: baseline for baseline in baselines.names()}
KNOWN = (CNF_NAME, *BASELINES)
WIDTHS = ("hidden layers", "channels")
"""Sizes that are matched: it would take thousands of components or layers."""
ROUND_TRIPS = 1000
ROWS_AT_ONCE = 2000
WIDTHS_TRIED = range(4, 513, 4)
PARTS_OF_THE_RECIPE = (0.6, 0.4)
"""Parts of the seconds for matching and for likelihood, about as in the recipe without a limit."""
STEPS_TRIED = 20
"""To see how long a step takes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train a CNF and discrete flows of as many parameters, and compare what they are worth."""

    toy: tuple[str, ...] = ("8gaussians", "2spirals", "checkerboard")
    """Toy sets."""
    table: Path | None = None
    """A table of real numbers: an .npz file with x_train, x_val and x_test, or any other table."""
    digits: bool = True
    """Whether to compare on the digits of scikit-learn."""
    flows: tuple[str, ...] = KNOWN
    """Flows to compare: cnf, and baselines by name."""
    parameters: int = 50_000
    """About how many parameters each flow of networks has."""
    steps: int = 20_000
    """Most steps of maximum likelihood of the discrete flows; fewer if the seconds are over."""
    seconds: float = 60.0
    """CPU-seconds of training, validation included, after which it ends."""
    rows: int = 50_000
    """Rows of a toy set to train on."""
    held_out: int = 10_000
    """Rows to measure on, and to draw; of a table or digits, those of the test part."""
    timed: int = 10_000
    """Rows whose density is timed, and number of draws."""
    seed: int = 0
    """Seed of data, weights and training."""
    out: Path = Path("runs/compare")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "parameters", "steps", "rows", "held_out", "timed")
        for name, known in (("toy", TOY_NAMES), ("flows", KNOWN)):
            unknown = set(getattr(self, name)) - set(known)
            if unknown:
                raise ValueError(f"{name} must be among {known}; got {sorted(unknown)}.")
        if not (self.toy or self.table or self.digits):
            raise ValueError("there is nothing to compare on; name toy sets or a table, or digits.")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be more than 0; got {self.seconds}.")


def main(settings: Settings) -> list[Result]:
    """Train every flow on every task, print the tables, write them and the figure."""
    if settings.quick:
        settings = made_quick(settings)
    facts = machine()
    results: list[Result] = []
    left_out: list[str] = []
    drawn: dict[str, dict[str, Flow]] = {}
    with one_thread():
        for task in tasks(settings):
            for name in settings.flows:
                if name in BASELINES and BASELINES[name].images_alone and not task.dimensions:
                    continue
                try:
                    flow, result = measure(name, task, settings)
                except (ImportError, RuntimeError, ValueError) as reason:
                    left_out.append(f"{name} is left out of {task.name}: {reason}")
                    continue
                results.append(result)
                drawn.setdefault(task.name, {})[name] = flow
            written = "\n".join([*tables(results), *left_out, describe(facts)])
            write(results, written, facts, settings)
    toy = {name: flows for name, flows in drawn.items() if name in TOY_NAMES}
    if toy:
        draw(toy, settings.out / "figure.png", coarse=settings.quick)
    print(written)
    print(f"results in {settings.out}")
    return results


def write(results: list[Result], written: str, facts: dict[str, Any], settings: Settings) -> None:
    """Write what there is so far."""
    settings.out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": facts,
        "settings": asdict(settings),
        "results": list(map(asdict, results)),
    }
    write_text(settings.out / "results.json", json.dumps(content, indent=2, default=str))
    write_text(settings.out / "table.md", written)


def made_quick(settings: Settings) -> Settings:
    """The settings with little of everything, in a folder of their own."""
    return replace(
        settings,
        toy=settings.toy[:1],
        parameters=500,
        steps=5,
        seconds=0.1,
        rows=200,
        held_out=50,
        timed=20,
        out=settings.out / "quick",
    )


def tasks(settings: Settings) -> Iterable[Task]:
    """What there is to learn."""
    yield from toy_tasks(settings.toy, settings.rows, settings.held_out, settings.seed)
    if settings.table is not None:
        yield table_task(settings.table, settings.rows, settings.held_out)
    if settings.digits:
        yield digits_task(settings.rows, settings.held_out)


def measure(name: str, task: Task, settings: Settings) -> tuple[Flow, Result]:
    """Train one flow on one task, and measure it on one thread."""
    torch.manual_seed(settings.seed)
    flow = build(name, task, settings)
    started = time.process_time()
    train(flow, name, task, settings)
    trained = time.process_time()
    losses = task.loss(log_prob(with_exact_log_dets(flow), task.test, settings.seed))
    rows = task.test[torch.arange(settings.timed) % len(task.test)]
    result = Result(
        task=task.name,
        flow=name,
        parameters=sum(parameter.numel() for parameter in flow.parameters()),
        likelihood=flow.likelihood,
        loss=float(losses.mean()),
        standard_error=float(losses.std() / math.sqrt(len(losses))),
        unit=task.unit,
        training_seconds=trained - started,
        log_prob_seconds=cpu_seconds(lambda: log_prob(flow, rows, settings.seed)),
        sample_seconds=cpu_seconds(lambda: flow.sample(len(rows))),
        round_trip=round_trip(flow, task.test[:ROUND_TRIPS]),
    )
    print(f"{task.name}, {name}: {result.loss:.3f} {result.unit}", file=sys.stderr)
    return flow, result


def build(name: str, task: Task, settings: Settings) -> Flow:
    """A flow with about as many parameters as asked for, untrained."""
    shape = tuple(task.train.shape[1:])
    if name == CNF_NAME:
        flow: Flow = cnf_with(settings.parameters, math.prod(shape))
    else:
        parameters = settings.parameters if BASELINES[name].size_of in WIDTHS else None
        flow = baselines.build(name, shape if task.dimensions else shape[0], parameters=parameters)
        if task.dimensions:
            flow = Flow(flow.chain[1:], flow.base)  # the task flattens images itself
    return Flow([*task.transforms(), *flow.chain], flow.base)


def cnf_with(parameters: int, features: int) -> CNF:
    """The CNF of about as many parameters, with the depth of the default field, or two layers.

    Two layers, if a deeper field of the least width has more parameters than asked for. All hidden
    layers have one width.
    """

    def flow_with(width: int, depth: int) -> CNF:
        return CNF(features, hidden_features=(width,) * depth, standardize=False)  # the task does

    def count(width: int, depth: int) -> int:
        return sum(parameter.numel() for parameter in flow_with(width, depth).parameters())

    with torch.random.fork_rng(devices=[]):
        depth = len(CNF(features).transforms[-1].vector_field.hidden_features)
        if count(WIDTHS_TRIED[0], depth) > parameters:
            depth = 2
        counts = {width: count(width, depth) for width in WIDTHS_TRIED}
    most = counts[WIDTHS_TRIED[-1]]
    if parameters > most:
        raise ValueError(f"parameters must be at most {most} for {features} features.")
    return flow_with(min(counts, key=lambda width: abs(counts[width] - parameters)), depth)


def with_exact_log_dets(flow: Flow) -> Flow:
    """The same flow, where the log-determinants of residual blocks are estimates, without noise."""
    if flow.likelihood not in ("estimate", "biased_estimate"):
        return flow
    flow = deepcopy(flow)
    for part in flow.modules():
        if isinstance(part, ResidualFlow):
            part.log_det = ExactLogDet()
    return flow


def train(flow: Flow, name: str, task: Task, settings: Settings) -> None:
    """Train in place, until the time is over; the flow ends with its best weights."""
    started = time.process_time()
    phases: Sequence[TrainingConfig]
    if name == CNF_NAME:
        phases = [
            replace(phase, max_seconds=part * settings.seconds)
            for phase, part in zip(
                recipe(seed=settings.seed, progress=False), PARTS_OF_THE_RECIPE, strict=True
            )
        ]
    else:
        steps = affordable_steps(flow, task, settings)
        phases = [TrainingConfig(steps=steps, ema=0.99, seed=settings.seed, progress=False)]
    with contextlib.suppress(TrainingError):  # the best weights so far are judged
        fit(
            flow,
            task.train,
            phases,
            validation=task.validation,
            callbacks=[lambda _: time.process_time() - started > settings.seconds],
        )


def affordable_steps(flow: Flow, task: Task, settings: Settings) -> int:
    """How many steps of maximum likelihood the seconds are enough for, going by the first few."""
    flow = deepcopy(flow)
    trial = TrainingConfig(steps=STEPS_TRIED, learning_rate=1e-9, progress=False)
    seconds = cpu_seconds(lambda: fit(flow, task.train, trial, validation=task.validation))
    return min(settings.steps, max(1, int(STEPS_TRIED * settings.seconds / seconds)))


@torch.no_grad()
def log_prob(flow: Flow, x: Tensor, seed: int) -> Tensor:
    """Log-likelihoods of rows in nats."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([flow.log_prob(rows, generator=generator) for rows in x.split(ROWS_AT_ONCE)])


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


@torch.no_grad()
def round_trip(flow: Flow, x: Tensor) -> float:
    """The largest error of x -> z -> x, in standard deviations of each feature.

    From behind the last part that is no bijection, such as one that adds noise to whole numbers.
    """
    parts = flow.chain
    start = max((1 + i for i, part in enumerate(parts) if not part.is_bijective), default=0)
    rest = Flow(parts[start:], flow.base)
    try:
        if start:
            x = Flow(parts[:start]).to_base(x, generator=torch.Generator().manual_seed(0))
        back = rest.to_data(rest.to_base(x))
    except (RuntimeError, ValueError):  # what leaves the numbers that float32 has is refused
        return math.inf
    spread = x.std(0).clamp_min(torch.finfo(x.dtype).eps)
    return float(((back - x).abs() / spread).max())


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"compare: {error}")
