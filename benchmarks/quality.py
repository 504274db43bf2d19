"""How long each way of training takes to come near the truth, on FFJORD's eight toy sets.

Run as ``python -m benchmarks.quality``; ``--help`` lists the settings. Claim: the default recipe,
`fit` with nothing but a flow and data, comes within 0.05 nats of the truth on average over the
sets, and within 0.12 on each, in 60 CPU-seconds on one thread, and reaches the negative
log-likelihoods of FFJORD's reference code after 385 CPU-seconds at least 100 times sooner.

All ways see the same rows. At set times of training, while the clock of CPU time stands still, the
exact log-density of held-out rows is taken from the ODE at tolerance 1e-5, and compared with the
truth row by row. A gap counts as reached at the first of these times at which it is.
``python -m benchmarks.quality --jobs 2`` trains two at a time, each on one thread.
"""

import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.peers import OURS, LogProb, ways
from benchmarks.settings import check_counts
from benchmarks.timing import describe, machine, markdown, one_thread, report
from cnf.data.toy import TOY_NAMES, ToyDensity, toy_density

GAPS = (0.5, 0.2, 0.1, 0.05)
"""Kullback-Leibler divergences from the truth, in nats, the times to which are reported."""
FFJORD_SECONDS = 385.0
FFJORD_NLL = {"8gaussians": 2.98, "2spirals": 3.21, "checkerboard": 3.84}
"""Held-out negative log-likelihoods, in nats, of FFJORD's reference code after about 385
CPU-seconds: measured once, on the machine on which the table in the docs was made."""
_LOOKS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 45.0)
_ROWS_AT_ONCE = 2000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long each way of training takes to come near the truth, on FFJORD's eight toy sets."""

    data: tuple[str, ...] = TOY_NAMES
    """Toy sets."""
    ways: tuple[str, ...] = tuple(ways())
    """Ways of training: those whose libraries are installed."""
    seconds: float = 60.0
    """CPU time of ours; the last look is taken when training ends, by itself or here."""
    peer_seconds: float = 60.0
    """CPU time of the others, likewise."""
    seeds: int = 3
    """Number of seeds."""
    rows: int = 50_000
    """Rows to train on."""
    held_out: int = 10_000
    """Rows to measure on in the end."""
    held_out_before: int = 2000
    """Rows to measure on before."""
    jobs: int = 1
    """Trainings at a time."""
    out: Path = Path("runs/benchmarks/quality")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "rows", "held_out", "held_out_before", "jobs")
        for name, known in (("data", TOY_NAMES), ("ways", tuple(ways()))):
            unknown = set(getattr(self, name)) - set(known)
            if unknown:
                raise ValueError(f"{name} must be among {known}; got {sorted(unknown)}.")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training."""

    way: str
    data: str
    seed: int


class Stopwatch:
    """CPU time of a training, and what its density is worth at set times; see `peers.Clock`."""

    def __init__(
        self, truth: ToyDensity, held_out: torch.Tensor, seconds: float, *, rows_before: int
    ) -> None:
        self.entropy = truth.entropy()
        self.held_out = held_out
        self.log_truth = truth.log_prob(held_out).double()
        self.rows_before = rows_before
        self.looks = [look for look in _LOOKS if look < seconds]
        self.seconds = seconds
        self.record: list[dict[str, float]] = []
        self.steps = 0
        self._paused = 0.0
        self._started = time.process_time()
        self._last: LogProb | None = None

    @property
    def elapsed(self) -> float:
        """CPU-seconds of training."""
        return time.process_time() - self._started - self._paused

    def __call__(self, log_prob: LogProb) -> bool:
        """Look if it is time to; True once the time is over."""
        self.steps += 1
        self._last = log_prob
        elapsed = self.elapsed
        if elapsed >= self.seconds:
            return True
        if self.looks and elapsed >= self.looks[0]:
            self.looks = [look for look in self.looks if look > elapsed]
            self.look(log_prob, self.rows_before)
        return False

    def finish(self) -> None:
        """Take the last look."""
        if self._last is not None:
            self.look(self._last, len(self.held_out))

    @torch.no_grad()
    def look(self, log_prob: LogProb, rows: int) -> None:
        """Measure the density on the first rows, while the clock stands still."""
        elapsed, paused = self.elapsed, time.process_time()
        chunks = self.held_out[:rows].split(_ROWS_AT_ONCE)
        log_model = torch.cat([log_prob(chunk).double() for chunk in chunks])
        gap = float((self.log_truth[:rows] - log_model).mean())
        entry = {"seconds": elapsed, "steps": self.steps, "nll": self.entropy + gap, "gap": gap}
        self.record.append(entry)
        self._paused += time.process_time() - paused


def main(settings: Settings) -> dict[str, Any]:
    """Train in every way on every set, print the tables and write them; returns what is written."""
    if settings.quick:
        settings = replace(
            settings,
            data=("8gaussians",),
            seconds=0.1,
            peer_seconds=0.1,
            seeds=1,
            rows=200,
            held_out=50,
        )
    facts = machine()
    tasks = [
        Task(way=way, data=data, seed=seed)
        for seed, data, way in itertools.product(
            range(settings.seeds), settings.data, settings.ways
        )
    ]
    work = [(task, settings) for task in tasks]
    if settings.jobs == 1:
        runs = list(itertools.starmap(measure, work))
    else:
        jobs = min(settings.jobs, len(work))
        with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
            runs = pool.starmap(measure, work, chunksize=1)
    content = {"machine": facts, "settings": asdict(settings), "runs": runs}
    report(settings.out, content, "\n".join([*tables(runs, settings), describe(facts)]))
    return content


def measure(task: Task, settings: Settings) -> dict[str, Any]:
    """One training, with what its density was worth on the way."""
    truth = toy_density(task.data)
    generator = torch.Generator().manual_seed(task.seed)
    x = truth.sample(settings.rows, generator=generator)
    held_out = truth.sample(settings.held_out, generator=generator)
    way = ways()[task.way]
    with one_thread():
        way(x, task.seed, lambda _: True)  # what is imported and set up at first use
        seconds = settings.seconds if task.way == OURS else settings.peer_seconds
        watch = Stopwatch(truth, held_out, seconds, rows_before=settings.held_out_before)
        way(x, task.seed, watch)
        watch.finish()
    last = watch.record[-1]
    print(f"{task.way}, {task.data}, seed {task.seed}: {last['gap']:.3f}", file=sys.stderr)
    return {**asdict(task), "record": watch.record}


def tables(runs: Sequence[dict[str, Any]], settings: Settings) -> list[str]:
    """The gap at the end, the times to given gaps, and the times to FFJORD's likelihoods."""
    made = [
        f"Gap to the truth in nats after at most {settings.seconds:g} CPU-seconds (others "
        f"{settings.peer_seconds:g}), median over {settings.seeds} seeds:\n\n"
        + end_table(runs, settings),
        "CPU-seconds to a gap, median over seeds; a dash where most seeds did not reach it:"
        "\n\n" + gap_table(runs, settings),
    ]
    if FFJORD_NLL.keys() & set(settings.data):
        made.append(
            f"CPU-seconds to what FFJORD's reference code reached in {FFJORD_SECONDS:g}, and in "
            "brackets how many times sooner that is; median over seeds:\n\n"
            + ffjord_table(runs, settings)
        )
    return made


