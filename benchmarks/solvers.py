"""How many evaluations a gradient or a log-density of some precision takes, by solver.

Run as ``python -m benchmarks.solvers``; ``--help`` lists the settings. The default flow learns a
toy set by flow matching. Then the mean log-likelihood of a batch and its gradient in all
parameters, by backprop through the steps, are compared with what dopri8 gives at a tolerance of
1e-10: all in double precision, so that what differs is the solver. Nothing is timed, and no number
depends on the machine but by rounding.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.settings import check_counts
from benchmarks.timing import describe, machine, markdown, report
from cnf import CNF, Flow, FlowMatching, ODESolver, TrainingConfig, count_evaluations, fit
from cnf.data.toy import TOY_NAMES, toy_density
from cnf.ode import ErrorNorm

ADAPTIVE = ("dopri5", "bosh3", "fehlberg2", "adaptive_heun", "dopri8")
STAGES = {"euler": 1, "midpoint": 2, "heun3": 3, "rk4": 4}
"""Of methods of fixed steps."""
PRECISIONS = {"gradient": (0.1, 0.01), "log_prob": (1e-2, 1e-3)}
"""Errors that the summary asks for: of the gradient relative, of a log-density in nats."""
_REFERENCE = ODESolver(method="dopri8", rtol=1e-10, atol=1e-10, gradient="backprop")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How many evaluations a gradient or a log-density of some precision takes, by solver."""

    data: str = "8gaussians"
    """The toy set."""
    steps: int = 3000
    """Steps of flow matching."""
    batch: int = 512
    """Rows of the batch."""
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    """Of adaptive methods, relative and absolute."""
    evaluations: tuple[int, ...] = (12, 24, 48, 96)
    """Of methods of fixed steps."""
    seed: int = 0
    """Seed of data, weights and training."""
    out: Path = Path("runs/benchmarks/solvers")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch")
        if self.data not in TOY_NAMES:
            raise ValueError(f"data must be one of {TOY_NAMES}; got {self.data!r}.")
        for count in self.evaluations:
            if count < 1 or count % 12:
                raise ValueError(f"evaluations must be multiples of 12; got {count}.")
        for tolerance in self.tolerances:
            ODESolver(rtol=tolerance, atol=tolerance)


def main(settings: Settings) -> dict[str, Any]:
    """Train, solve in every way, print the tables, and write them; returns what was written."""
    if settings.quick:
        settings = replace(settings, steps=5, batch=16, tolerances=(1e-2,), evaluations=(12, 24))
    facts = machine()
    flow, x = trained(settings)
    expected = measured(flow.using(solver=_REFERENCE), x)
    records = []
    for label, solver in solvers(settings):
        found = measured(flow.using(solver=solver), x)
        records.append(
            {
                "solver": label,
                "evaluations": found[0],
                "log_prob": float((found[1] - expected[1]).abs().max()),
                "gradient": float((found[2] - expected[2]).norm() / expected[2].norm()),
            }
        )
    records.sort(key=lambda record: record["evaluations"])
    content = {"machine": facts, "settings": asdict(settings), "records": records}
    report(settings.out, content, "\n".join([table(records), summary(records), describe(facts)]))
    return content


def trained(settings: Settings) -> tuple[Flow, Tensor]:
    """The default flow after flow matching, and a batch of new rows, in double precision."""
    torch.manual_seed(settings.seed)
    density, generator = toy_density(settings.data), torch.Generator().manual_seed(settings.seed)
    x = density.sample(20_000, generator=generator).float()
    flow = CNF(2)
    matching = TrainingConfig(steps=settings.steps, seed=settings.seed, progress=False)
    fit(FlowMatching(flow), x, matching, validation=None)
    return flow.double(), density.sample(settings.batch, generator=generator).double()


def solvers(settings: Settings) -> Iterator[tuple[str, ODESolver]]:
    """What is compared, and what it is called."""
    norms: tuple[ErrorNorm, ...] = ("points_and_ladj", "points")
    for method in ADAPTIVE:
        for tolerance in settings.tolerances:
            for error_norm in norms:
                by = "" if error_norm == norms[0] else ", steps by the points"
                yield (
                    f"{method}, {tolerance:g}{by}",
                    ODESolver(
                        method=method,
                        rtol=tolerance,
                        atol=tolerance,
                        error_norm=error_norm,
                        gradient="backprop",
                    ),
                )
    for method, stages in STAGES.items():
        for count in settings.evaluations:
            steps = count // stages
            yield (
                f"{method}, {steps} steps",
                ODESolver(method=method, steps=steps, gradient="backprop"),
            )


def measured(flow: Flow, x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Evaluations of the solve, log-densities of the rows, and the gradient of their mean."""
    with count_evaluations(flow) as nfe:
        log_prob = flow.log_prob(x)
    gradients = torch.autograd.grad(log_prob.mean(), list(flow.parameters()))
    return nfe.value, log_prob.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def table(records: list[dict[str, Any]]) -> str:
    """A row for each solver."""
    rows = [
        [
            record["solver"],
            str(record["evaluations"]),
            f"{record['log_prob']:.1e}",
            f"{record['gradient']:.1e}",
        ]
        for record in records
    ]
    headings = ["solver", "evaluations", "largest error of a log-density (nats)"]
    return markdown([*headings, "error of the gradient, relative"], rows)


def summary(records: list[dict[str, Any]]) -> str:
    """The solver of fewest evaluations for each precision."""
    rows = []
    for what, bounds in PRECISIONS.items():
        for bound in bounds:
            enough = [record for record in records if record[what] <= bound]
            if enough:
                best = min(enough, key=lambda record: (record["evaluations"], record[what]))
                cells = [best["solver"], str(best["evaluations"]), f"{best[what]:.1e}"]
            else:
                cells = ["-", "-", "-"]
            rows.append([f"{what.replace('_', '-')} within {bound:g}", *cells])
    return markdown(["wanted", "solver of fewest evaluations", "evaluations", "error"], rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"solvers: {error}")
