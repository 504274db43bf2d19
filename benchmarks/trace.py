"""How much an estimate of the divergence varies, and what each way to it costs, by dimension.

Run as ``python -m benchmarks.trace``; ``--help`` lists the settings. The claim is a table: for 2 to
256 features, the standard deviation of Hutchinson's estimate beside the size of the divergence
itself, with Rademacher or Gaussian probes, one or eight of them, at x or at a bottleneck; and the
CPU time of a training step in each way, relative to one of the velocity alone.

The fields are at work, not at their start: `MLPField` of three hidden layers, one wide and one
with a bottleneck a quarter as wide as x, and one of two layers to be timed. They learn to carry a
standard normal along straight lines to a mixture of normals with correlated features (Lipman et al.
(2023), Flow Matching for Generative Modeling, https://arxiv.org/abs/2210.02747), and are measured
half-way at fresh points. The theory beside what is measured comes from the whole Jacobian: with S
its symmetric part, the variance of one probe is 2 ‖S‖² for a Gaussian, and less by 2 Σ s_ii² for a
Rademacher one.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from benchmarks import trace_report
from benchmarks.mixture import Mixture, train
from benchmarks.settings import check_counts
from benchmarks.timing import machine, measure, training_step
from cnf import Exact, Hutchinson, MLPField
from cnf.divergence import Divergence
from cnf.vector_fields.jacobian.autograd import standard_basis

_HALF_WAY = 0.5
_WAYS: dict[str, dict[str, Divergence | None]] = {
    "two layers": {"velocity": None, "closed form": Exact()},
    "wide": {
        "velocity": None,
        "basis": Exact(),
        "1 probe": Hutchinson(),
        "8 probes": Hutchinson(probes=8),
    },
    "narrow": {
        "velocity": None,
        "1 probe at x": Hutchinson(),
        "1 probe at the bottleneck": Hutchinson(bottleneck=True),
    },
}
"""What is timed of each field."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much an estimate of the divergence varies, and what each way costs, by dimension."""

    features: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256)
    """Sizes of x."""
    hidden: int = 256
    """Units of a hidden layer that is not the bottleneck."""
    steps: int = 2000
    """Training steps of each field."""
    training_batch: int = 256
    """Rows of a training step."""
    points: int = 64
    """Points at which the estimates are compared with the divergence."""
    draws: int = 200
    """Estimates at each point."""
    batch: int = 128
    """Rows of x when it comes to time."""
    rounds: int = 100
    """Calls of each way, but for the basis, which takes part in every tenth round."""
    seed: int = 0
    """Seed of data, weights and probes."""
    out: Path = Path("runs/benchmarks/trace")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "features", "draws", least=2)
        check_counts(self, "hidden", "steps", "training_batch", "points", "batch", "rounds")


def main(settings: Settings) -> dict[str, Any]:
    """Train, measure, print the tables, and write them; returns what was written."""
    if settings.quick:
        settings = replace(
            settings,
            features=(2, 8),
            hidden=8,
            steps=20,
            training_batch=32,
            points=4,
            draws=10,
            batch=8,
            rounds=3,
        )
    facts = machine()
    spread, cost = [], []
    for features in tqdm(settings.features, desc="dimensions", disable=settings.quick):
        torch.manual_seed(settings.seed)
        mixture = Mixture(features, torch.Generator().manual_seed(settings.seed))
        fields = trained_fields(mixture, settings)
        spread += spreads(fields, mixture, settings)
        cost.append(costs(fields, mixture, settings))
    content = {"machine": facts, "settings": asdict(settings), "spread": spread, "cost": cost}
    trace_report.write(content, settings.out)
    return content


