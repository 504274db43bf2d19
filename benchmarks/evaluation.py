"""What the log-density of many points costs, without gradient: ours and that of others.

Run as ``python -m benchmarks.evaluation``; ``--help`` lists the settings. Claims for 10 000 points,
as ratios of medians of CPU time on one thread, each way in its own hot loop:

- In the plane, with FFJORD's network (three layers of 64 units) and the exact trace: at least 5
  times as fast as zuko's CNF at the same tolerance with a network of that size, and 2.5 times as
  fast as FFJORD's recipe (products by reverse mode).
- With 64 features and two layers of 256 units, the closed form: at least 30 times as fast as any
  exact trace by brute force, be it in reverse mode, one feature after another, or carried forward.

The fields have been trained for a moment, to carry a normal to a mixture. Others take part as in
`benchmarks.step`.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.flows import (
    OverTheBasis,
    as_ffjord,
    by_reverse_mode,
    compiled,
    density,
    ffjord_field,
    following,
    solver_of,
    trained,
)
from benchmarks.settings import check_counts
from benchmarks.solve_peers import DIFFRAX_EVALUATION, diffrax_ways, torch_densities
from benchmarks.solves import Claim, Way, claims_table, compare, evaluation, table
from benchmarks.timing import describe, machine, report
from cnf import Exact, Flow, MLPField, ODESolver, VectorField

SLOW = "slow path"
"""FFJORD's recipe in our code: products by reverse mode."""
CLOSED = "closed form"
BRUTE = ("brute force, reverse mode", "brute force, forward")
PLANE_CLAIMS = (
    Claim(above="zuko", below="ours", text="zuko / ours, eager", bound="at least 5"),
    Claim(above=SLOW, below="ours", text="slow path / ours, eager", bound="at least 2.5"),
    Claim(above=SLOW, below="compiled", text="slow path / compiled", bound="at least 2.5"),
)
WIDE_CLAIMS = (
    Claim(above=BRUTE, below=CLOSED, text="fastest brute force / closed form", bound="at least 30"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the log-density of many points costs, without gradient: ours and that of others."""

    points: int = 10_000
    """Rows of x."""
    hidden: tuple[int, ...] = (64, 64, 64)
    """Widths of FFJORD's network."""
    wide_features: int = 64
    """Size of x where the closed form is compared with brute force."""
    wide_hidden: int = 256
    """Units of each of the two hidden layers there."""
    tolerance: float = 1e-5
    """Both of dopri5, relative and absolute."""
    training_steps: int = 500
    """Steps of flow matching that each field has seen."""
    rounds: int = 8
    """Turns that each way has, but brute force, whose only call takes minutes."""
    calls: int = 3
    """Calls in a row in each turn."""
    compile: bool = True
    """Whether to compile what can be compiled."""
    diffrax_python: Path | None = None
    """A Python that has jax and diffrax."""
    ffjord: Path | None = None
    """A clone of github.com/rtqichen/ffjord."""
    otflow: Path | None = None
    """A clone of github.com/EmoryMLIP/OT-Flow."""
    seed: int = 0
    """Seed of weights and rows."""
    out: Path = Path("runs/benchmarks/evaluation")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(
            self, "points", "wide_features", "wide_hidden", "training_steps", "rounds", "calls"
        )
        ODESolver(rtol=self.tolerance, atol=self.tolerance)


def main(settings: Settings) -> dict[str, Any]:
    """Measure both networks, print the tables, and write them; returns what was written."""
    if settings.quick:
        settings = replace(
            settings,
            points=32,
            hidden=(8, 8, 8),
            wide_features=4,
            wide_hidden=8,
            tolerance=1e-3,
            training_steps=5,
            rounds=1,
            calls=1,
            compile=False,
        )
    facts = machine()
    torch.manual_seed(settings.seed)
    plane, wide = measure_plane(settings), measure_wide(settings)
    content = {"machine": facts, "settings": asdict(settings), "plane": plane, "wide": wide}
    report(settings.out, content, "\n".join([*tables(plane, wide, settings), describe(facts)]))
    return content


def measure_plane(settings: Settings) -> list[dict[str, Any]]:
    """FFJORD's network in the plane with the exact trace, by all ways."""
    field, mixture = trained(
        ffjord_field(2, settings.hidden), steps=settings.training_steps, seed=settings.seed
    )
    x = mixture.sample(settings.points)
    tolerance = settings.tolerance
    ways = {SLOW: our_way(as_ffjord(field), x, tolerance), "ours": our_way(field, x, tolerance)}
    if settings.compile and (flow := compiled(exact_flow(field, tolerance))):
        ways["compiled"] = evaluation(density(flow), x)
    others = torch_densities(
        field,
        mixture,
        tolerance=tolerance,
        training_steps=settings.training_steps,
        ffjord=settings.ffjord,
        otflow=settings.otflow,
    )
    ways |= {name: evaluation(other, x) for name, other in others.items()}
    python = settings.diffrax_python
    with diffrax_ways(python, DIFFRAX_EVALUATION, field, x, tolerance=tolerance) as theirs:
        return compare(ways | theirs, settings.rounds, calls=settings.calls)


def measure_wide(settings: Settings) -> list[dict[str, Any]]:
    """The default field in many dimensions: in closed form, and by brute force."""
    hidden = (settings.wide_hidden, settings.wide_hidden)
    field, mixture = trained(
        MLPField(settings.wide_features, hidden_features=hidden),
        steps=settings.training_steps,
        seed=settings.seed,
    )
    x = mixture.sample(settings.points)
    reverse, forward = BRUTE
    fields = {CLOSED: field, reverse: by_reverse_mode(field), forward: OverTheBasis(field)}
    ways = {name: our_way(each, x, settings.tolerance) for name, each in fields.items()}
    return compare(ways, settings.rounds, calls=settings.calls, rare=BRUTE)


def our_way(field: VectorField, x: torch.Tensor, tolerance: float) -> Way:
    """The exact log-density by our code."""
    return evaluation(density(exact_flow(field, tolerance)), x)


def exact_flow(field: VectorField, tolerance: float) -> Flow:
    """A flow along the field with its exact divergence."""
    return following(field, Exact(), solver_of(tolerance))


def tables(
    plane: list[dict[str, Any]], wide: list[dict[str, Any]], settings: Settings
) -> list[str]:
    """The ways with both networks, and the claims about each."""
    size = "-".join(map(str, (2, *settings.hidden, 2)))
    return [
        f"FFJORD's network ({size}), exact trace, {settings.points} points, dopri5 at "
        f"{settings.tolerance:g}:\n\n{table(plane, SLOW)}",
        claims_table(PLANE_CLAIMS, plane),
        f"The default field with {settings.wide_features} features and two layers of "
        f"{settings.wide_hidden} units, {settings.points} points:\n\n{table(wide, BRUTE[0])}",
        claims_table(WIDE_CLAIMS, wide),
    ]


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"evaluation: {error}")
