"""What each choice in the recipe of `fit` buys, on toy sets whose truth is known.

Run as ``python -m experiments.recipe``; ``--help`` lists the settings. Each variant changes one
thing in the recipe or the default field, and is trained for as many steps; "likelihood alone" for
about as long. Claim: no variant is better on average by more than 0.01 nats.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.files import write_text
from benchmarks.settings import check_counts
from cnf import CNF, FlowMatching, TrainingConfig, fit, recipe
from cnf.data.toy import TOY_NAMES, toy_density
from cnf.objectives import OptimalTransport

Phases = tuple[TrainingConfig, ...]
RATE_OF_ADAM = TrainingConfig.learning_rate
MATCHING_STEPS_OF_A_LIKELIHOOD_STEP = 30
"""About as many steps of matching take as long as one of likelihood."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One thing that is done otherwise."""

    flow: dict[str, Any] = field(default_factory=dict)
    """Settings of the `CNF`."""
    phases: Callable[[Phases], Phases] = lambda phases: phases
    """What becomes of the phases of the recipe."""


def _matching(**change: Any) -> Variant:
    return Variant(phases=lambda phases: (replace(phases[0], **change), *phases[1:]))


def _all(**change: Any) -> Variant:
    return Variant(phases=lambda phases: tuple(replace(phase, **change) for phase in phases))


def _likelihood_alone(phases: Phases) -> Phases:
    matching, likelihood = phases
    more = matching.steps // MATCHING_STEPS_OF_A_LIKELIHOOD_STEP
    return (replace(likelihood, steps=likelihood.steps + more, learning_rate=RATE_OF_ADAM),)


VARIANTS: dict[str, Variant] = {
    "the recipe": Variant(),
    "layers of FFJORD": Variant(flow={"layer": "concatsquash", "time_features": 0}),
    "no waves of time": Variant(flow={"time_features": 0}),
    "two layers of 128": Variant(flow={"hidden_features": (128, 128)}),
    "silu in place of sin": Variant(flow={"activation": "silu"}),
    "uniform times": _matching(objective=partial(FlowMatching, times="uniform")),
    "logit-normal times": _matching(objective=partial(FlowMatching, times="logit_normal")),
    "optimal transport": _matching(
        objective=partial(FlowMatching, pairing=OptimalTransport(), times="late")
    ),
    "Adam for matching": _matching(optimizer=None, learning_rate=RATE_OF_ADAM),
    "no average": _all(ema=None),
    "constant rate": _all(schedule="constant"),
    "matching alone": Variant(phases=lambda phases: phases[:1]),
    "likelihood alone": Variant(phases=_likelihood_alone),
    "likelihood at the full rate": Variant(
        phases=lambda phases: (phases[0], replace(phases[1], learning_rate=RATE_OF_ADAM))
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What each choice in the recipe of `fit` buys, on toy sets whose truth is known."""

    data: tuple[str, ...] = ("rings", "2spirals", "checkerboard", "pinwheel")
    """Toy sets."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """What is tried."""
    matching_steps: int = 4000
    """Steps of flow matching."""
    likelihood_steps: int = 60
    """Steps of maximum likelihood after them."""
    rows: int = 50_000
    """Rows to train on."""
    held_out: int = 5000
    """Rows to measure on."""
    seed: int = 0
    """Seed of data, weights and training."""
    out: Path = Path("runs/recipe")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "matching_steps", "likelihood_steps", "rows", "held_out")
        for name, known in (("data", TOY_NAMES), ("variants", tuple(VARIANTS))):
            unknown = set(getattr(self, name)) - set(known)
            if unknown:
                raise ValueError(f"{name} must be among {known}; got {sorted(unknown)}.")


def main(settings: Settings) -> list[dict[str, Any]]:
    """Train every variant on every set, print the table, and write it; returns the runs."""
    if settings.quick:
        settings = replace(
            settings,
            data=settings.data[:1],
            matching_steps=3,
            likelihood_steps=1,
            rows=100,
            held_out=50,
            out=settings.out / "quick",
        )
    runs = []
    for name in settings.variants:
        for data in settings.data:
            runs.append(measure(name, data, settings))
            print(f"{name}, {data}: {runs[-1]['gap']:.3f}", file=sys.stderr)
    settings.out.mkdir(parents=True, exist_ok=True)
    content = {"settings": asdict(settings), "runs": runs}
    write_text(settings.out / "results.json", json.dumps(content, indent=2, default=str))
    written = table(runs, settings)
    write_text(settings.out / "table.md", written)
    print(written)
    print(f"results in {settings.out}")
    return runs


def measure(name: str, data: str, settings: Settings) -> dict[str, Any]:
    """The distance from the truth in nats that one variant reaches on one set."""
    truth = toy_density(data)
    generator = torch.Generator().manual_seed(settings.seed)
    x = truth.sample(settings.rows, generator=generator)
    held_out = truth.sample(settings.held_out, generator=generator)
    variant = VARIANTS[name]
    torch.manual_seed(settings.seed)
    flow = CNF(2, **variant.flow)
    phases = recipe(
        matching_steps=settings.matching_steps,
        likelihood_steps=settings.likelihood_steps,
        seed=settings.seed,
        progress=False,
    )
    started = time.process_time()
    fit(flow, x, variant.phases(phases), validation=None)
    seconds = time.process_time() - started
    with torch.no_grad():
        gap = (truth.log_prob(held_out).double() - flow.log_prob(held_out).double()).mean()
    return {"variant": name, "data": data, "gap": float(gap), "cpu_seconds": seconds}


def table(runs: list[dict[str, Any]], settings: Settings) -> str:
    """A row for each variant, a column for each set, in Markdown."""
    lines = [
        f"| gap in nats | {' | '.join(settings.data)} | mean | CPU-seconds |",
        "| --- |" + " --- |" * (len(settings.data) + 2),
    ]
    for name in settings.variants:
        group = [run for run in runs if run["variant"] == name]
        gaps = [run["gap"] for run in group]
        seconds = sum(run["cpu_seconds"] for run in group) / len(group)
        cells = [f"{gap:.3f}" for gap in (*gaps, sum(gaps) / len(gaps))]
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"recipe: {error}")