def trained_fields(mixture: Mixture, settings: Settings) -> dict[str, MLPField]:
    """A field of each shape."""
    hidden, bottleneck = settings.hidden, max(1, mixture.features // 4)
    widths = {
        "two layers": (hidden, hidden),
        "wide": (hidden, hidden, hidden),
        "narrow": (hidden, bottleneck, hidden),
    }
    fields = {
        name: MLPField(
            mixture.features, hidden_features=hidden_features, layer="concatsquash", time_features=0
        )
        for name, hidden_features in widths.items()
    }
    for field in fields.values():
        train(
            field, field.parameters(), mixture, steps=settings.steps, rows=settings.training_batch
        )
    return fields


@torch.no_grad()
def spreads(
    fields: dict[str, MLPField], mixture: Mixture, settings: Settings
) -> list[dict[str, Any]]:
    """Standard deviation of each estimate of each field, and the size of its divergence."""
    t = torch.tensor(_HALF_WAY)
    x, _ = mixture.bridge(settings.points, t)
    records = []
    for (name, place), (noise, probes) in itertools.product(
        trace_report.PLACES, trace_report.ESTIMATES
    ):
        field, bottleneck = fields[name], place == "bottleneck"
        matrix = matrices(field, t, x, bottleneck=bottleneck)
        divergence = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        estimator = Hutchinson(noise=noise, probes=probes, bottleneck=bottleneck)
        records.append(
            {
                "features": mixture.features,
                "field": name,
                "probes_at": place,
                "noise": noise,
                "probes": probes,
                "divergence": float(divergence.square().mean().sqrt()),
                "measured": measured_deviation(estimator, field, t, x, settings.draws),
                "theory": theoretical_deviation(matrix, noise, probes),
            }
        )
    return records


def matrices(field: MLPField, t: Tensor, x: Tensor, *, bottleneck: bool) -> Tensor:
    """The matrix whose trace is estimated at each row: the Jacobian, or that at the bottleneck."""
    if bottleneck:
        basis = standard_basis(x[..., : field.bottleneck])
        _, columns = field.velocity_and_bottleneck_products(t, x, basis)
    else:
        _, columns = field.velocity_and_products(t, x, standard_basis(x))
    return columns.movedim(0, -1)


def measured_deviation(
    estimator: Hutchinson, field: MLPField, t: Tensor, x: Tensor, draws: int
) -> float:
    """Standard deviation of the estimate, whose variance is averaged over the points."""
    estimates = torch.stack(
        [estimator(field, t, x, estimator.draw_probes(x)).divergence for _ in range(draws)]
    )
    return float(estimates.var(0).mean().sqrt())


def theoretical_deviation(matrix: Tensor, noise: str, probes: int) -> float:
    """The same by the formulas of one probe, from the whole matrix of each point."""
    symmetric = 0.5 * (matrix + matrix.mT)
    if noise == "rademacher":
        symmetric = symmetric - torch.diag_embed(symmetric.diagonal(dim1=-2, dim2=-1))
    variance = 2 * symmetric.square().sum((-2, -1))
    return float((variance.mean() / probes).sqrt())


def costs(fields: dict[str, MLPField], mixture: Mixture, settings: Settings) -> dict[str, Any]:
    """CPU time of a training step in each way, and relative to the velocity of the same field."""
    t = torch.tensor(_HALF_WAY)
    x = mixture.bridge(settings.batch, t)[0].requires_grad_()
    steps, alone = {}, {}
    for name, own in _WAYS.items():
        inputs = [x, *fields[name].parameters()]
        for way, divergence in own.items():
            evaluate = evaluation(fields[name], divergence, t, x)
            steps[f"{name}: {way}"] = training_step(evaluate, inputs)
            alone[f"{name}: {way}"] = f"{name}: velocity"
    times = measure(steps, settings.rounds, rare=["wide: basis"])
    return {
        "features": mixture.features,
        "milliseconds": {name: asdict(timing) for name, timing in times.items()},
        "relative": {name: times[name].median / times[alone[name]].median for name in steps},
    }


def evaluation(
    field: MLPField, divergence: Divergence | None, t: Tensor, x: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """An evaluation of the velocity, and of the divergence if one is given."""
    if divergence is None:
        return lambda: (field(t, x),)
    probes = divergence.draw_probes(x)

    def evaluate() -> tuple[Tensor, Tensor]:
        result = divergence(field, t, x, probes)
        return result.velocity, result.divergence

    return evaluate


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"trace: {error}")
