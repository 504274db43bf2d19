"""Train a CNF on a 2-D toy set by the recipe of `fit`, and print its distance from the truth.

Run as ``python -m experiments.toy2d``; ``--help`` lists the settings. Claim: in about a minute
and a half on two cores the default flow comes within 0.05 nats of the truth on pinwheel.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.files import write_text
from cnf import CNF, Flow, History, count_evaluations, fit, recipe, save
from cnf.data.toy import TOY_NAMES, ToyDensity, toy_density
from cnf.plots import (
    figure_grid,
    plot_density,
    plot_samples,
    plot_training,
    plot_trajectories,
    save_figure,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train a CNF on a 2-D toy set."""

    data: Literal[TOY_NAMES] = "pinwheel"
    """Toy set."""
    matching_steps: int = 6000
    """Steps of flow matching."""
    likelihood_steps: int = 100
    """Steps of maximum likelihood after them."""
    batch_size: int = 1024
    """Rows of a minibatch."""
    learning_rate: float = 0.01
    """Peak learning rate of matching."""
    rows: int = 50_000
    """Rows to train on."""
    held_out: int = 20_000
    """Rows to measure on."""
    seed: int = 0
    """Seed of data, weights and training."""
    out: Path = Path("runs/toy2d")
    """Folder of the results; each toy set has its own folder in it."""
    quick: bool = False
    """Only see that everything works, with little in steps, rows, held_out and picture."""
    progress: bool = True
    """Whether to show a progress bar."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What is measured, on held-out rows, with the flow's own solver; densities in nats."""

    data: str
    likelihood: str
    nll: float
    nll_standard_error: float
    entropy: float
    kl_gap: float
    """NLL - entropy of the truth: the Kullback-Leibler divergence of the flow from the truth."""
    kl_gap_standard_error: float
    nfe: int
    """Vector-field evaluations of one `log_prob` of the held-out rows."""
    training_seconds: float
    seconds: float


def main(settings: Settings) -> Metrics:
    """Train, measure, print, and write the results."""
    started = time.perf_counter()
    if settings.quick:
        settings = made_quick(settings)
    folder = settings.out / settings.data
    folder.mkdir(parents=True, exist_ok=True)
    truth = toy_density(settings.data)
    data = torch.Generator().manual_seed(settings.seed)
    x = truth.sample(settings.rows, generator=data)
    held_out = truth.sample(settings.held_out, generator=data)
    validation = truth.sample(settings.held_out // 10, generator=data)

    torch.manual_seed(settings.seed)
    flow = CNF(2)
    history = fit(
        flow,
        x,
        recipe(
            matching_steps=settings.matching_steps,
            likelihood_steps=settings.likelihood_steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            progress=settings.progress,
        ),
        validation=validation,
    )

    metrics = measure(flow, held_out, truth, settings.data, history, started)
    save(flow, folder / "model.safetensors")
    history.save(folder / "history.csv")
    draw(flow, truth, history, folder / "figure.png", seed=settings.seed, coarse=settings.quick)
    metrics = replace(metrics, seconds=time.perf_counter() - started)
    write_text(folder / "metrics.json", json.dumps(asdict(metrics), indent=2))
    print(table(metrics))
    print(f"results in {folder}")
    return metrics


def made_quick(settings: Settings) -> Settings:
    """The settings with little of everything, in a folder of their own."""
    return replace(
        settings,
        matching_steps=20,
        likelihood_steps=2,
        rows=500,
        held_out=500,
        out=settings.out / "quick",
    )


@torch.no_grad()
def measure(
    flow: Flow, x: torch.Tensor, truth: ToyDensity, name: str, history: History, started: float
) -> Metrics:
    """NLL of the rows, and its distance from the entropy of the truth."""
    with count_evaluations(flow) as nfe:
        nll = -flow.log_prob(x).double()
    error = float(nll.std() / len(x) ** 0.5)
    entropy = truth.entropy()
    return Metrics(
        data=name,
        likelihood=flow.likelihood,
        nll=float(nll.mean()),
        nll_standard_error=error,
        entropy=entropy,
        kl_gap=float(nll.mean()) - entropy,
        kl_gap_standard_error=error,
        nfe=nfe.value,
        training_seconds=history.seconds[-1],
        seconds=time.perf_counter() - started,
    )


def table(metrics: Metrics) -> str:
    """The metrics as a table for people."""
    rows = [
        ("held-out NLL", f"{metrics.nll:.4f} ± {metrics.nll_standard_error:.4f} nats"),
        ("likelihood", metrics.likelihood),
        ("entropy of the truth", f"{metrics.entropy:.4f} nats"),
        (
            "KL gap = NLL - entropy",
            f"{metrics.kl_gap:.4f} ± {metrics.kl_gap_standard_error:.4f} nats",
        ),
        ("nfe of a log_prob", str(metrics.nfe)),
        ("training", f"{metrics.training_seconds:.1f} s"),
        ("in all", f"{metrics.seconds:.1f} s"),
    ]
    lines = [f"  {name:<24}{value}" for name, value in rows]
    return "\n".join([f"{metrics.data}", *lines])


def draw(
    flow: Flow, truth: ToyDensity, history: History, path: Path, *, seed: int, coarse: bool
) -> None:
    """Truth and model side by side, the paths between base and data, and the training curve."""
    generator = torch.Generator().manual_seed(seed)
    extent, resolution = truth.extent, 20 if coarse else 150
    z = flow.base.rsample(torch.Size([150]), generator=generator)
    with torch.no_grad():
        samples = flow.sample(500 if coarse else 50_000, generator=generator)
        states = flow.trajectory(z, torch.linspace(0, 1, 10 if coarse else 50))
    figure, ((a, b, c), (d, e, f)) = figure_grid(2, 3)
    plot_density(truth.log_prob, extent, resolution=resolution, ax=a, title="truth")
    plot_density(flow.log_prob, extent, resolution=resolution, ax=b, title="model")
    plot_samples(samples, extent=extent, ax=c, title="samples of the model")
    plot_density(
        flow.log_prob, extent, log=True, resolution=resolution, ax=d, title="model, log-density"
    )
    plot_trajectories(states, extent=extent, ax=e, title="paths from base to data")
    plot_training(history.columns, reference=truth.entropy(), ax=f, title="training")
    save_figure(figure, path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"toy2d: {error}")
