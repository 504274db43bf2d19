"""How the cost of a training step and of a log-density grows, in each direction by itself.

Run as ``python -m benchmarks.scaling``; ``--help`` lists the settings. The claim is a table and a
figure: CPU time on one thread against the rows, the features, the width of the two hidden layers
and the tolerance, from one point in the middle. Against the features there are three divergences:
in closed form, from one of Hutchinson's probes, and over the basis.

The default field, trained for a moment to carry a normal to a mixture; gradients by the adjoint,
whose memory stays bounded in the larger sizes.
"""

import itertools
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from benchmarks import scaling_report
from benchmarks.flows import OverTheBasis, density, following, solver_of, trained
from benchmarks.settings import check_counts
from benchmarks.solves import evaluation, likelihood_step
from benchmarks.timing import machine, measure_alone
from cnf import Exact, Hutchinson, MLPField, ODESolver

_MODES = {"training step": likelihood_step, "log-density": evaluation}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the cost of a training step and of a log-density grows, in each direction by itself."""

    batches: tuple[int, ...] = (100, 1000, 10_000, 100_000)
    """Numbers of rows."""
    features: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256)
    """Sizes of x."""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Units of each of the two hidden layers."""
    tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """Of dopri5, relative and absolute."""
    middle_batch: int = 512
    """Rows where something else grows."""
    middle_features: int = 8
    """Size of x where something else grows."""
    middle_width: int = 128
    """Units of each hidden layer where something else grows."""
    middle_tolerance: float = 1e-5
    """Tolerance where something else grows."""
    training_steps: int = 300
    """Steps of flow matching that each field has seen."""
    seconds: float = 3.0
    """CPU time for the calls of one point and mode; one call is made in any case."""
    calls: int = 20
    """Most calls of one point and mode."""
    seed: int = 0
    """Seed of weights and rows."""
    out: Path = Path("runs/benchmarks/scaling")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "batches", "features", "widths")
        check_counts(
            self, "middle_batch", "middle_features", "middle_width", "training_steps", "calls"
        )
        for tolerance in (*self.tolerances, self.middle_tolerance):
            ODESolver(rtol=tolerance, atol=tolerance)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One problem."""

    batch: int
    features: int
    width: int
    tolerance: float
    divergence: str = scaling_report.DIVERGENCES[0]


def main(settings: Settings) -> dict[str, Any]:
    """Measure along each axis, print the tables, and write them; returns what was written."""
    if settings.quick:
        settings = replace(
            settings,
            batches=(8, 16),
            features=(2, 3),
            widths=(4, 8),
            tolerances=(1e-2, 1e-3),
            middle_batch=8,
            middle_features=2,
            middle_width=4,
            middle_tolerance=1e-2,
            training_steps=2,
            calls=1,
        )
    facts = machine()
    work = [(axis, point) for axis, points in axes(settings).items() for point in points]
    records = [
        record
        for axis, point in tqdm(work, desc="points", disable=settings.quick)
        for record in measure(axis, point, settings)
    ]
    content = {"machine": facts, "settings": asdict(settings), "records": records}
    scaling_report.write(content, settings.out)
    return content


def axes(settings: Settings) -> dict[str, list[Point]]:
    """The points along each axis."""
    middle = Point(
        batch=settings.middle_batch,
        features=settings.middle_features,
        width=settings.middle_width,
        tolerance=settings.middle_tolerance,
    )
    return {
        "batch": [replace(middle, batch=batch) for batch in settings.batches],
        "features": [
            replace(middle, features=features, divergence=divergence)
            for features, divergence in itertools.product(
                settings.features, scaling_report.DIVERGENCES
            )
        ],
        "width": [replace(middle, width=width) for width in settings.widths],
        "tolerance": [replace(middle, tolerance=tolerance) for tolerance in settings.tolerances],
    }


def measure(axis: str, point: Point, settings: Settings) -> list[dict[str, Any]]:
    """The times at one point: a training step, then the log-density."""
    torch.manual_seed(settings.seed)
    field, mixture = trained(
        MLPField(point.features, hidden_features=(point.width, point.width)),
        steps=settings.training_steps,
        seed=settings.seed,
    )
    x = mixture.sample(point.batch)
    solver = solver_of(point.tolerance, "adjoint")
    followed = OverTheBasis(field) if point.divergence == "basis" else field
    divergence = Hutchinson() if point.divergence == "one probe" else Exact()
    flow = density(following(followed, divergence, solver))
    records = []
    for mode, make in _MODES.items():
        way = make(flow, x)
        timing = measure_alone(way.block, seconds=settings.seconds, most=settings.calls)
        records.append(
            {
                "axis": axis,
                **asdict(point),
                "mode": mode,
                "milliseconds": asdict(timing),
                "evaluations": way.evaluations,
            }
        )
    return records


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"scaling: {error}")
