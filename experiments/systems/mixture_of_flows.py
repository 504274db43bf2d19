"""Mixture of flows (VQ-flows): a chart for each part of the data.

Two rings that do not touch, and a rolled sheet in three dimensions with little noise, are cut by
k-means into K charts, and each chart gets a flow of its own, trained for a K-th of the steps on its
rows. The mixture is exact.

Claim: charts pay for flows of few couplings, which leave a bridge between parts; the default CNF
needs none.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.distributions import Normal

from benchmarks.timing import markdown
from cnf import CNF, Flow, TrainingConfig, baselines, fit, recipe
from cnf.flows import MixtureOfFlows
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import TITLE_SIZE
from experiments.systems.settings import Settings

_KINDS = [
    *(("CNF", charts) for charts in (1, 2)),
    *(("Real NVP", charts) for charts in (1, 2, 4, 8)),
]
_RADIUS, _WIDTH = 1.0, 0.05
_CENTRES = torch.tensor([[-1.5, 0.0], [1.5, 0.0]])
_NOISE = 0.02


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows to fit, rows held out, and how far rows are from where data may be."""

    name: str
    train: Tensor
    held_out: Tensor
    entropy: float | None
    """Mean of -log p over the held-out rows, where the density is known."""
    is_astray: Callable[[Tensor], Tensor]


def show(settings: Settings) -> str:
    """Return the table of mixtures with more and more charts."""
    torch.manual_seed(settings.seed)
    rows = settings.choose(20_000, 100)
    lines, drawn = [], []
    for data in (two_rings(rows), rolled_sheet(rows)):
        for kind, charts in _KINDS[: settings.choose(None, 2)]:
            start = time.process_time()
            flow = charted(data.train, kind, charts, settings)
            seconds = time.process_time() - start
            with torch.no_grad():
                loss = -flow.log_prob(data.held_out).mean()
                samples = flow.sample(settings.choose(10_000, 100))
            astray = f"{100 * data.is_astray(samples).double().mean():.2f} %"
            gap = "" if data.entropy is None else f"{loss - data.entropy:.3f}"
            lines.append(
                [data.name, kind, str(charts), f"{loss:.3f}", gap, astray, f"{seconds:.0f}"]
            )
            if data.name == "two rings" and charts <= 2:
                drawn.append((f"{kind}, {charts} chart{'s' * (charts > 1)}", samples))
    _draw(drawn, settings)
    heads = ["data", "flows", "charts", "nats", "nats from the truth", "samples astray", "CPU-s"]
    return markdown(heads, lines)


def charted(x: Tensor, kind: str, charts: int, settings: Settings) -> Flow:
    """Return a mixture of flows, each trained on one cluster of the rows."""
    labels = KMeans(charts, n_init=4, random_state=settings.seed).fit(x.numpy()).labels_
    chart_of_row = torch.as_tensor(labels).long()
    flows = [_flow(kind, x.shape[-1]) for _ in range(charts)]
    for chart, flow in enumerate(flows):
        rows = x[chart_of_row == chart]
        fit(flow, rows, _phases(kind, len(rows), charts, settings))
    mixture = MixtureOfFlows(flows)
    mixture.set_weights(chart_of_row.bincount(minlength=charts))
    return Flow([], base=mixture)


def _flow(kind: str, features: int) -> Flow:
    return CNF(features) if kind == "CNF" else baselines.build("realnvp", features)


def _phases(
    kind: str, rows: int, charts: int, settings: Settings
) -> TrainingConfig | tuple[TrainingConfig, ...]:
    if kind == "Real NVP":
        steps = settings.choose(4000, 8) // charts
        return TrainingConfig(steps=steps, batch_size=512, learning_rate=2e-3, progress=False)
    matching, likelihood = settings.choose((6000, 80), (24, 2))
    return recipe(
        rows,
        matching_steps=matching // charts,
        likelihood_steps=max(1, likelihood // charts),
        progress=False,
    )


def two_rings(rows: int) -> Data:
    """Two rings of radius 1 and width 0.05, half a radius apart."""
    train, held_out = (_rings(count) for count in (rows, rows // 2))
    return Data(
        name="two rings",
        train=train,
        held_out=held_out,
        entropy=float(-_log_density_of_rings(held_out).mean()),
        is_astray=lambda x: _distance_to_rings(x) > 5 * _WIDTH,
    )


def _rings(rows: int) -> Tensor:
    angle = 2 * math.pi * torch.rand(rows)
    radius = _RADIUS + _WIDTH * torch.randn(rows)
    ring = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return ring + _CENTRES[torch.randint(2, (rows,))]


def _radii(x: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - _CENTRES).norm(dim=-1)


def _distance_to_rings(x: Tensor) -> Tensor:
    return (_radii(x) - _RADIUS).abs().amin(-1)


def _log_density_of_rings(x: Tensor) -> Tensor:
    radii = _radii(x)
    each = Normal(_RADIUS, _WIDTH).log_prob(radii) - (2 * math.pi * radii).log()
    return each.logsumexp(-1) - math.log(2)


def rolled_sheet(rows: int) -> Data:
    """A sheet, rolled up one and a half times, with noise of 0.02."""
    train, held_out = (_sheet(count) for count in (rows, rows // 2))
    fine = torch.linspace(0, 1, 2000)
    spiral = _spiral(fine)
    return Data(
        name="rolled sheet",
        train=train,
        held_out=held_out,
        entropy=None,
        is_astray=lambda x: torch.cdist(x[:, [0, 2]], spiral).amin(-1) > 5 * _NOISE,
    )


def _sheet(rows: int) -> Tensor:
    spiral = _spiral(torch.rand(rows))
    width = 2 * torch.rand(rows) - 1
    points = torch.stack([spiral[:, 0], width, spiral[:, 1]], -1)
    return points + _NOISE * torch.randn(rows, 3)


def _spiral(share: Tensor) -> Tensor:
    angle = 1.5 * math.pi * (1 + 2 * share)
    return (angle / (4.5 * math.pi)).unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)


def _draw(drawn: list[tuple[str, Tensor]], settings: Settings) -> None:
    figure, (panels,) = figure_grid(1, len(drawn), panel_size=4)
    for panel, (title, samples) in zip(panels, drawn, strict=True):
        panel.scatter(*samples.T.numpy(), s=0.5, color="black", linewidths=0)
        panel.set_title(title, fontsize=TITLE_SIZE)
        panel.set_aspect("equal")
    save_figure(figure, settings.out / "mixture_of_flows.png")