def end_table(runs: Sequence[dict[str, Any]], settings: Settings) -> str:
    """A row for each way, a column for each set."""
    rows = []
    for way in settings.ways:
        gaps = [
            statistics.median(run["record"][-1]["gap"] for run in select(runs, way=way, data=data))
            for data in settings.data
        ]
        rows.append([way, *(f"{gap:.3f}" for gap in gaps), f"{statistics.mean(gaps):.3f}"])
    return markdown(["", *settings.data, "mean"], rows)


def gap_table(runs: Sequence[dict[str, Any]], settings: Settings) -> str:
    """A row for each set and way, a column for each gap."""
    rows = []
    for data, way in itertools.product(settings.data, settings.ways):
        group = select(runs, way=way, data=data)
        cells = []
        for gap in GAPS:
            times = [time_to("gap", gap, run["record"]) for run in group]
            cells.append(seconds(statistics.median(times)))
        rows.append([data, way, *cells])
    return markdown(["set", "way", *(f"{gap:g} nats" for gap in GAPS)], rows)


def ffjord_table(runs: Sequence[dict[str, Any]], settings: Settings) -> str:
    """A row for each way, a column for each set of which a likelihood is known."""
    sets = [data for data in settings.data if data in FFJORD_NLL]
    rows = []
    for way in settings.ways:
        cells = []
        for data in sets:
            group = select(runs, way=way, data=data)
            needed = statistics.median(
                time_to("nll", FFJORD_NLL[data], run["record"]) for run in group
            )
            ratio = "" if math.isinf(needed) else f" ({FFJORD_SECONDS / needed:.0f} x)"
            cells.append(seconds(needed) + ratio)
        rows.append([way, *cells])
    return markdown(["", *(f"{data}, {FFJORD_NLL[data]}" for data in sets)], rows)


def select(runs: Sequence[dict[str, Any]], **key: str) -> list[dict[str, Any]]:
    """The runs of one way and set."""
    return [run for run in runs if all(run[name] == value for name, value in key.items())]


def time_to(name: str, value: float, record: Sequence[dict[str, float]]) -> float:
    """CPU-seconds at the first look at which `name` was at most `value`; infinite if at none."""
    return next((look["seconds"] for look in record if look[name] <= value), math.inf)


def seconds(value: float) -> str:
    """A time, or a dash for never."""
    return "-" if math.isinf(value) else f"{value:.1f}"


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"quality: {error}")
