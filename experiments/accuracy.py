"""What a log-density is worth after `fit` without settings.

Run as ``python -m experiments.accuracy``; ``--help`` lists the settings. A `CNF` is fitted to rows
of each toy set, and of a table if one is named. The error of a held-out row is the difference of
its `log_prob` from that of a solve in float64 at a tolerance of 1e-9. Evaluations of the field are
means over the rows. The round trip is the largest error of x -> z -> x in standard deviations, and
rows alone differ from rows together by "neighbours". The last columns say whether `certify` passes,
and how many seconds it takes to score rows, as calibrated and again for an accuracy of 0.01.

Claim: errors are at most 1e-3 nats for 99 of 100 rows, in about 150 evaluations in the plane.
"""

import json
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import tyro

from benchmarks.files import write_text
from benchmarks.settings import check_counts
from benchmarks.timing import describe, machine, markdown, one_thread
from cnf import CNF, ODESolver, TrainingConfig, certify, fit, recipe
from cnf.ablation.outcome import count_rows
from cnf.data.toy import TOY_NAMES
from experiments.compare_tasks import Task, table_task, toy_tasks

_TRUE = ODESolver(rtol=1e-9, atol=1e-9)
_ROWS_AT_ONCE = 200
_ALONE = 50
_CERTIFIED = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the errors of log-densities after `fit`."""

    toy: tuple[str, ...] = TOY_NAMES
    """Toy sets."""
    table: Path | None = None
    """A table of real numbers, as `experiments.compare` reads it."""
    rows: int = 50_000
    """Rows to fit to."""
    held_out: int = 5000
    """Rows to measure on."""
    scored: int = 10_000
    """Rows to score for the time of it."""
    seed: int = 0
    """Seed of data and weights."""
    out: Path = Path("runs/accuracy")
    """Folder of the results; those that are there are not made again."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "rows", "held_out", "scored")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one flow is worth."""

    data: str
    fit_seconds: float
    accuracy: float | None
    """Stated by the flow; None for a mixture, which has no ODE to solve."""
    evaluations: float
    error_99: float
    """Error of 99 of 100 rows, in nats."""
    largest_error: float
    round_trip: float
    neighbours: float
    failed: list[str]
    """Checks of `certify`."""
    seconds: float
    seconds_at_a_hundredth: float


def main(settings: Settings) -> list[Result]:
    """Fit and measure where there is no result yet, print the table, and write it."""
    if settings.quick:
        out = settings.out / "quick"
        settings = replace(settings, toy=("moons",), rows=500, held_out=60, scored=60, out=out)
    settings.out.mkdir(parents=True, exist_ok=True)
    results = []
    with one_thread():
        for task in _tasks(settings):
            file = settings.out / f"{task.name}.json"
            if not file.exists():
                write_text(file, json.dumps(asdict(_measured(task, settings)), indent=2))
            results.append(Result(**json.loads(file.read_text())))
    text = _report(results)
    write_text(settings.out / "table.md", f"{text}\n\n{describe(machine())}\n")
    print(text)
    return results


def _tasks(settings: Settings) -> list[Task]:
    rows, held_out = settings.rows, settings.held_out
    tasks = list(toy_tasks(settings.toy, rows, held_out, settings.seed))
    if settings.table is not None:
        tasks.append(table_task(settings.table, rows, held_out))
    return tasks


def _measured(task: Task, settings: Settings) -> Result:
    x, held_out = (part.float() for part in (task.train, task.test))
    torch.manual_seed(settings.seed)
    flow = CNF(x.shape[-1])
    start = time.process_time()
    fit(flow, x, _few_steps(len(x)) if settings.quick else None)
    fit_seconds = time.process_time() - start
    with torch.no_grad():
        with count_rows(flow) as evaluations:
            log_prob = flow.log_prob(held_out).double()
        true_flow = deepcopy(flow).double().using(solver=_TRUE)
        true = [true_flow.log_prob(part) for part in held_out.double().split(_ROWS_AT_ONCE)]
        errors = (log_prob - torch.cat(true)).abs()
        back = flow.to_data(flow.to_base(held_out))
        alone = torch.stack([flow.log_prob(row) for row in held_out[:_ALONE]])
        scored = held_out.repeat(-(-settings.scored // len(held_out)), 1)[: settings.scored]
        seconds = [_seconds_to_score(flow, scored)]
        if flow.accuracy is not None:
            coarse = deepcopy(flow)
            coarse.calibrate(x, accuracy=0.01)
            seconds.append(_seconds_to_score(coarse, scored))
    report = certify(flow, held_out[:_CERTIFIED])
    return Result(
        data=task.name,
        fit_seconds=fit_seconds,
        accuracy=flow.accuracy,
        evaluations=evaluations.value / len(held_out),
        error_99=float(errors.quantile(0.99)),
        largest_error=float(errors.max()),
        round_trip=float(((back - held_out).abs() / held_out.std(0)).max()),
        neighbours=float((alone - log_prob[:_ALONE]).abs().max()),
        failed=[check.name for check in report.checks if check.verdict == "fail"],
        seconds=seconds[0],
        seconds_at_a_hundredth=seconds[-1],
    )


def _few_steps(rows: int) -> tuple[TrainingConfig, ...]:
    return recipe(rows, matching_steps=30, likelihood_steps=2, progress=False)


def _seconds_to_score(flow: CNF, rows: torch.Tensor) -> float:
    start = time.process_time()
    flow.log_prob(rows)
    return time.process_time() - start


def _report(results: list[Result]) -> str:
    headings = [field.name.replace("_", " ") for field in fields(Result) if field.name != "failed"]
    lines = [
        [
            result.data,
            f"{result.fit_seconds:.0f}",
            "mixture" if result.accuracy is None else f"{result.accuracy:g}",
            f"{result.evaluations:.0f}",
            *(
                f"{error:.1e}"
                for error in (
                    *(result.error_99, result.largest_error),
                    *(result.round_trip, result.neighbours),
                )
            ),
            f"{result.seconds:.1f}",
            f"{result.seconds_at_a_hundredth:.1f}",
            ", ".join(result.failed) or "passes",
        ]
        for result in results
    ]
    return markdown([*headings, "certify"], lines)


if __name__ == "__main__":
    main(tyro.cli(Settings))
