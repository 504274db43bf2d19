"""What the divergence in closed form costs, against one probe and against the whole basis.

Run as ``python -m benchmarks.divergence``; ``--help`` lists the settings. Claim: with 64 features
and 256 units, the closed form costs at most as much as one of Hutchinson's probes for an `MLPField`
with two hidden layers, and at most twice as much for a `PotentialField`, whatever the layer.

One evaluation at one time, as in a solve: velocity and divergence, and for a training step their
gradient in all parameters and x. The probe is drawn before, as a solve draws it once. Its product
with the Jacobian is made forward, as fields of this package do, or by reverse mode, as for any
network.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from benchmarks.settings import check_counts
from benchmarks.timing import describe, machine, markdown, measure, report, training_step
from cnf import Exact, Hutchinson, MLPField, ModuleField, VectorField
from cnf.divergence import FieldEvaluation
from cnf.vector_fields import PotentialField
from cnf.vector_fields.layers import LAYERS

WAYS = ("velocity", "closed form", "forward probe", "reverse probe", "basis")
"""What is timed: the velocity alone, and with its divergence in four ways."""
RATIOS = (("closed form", "forward probe"), ("closed form", "reverse probe"))
"""What the claim is about."""
LIMITS = {"MLPField": 1.0, "PotentialField": 2.0}
"""The claim."""
_MODES = ("training step", "value only")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the divergence in closed form costs, against one probe and against the whole basis."""

    features: int = 64
    """Size of x."""
    hidden: int = 256
    """Units of each hidden layer: two of them in an MLPField, one in a PotentialField."""
    batch: int = 512
    """Rows of x."""
    rounds: int = 100
    """Calls of each way, but for the basis, which takes part in every tenth round."""
    seed: int = 0
    """Seed of weights and rows."""
    out: Path = Path("runs/benchmarks/divergence")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "features", "hidden", "batch", "rounds")


def main(settings: Settings) -> dict[str, Any]:
    """Measure every field and layer, print the table, and write it; returns what was written."""
    if settings.quick:
        settings = replace(settings, features=4, hidden=8, batch=16, rounds=3)
    facts = machine()
    torch.manual_seed(settings.seed)
    records = [
        record
        for field in tqdm(fields(settings), desc="fields", disable=settings.quick)
        for record in measure_field(field, settings)
    ]
    content = {"machine": facts, "settings": asdict(settings), "records": records}
    report(settings.out, content, table(records) + "\n" + describe(facts))
    return content


def fields(settings: Settings) -> list[MLPField | PotentialField]:
    """One of each class and layer, with noise on the weights: a new field is at rest."""
    d, hidden = settings.features, settings.hidden
    made: list[MLPField | PotentialField] = [
        *(
            MLPField(d, hidden_features=(hidden, hidden), layer=layer, time_features=0)
            for layer in LAYERS
        ),
        *(PotentialField(d, hidden_features=hidden, layer=layer) for layer in LAYERS),
    ]
    with torch.no_grad():
        for field in made:
            for parameter in field.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def measure_field(field: MLPField | PotentialField, settings: Settings) -> list[dict[str, Any]]:
    """The times of one field: a training step, then the values alone."""
    x = torch.randn(settings.batch, settings.features, requires_grad=True)
    evaluations = evaluations_of(field, torch.tensor(0.5), x)
    inputs = [x, *field.parameters()]
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "training step": {
            name: training_step(evaluate, inputs) for name, evaluate in evaluations.items()
        },
        "value only": {name: torch.no_grad()(evaluate) for name, evaluate in evaluations.items()},
    }
    records = []
    for mode in _MODES:
        times = measure(calls[mode], settings.rounds, rare=["basis"])
        records.append(
            {
                "field": type(field).__name__,
                "layer": field.layer,
                "mode": mode,
                "milliseconds": {name: asdict(timing) for name, timing in times.items()},
                "ratios": {
                    f"{above} / {below}": times[above].median / times[below].median
                    for above, below in (*RATIOS, ("basis", "forward probe"))
                },
            }
        )
    return records


def evaluations_of(
    field: VectorField, t: Tensor, x: Tensor
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The ways to evaluate a field, in the order of `WAYS`."""
    hutchinson = Hutchinson()
    probes = hutchinson.draw_probes(x)
    by_reverse_mode = ModuleField(field, field.features)  # knows nothing of the field's own way
    calls = (
        lambda: (field(t, x),),
        lambda: _outputs(Exact()(field, t, x)),
        lambda: _outputs(hutchinson(field, t, x, probes)),
        lambda: _outputs(hutchinson(by_reverse_mode, t, x, probes)),
        lambda: _outputs(Exact()(field, t, x, products=True)),
    )
    return dict(zip(WAYS, calls, strict=True))


def _outputs(evaluation: FieldEvaluation) -> tuple[Tensor, Tensor]:
    return evaluation.velocity, evaluation.divergence


def table(records: list[dict[str, Any]]) -> str:
    """A table for each mode, and the worst ratios against the claim."""
    ratios = list(records[0]["ratios"])
    headings = ["field", "layer", *(f"{name} (ms)" for name in WAYS), *ratios]
    parts = []
    for mode in _MODES:
        rows = [
            [
                record["field"],
                record["layer"],
                *(f"{record['milliseconds'][name]['median']:.3g}" for name in WAYS),
                *(f"{record['ratios'][name]:.2f}" for name in ratios),
            ]
            for record in records
            if record["mode"] == mode
        ]
        parts.append(f"{mode.capitalize()}:\n\n{markdown(headings, rows)}")
    return "\n".join([*parts, worst(records)])


def worst(records: list[dict[str, Any]]) -> str:
    """The greatest ratio of each field, over the layers."""
    names = [f"{above} / {below}" for above, below in RATIOS]
    rows = []
    for field, limit in LIMITS.items():
        for mode in _MODES:
            own = [each for each in records if (each["field"], each["mode"]) == (field, mode)]
            cells = []
            for name in names:
                most = max(own, key=lambda record: record["ratios"][name])
                cells.append(f"{most['ratios'][name]:.2f} ({most['layer']})")
            rows.append([field, mode, *cells, f"{limit:g}"])
    return "The greatest over the layers:\n\n" + markdown(
        ["field", "of a", *names, "claim: at most"], rows
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"divergence: {error}")
