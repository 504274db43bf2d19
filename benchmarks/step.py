"""What a training step costs, in our ways and in those of others: a solve and its gradient.

Run as ``python -m benchmarks.step``; ``--help`` lists the settings. Claims, as ratios of medians of
CPU time on one thread, each way in its own hot loop:

- FFJORD's network (three layers of 64 units, concatsquash, tanh) in the plane, exact trace, dopri5:
  against FFJORD's recipe in our code (its network as it writes it, products by reverse mode,
  adjoint) at least 1.3 times as fast with the adjoint, 2 in the best eager way and 3 compiled; at
  least 5 times as fast as zuko's CNF with a network of that size; not slower than diffrax with jit.
- The default field with 64 features and 256 units: the exact divergence costs no more than one of
  Hutchinson's probes, and at most a third of FFJORD's recipe with one probe.

The fields have been trained for a moment, to carry a normal to a mixture. Where the log-likelihood
of two ways agrees, they solved the same ODE; the evaluations say how finely. diffrax takes part if
``--diffrax-python`` names a Python that has it, and FFJORD's and OT-Flow's code from where
``--ffjord`` and ``--otflow`` say.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.flows import (
    as_ffjord,
    by_reverse_mode,
    compiled,
    density,
    ffjord_field,
    following,
    gradients,
    solver_of,
    trained,
)
from benchmarks.settings import check_counts
from benchmarks.solve_peers import DIFFRAX_STEPS, diffrax_ways, torch_densities
from benchmarks.solves import Claim, Way, claims_table, compare, likelihood_step, table
from benchmarks.timing import describe, machine, report
from cnf import Exact, Flow, Hutchinson, MLPField, ODESolver, VectorField
from cnf.divergence import Divergence

SLOW = "slow path"
"""FFJORD's recipe in our code: its network as it writes it, products by reverse mode, adjoint."""
REVERSE = "our layers in reverse mode"
"""The same with the network as ours evaluates it."""
OURS = ("ours", "compiled")
PLANE_CLAIMS = (
    Claim(
        above=SLOW, below="ours, adjoint", text="slow path / ours, adjoint", bound="at least 1.3"
    ),
    Claim(above=SLOW, below="ours", text="slow path / best of ours, eager", bound="at least 2"),
    Claim(above=SLOW, below="compiled", text="slow path / best compiled", bound="at least 3"),
    Claim(above="zuko", below="ours", text="zuko / best of ours, eager", bound="at least 5"),
    Claim(above="diffrax", below=OURS, text="best of diffrax / best of ours", bound="at least 1"),
)
WIDE_CLAIMS = (
    *(
        Claim(
            above=f"closed form, {gradient}",
            below=f"one probe, {gradient}",
            text=f"closed form / one probe, {gradient}",
            bound="at most 1",
        )
        for gradient in gradients()
    ),
    Claim(
        above="closed form",
        below=SLOW,
        text="best with closed form / slow path with one probe",
        bound="at most 0.33",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training step costs, in our ways and in those of others: a solve and its gradient."""

    batch: int = 512
    """Rows of x."""
    hidden: tuple[int, ...] = (64, 64, 64)
    """Widths of FFJORD's network."""
    wide_features: int = 64
    """Size of x for the default field."""
    wide_hidden: int = 256
    """Units of each of its two hidden layers."""
    tolerance: float = 1e-5
    """Both of dopri5, relative and absolute."""
    training_steps: int = 500
    """Steps of flow matching that each field has seen."""
    rounds: int = 8
    """Turns that each way has in the plane."""
    wide_rounds: int = 3
    """And with the default field, where a call takes seconds."""
    calls: int = 5
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
    out: Path = Path("runs/benchmarks/step")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "batch", "wide_features", "wide_hidden", "training_steps")
        check_counts(self, "rounds", "wide_rounds", "calls")
        ODESolver(rtol=self.tolerance, atol=self.tolerance)


def main(settings: Settings) -> dict[str, Any]:
    """Measure both networks, print the tables, and write them; returns what was written."""
    if settings.quick:
        settings = replace(
            settings,
            batch=16,
            hidden=(8, 8, 8),
            wide_features=4,
            wide_hidden=8,
            tolerance=1e-3,
            training_steps=5,
            rounds=1,
            wide_rounds=1,
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
    x = mixture.sample(settings.batch)
    tolerance = settings.tolerance
    ways = {
        SLOW: by_adjoint(as_ffjord(field), Exact(), x, tolerance),
        REVERSE: by_adjoint(by_reverse_mode(field), Exact(), x, tolerance),
    }
    ways |= our_ways("ours", field, Exact(), x, tolerance)
    if settings.compile:
        ways |= our_ways("compiled", field, Exact(), x, tolerance, change=compiled)
    others = torch_densities(
        field,
        mixture,
        tolerance=tolerance,
        training_steps=settings.training_steps,
        ffjord=settings.ffjord,
        otflow=settings.otflow,
    )
    ways |= {name: likelihood_step(other, x) for name, other in others.items()}
    python = settings.diffrax_python
    with diffrax_ways(python, DIFFRAX_STEPS, field, x, tolerance=tolerance) as theirs:
        return compare(ways | theirs, settings.rounds, calls=settings.calls)


def measure_wide(settings: Settings) -> list[dict[str, Any]]:
    """The default field in many dimensions: exact, and from one probe."""
    hidden = (settings.wide_hidden, settings.wide_hidden)
    field, mixture = trained(
        MLPField(settings.wide_features, hidden_features=hidden),
        steps=settings.training_steps,
        seed=settings.seed,
    )
    x = mixture.sample(settings.batch)
    ways = {SLOW: by_adjoint(by_reverse_mode(field), Hutchinson(), x, settings.tolerance)}
    ways |= our_ways("closed form", field, Exact(), x, settings.tolerance)
    ways |= our_ways("one probe", field, Hutchinson(), x, settings.tolerance)
    return compare(ways, settings.wide_rounds, calls=settings.calls)


def by_adjoint(
    field: VectorField, divergence: Divergence, x: torch.Tensor, tolerance: float
) -> Way:
    """A step with the adjoint."""
    solver = solver_of(tolerance, "adjoint")
    return likelihood_step(density(following(field, divergence, solver)), x)


def our_ways(
    name: str,
    field: MLPField,
    divergence: Divergence,
    x: torch.Tensor,
    tolerance: float,
    *,
    change: Callable[[Flow], Flow | None] = lambda flow: flow,
) -> dict[str, Way]:
    """A step by each way to a gradient, of the flow after a `change`, if that can be made."""
    ways = {}
    for gradient in gradients():
        flow = change(following(field, divergence, solver_of(tolerance, gradient)))
        if flow is not None:
            ways[f"{name}, {gradient}"] = likelihood_step(density(flow), x)
    return ways


def tables(
    plane: list[dict[str, Any]], wide: list[dict[str, Any]], settings: Settings
) -> list[str]:
    """The ways with both networks, and the claims about each."""
    size = "-".join(map(str, (2, *settings.hidden, 2)))
    return [
        f"FFJORD's network ({size}), exact trace, {settings.batch} rows, dopri5 at "
        f"{settings.tolerance:g}:\n\n{table(plane, SLOW)}",
        claims_table(PLANE_CLAIMS, plane),
        f"The default field with {settings.wide_features} features and two layers of "
        f"{settings.wide_hidden} units, {settings.batch} rows:\n\n{table(wide, SLOW)}",
        claims_table(WIDE_CLAIMS, wide),
    ]


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"step: {error}")
