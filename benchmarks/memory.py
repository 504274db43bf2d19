"""What the ways to a gradient cost in time and memory, by evaluations and rows.

Run as ``python -m benchmarks.memory``; ``--help`` lists the settings. Claim: the peak memory of a
training step with the adjoint is at 200 evaluations at most 1.2 times that at 20; the others are
measured beside it.

Equal steps of rk4, four evaluations each, fix how many there are on the way forward; the table
counts those of the backward pass too. The peak is what the allocator of torch held at most during
a step, beyond what it held before, as its profiler logs every allocation and release. That is exact
and the same on every system, and it sees the temporaries within an operation and in compiled code,
which a hook on operations would miss; the resident memory of a process depends on what the
allocators of Python and C keep for later. Time is taken in calls that are not profiled.
"""

import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from benchmarks.flows import density, following, gradients, trained
from benchmarks.settings import check_counts
from benchmarks.solves import compare, likelihood_step
from benchmarks.timing import describe, machine, markdown, report
from cnf import Exact, MLPField, ODESolver

CLAIM = 1.2
"""Most that the peak of the adjoint may grow by, from the fewest evaluations to the most."""
_STAGES = 4
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the ways to a gradient cost in time and memory, by evaluations and rows."""

    evaluations: tuple[int, ...] = (20, 40, 100, 200)
    """Evaluations on the way forward, four in each step."""
    batches: tuple[int, ...] = (128, 512, 2048, 8192)
    """Numbers of rows, with the fewest evaluations."""
    batch: int = 512
    """Rows where the evaluations grow."""
    features: int = 2
    """Size of x."""
    hidden: tuple[int, ...] = (128, 128)
    """Widths of the default field."""
    training_steps: int = 300
    """Steps of flow matching that the field has seen."""
    rounds: int = 5
    """Turns that each way has."""
    calls: int = 3
    """Calls in a row in each turn."""
    seed: int = 0
    """Seed of weights and rows."""
    out: Path = Path("runs/benchmarks/memory")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        for count in self.evaluations:
            if count < _STAGES or count % _STAGES:
                raise ValueError(f"evaluations must be multiples of {_STAGES}; got {count}.")
        check_counts(self, "batch", "features", "training_steps", "rounds", "calls")
        check_counts(self, "batches")


def main(settings: Settings) -> dict[str, Any]:
    """Measure along both axes, print the tables, and write them; returns what was written."""
    if settings.quick:
        settings = replace(
            settings,
            evaluations=(4, 40),
            batches=(8, 16),
            batch=8,
            hidden=(8, 8),
            training_steps=2,
            rounds=1,
            calls=1,
        )
    facts = machine()
    torch.manual_seed(settings.seed)
    field, mixture = trained(
        MLPField(settings.features, hidden_features=settings.hidden),
        steps=settings.training_steps,
        seed=settings.seed,
    )
    fewest = min(settings.evaluations)
    points = [(count, settings.batch) for count in settings.evaluations]
    points += [(fewest, rows) for rows in settings.batches]
    records = [
        record
        for count, rows in tqdm(dict.fromkeys(points), disable=settings.quick)
        for record in measure_steps(field, mixture.sample(rows), count, settings)
    ]
    content = {"machine": facts, "settings": asdict(settings), "records": records}
    report(settings.out, content, "\n".join([*tables(records, settings), describe(facts)]))
    return content


def measure_steps(
    field: MLPField, x: torch.Tensor, evaluations: int, settings: Settings
) -> list[dict[str, Any]]:
    """A training step by each way to a gradient: time, and peak memory."""
    ways, peaks = {}, {}
    for gradient in gradients():
        solver = ODESolver(method="rk4", steps=evaluations // _STAGES, gradient=gradient)
        way = likelihood_step(density(following(field, Exact(), solver)), x)
        ways[gradient] = way
        peaks[gradient] = peak_bytes(lambda block=way.block: block(1))
    return [
        {**record, "forward": evaluations, "rows": len(x), "peak_bytes": peaks[record["way"]]}
        for record in compare(ways, settings.rounds, calls=settings.calls)
    ]


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch held on the CPU at once during a call, beyond what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"),
        key=lambda change: change[0],
    )
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def tables(records: list[dict[str, Any]], settings: Settings) -> list[str]:
    """Time and peak by evaluations and by rows, and the claim."""
    fewest = min(settings.evaluations)
    by_evaluations = [record for record in records if record["rows"] == settings.batch]
    by_rows = [record for record in records if record["forward"] == fewest]
    adjoint = {each["forward"]: each["peak_bytes"] for each in by_evaluations if is_adjoint(each)}
    most = max(adjoint)
    growth = adjoint[most] / adjoint[min(adjoint)]
    claim = [f"adjoint, peak at {most} evaluations / at {min(adjoint)}", f"{growth:.2f}"]
    return [
        f"By evaluations on the way forward, {settings.batch} rows:\n\n"
        + table(by_evaluations, "forward"),
        f"By rows, {fewest} evaluations on the way forward:\n\n" + table(by_rows, "rows"),
        markdown(["ratio", "measured", "claim"], [[*claim, f"at most {CLAIM:g}"]]),
    ]


def is_adjoint(record: dict[str, Any]) -> bool:
    """Whether the record is what the claim is about."""
    return record["way"] == "adjoint"


def table(records: list[dict[str, Any]], axis: str) -> str:
    """A row for each value along an axis and way to a gradient."""
    rows = [
        [
            str(record[axis]),
            record["way"],
            str(record["evaluations"]),
            f"{record['milliseconds']['median']:.3g}",
            f"{record['peak_bytes'] / _MIB:.3g}",
        ]
        for record in sorted(records, key=lambda record: record[axis])
    ]
    return markdown([axis, "gradient", "evaluations in all", "ms", "peak (MiB)"], rows)


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or each profile says that it starts and ends
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"memory: {error}")
