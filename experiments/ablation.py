"""What RNODE's penalties buy on toy sets whose truth is known, by the core of ``cnf ablate``.

Run as ``python -m experiments.ablation``; ``--help`` lists the settings. Flows are trained by the
recipe, from scratch by likelihood, and by the recipe with optimal-transport pairing, each with and
without penalties. An experiment that was stopped goes on after its last finished training.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from benchmarks.files import write_text
from benchmarks.settings import check_counts
from cnf.ablation import AblationSettings, Outcome, ablate, markdown, tradeoffs
from cnf.data.toy import TOY_NAMES, toy_density
from cnf.plots import plot_tradeoffs, save_figure
from cnf.tables.fit import TableRows


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What RNODE's penalties buy on toy sets: nats from the truth against evaluations."""

    data: tuple[str, ...] = ("rings", "pinwheel")
    """Toy sets."""
    rows: int = 20_000
    """Rows to train on."""
    held_out: int = 2000
    """Rows to measure at."""
    ablation: OmitArgPrefixes[AblationSettings] = field(
        default_factory=lambda: AblationSettings(
            penalties=("kinetic+jacobian-frobenius",),
            matching_steps=4000,
            likelihood_steps=100,
            scratch_steps=500,
            batch_size=256,
            hidden_features=(64, 64),
        )
    )
    out: Path = Path("runs/ablation")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, on one set with little in all else."""

    def __post_init__(self) -> None:
        check_counts(self, "rows", "held_out", least=2)
        unknown = set(self.data) - set(TOY_NAMES)
        if unknown:
            raise ValueError(f"data must be among {', '.join(TOY_NAMES)}; got {sorted(unknown)}.")


def main(settings: Settings) -> dict[str, list[Outcome]]:
    """Train what is missing, then write table and figure; returns the outcomes of each set."""
    if settings.quick:
        settings = replace(
            settings,
            data=settings.data[:1],
            rows=200,
            held_out=50,
            ablation=settings.ablation.quick(),
            out=settings.out / "quick",
        )
    found, texts, points = {}, [], []
    for name in settings.data:
        rows, held_out, truth = data_of(name, settings)
        found[name] = []
        for outcome in ablate(rows, held_out, settings.ablation, settings.out / name):
            print(f"{name}, {outcome.run}: {outcome.failure or outcome.evaluations}", flush=True)
            found[name].append(outcome)
        texts.append(f"{name}:\n\n{markdown(found[name], truth)}")
        points += tradeoffs(found[name], name, truth)
    write_text(settings.out / "table.md", "\n".join(texts))
    print("\n".join(texts))
    figure = plot_tradeoffs(
        points, nats="distance from the truth", accuracy=settings.ablation.accuracy
    )
    save_figure(figure, settings.out / "figure.png")
    print(f"table and figure in {settings.out}")
    return found


def data_of(name: str, settings: Settings) -> tuple[TableRows, TableRows, Tensor]:
    """Rows to train and to measure on, and the true log-density of the latter."""
    truth = toy_density(name)
    generator = torch.Generator().manual_seed(settings.ablation.seed)
    rows, held_out = (
        truth.sample(count, generator=generator).double()
        for count in (settings.rows, settings.held_out)
    )
    return TableRows(rows), TableRows(held_out), truth.log_prob(held_out)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"ablation: {error}")
