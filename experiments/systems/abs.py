"""Symmetric data by absolute values: four corners from one.

Points lie on an arc in the positive quarter of the plane, and have random signs. A spline flow
behind `Abs` learns the arc alone; the same flow without it must learn four arcs that do not touch.
A third flow is trained on all four reflections of each row, the usual answer without `Abs`.

Claim: behind `Abs` the flow is nearer to the truth than without, and exactly symmetric.
References: Nielsen et al. (2020), SurVAE Flows. https://arxiv.org/abs/2007.02731
"""

import math

import torch
from torch import Tensor
from torch.distributions import SoftplusTransform

from benchmarks.timing import markdown
from cnf import Flow, TrainingConfig, fit
from cnf.adapters import FromTorch
from cnf.baselines import build
from cnf.plots import figure_grid, plot_density, save_figure
from cnf.transforms import Abs, Standardize
from experiments.systems.settings import Settings

NOISE = 0.08
EXTENT = (-3.0, 3.0, -3.0, 3.0)


def arc(angle: Tensor) -> Tensor:
    """Points of the arc, at angles in radians."""
    return 1.0 + torch.stack([angle.cos(), angle.sin()], -1)


def draw(rows: int, generator: torch.Generator) -> Tensor:
    """Noisy points of the arc, with random signs."""
    angle = 0.5 * math.pi * torch.rand(rows, generator=generator)
    x = arc(angle) + NOISE * torch.randn(rows, 2, generator=generator)
    return x * (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1)


def true_log_prob(x: Tensor) -> Tensor:
    """Log-density of the data, by quadrature over the angle."""
    centres = arc(0.5 * math.pi * (torch.arange(400) + 0.5) / 400)
    squares = (x.abs().unsqueeze(-2) - centres).square().sum(-1) / NOISE**2
    log_normal = -0.5 * squares - math.log(2 * math.pi * NOISE**2)
    return log_normal.logsumexp(-1) - math.log(400) - math.log(4)


def reflections(x: Tensor) -> Tensor:
    """All four reflections of each row."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    return (x * signs[:, None]).flatten(0, 1)


def show(settings: Settings) -> str:
    """Train the three flows, and compare them with the truth."""
    generator = torch.Generator().manual_seed(settings.seed)
    sizes = (300, 100, settings.choose(5000, 500))
    x, validation, test = (draw(rows, generator) for rows in sizes)
    config = TrainingConfig(
        steps=settings.choose(1500, 10),
        batch_size=256,
        learning_rate=2e-3,
        validate_every=25,
        progress=False,
    )
    flows = {
        "behind `Abs`": (True, x),
        "without": (False, x),
        "without, on all reflections": (False, reflections(x)),
    }
    truth = true_log_prob(test)
    rows, figure_flows = [["the truth", "", f"{float(truth.mean()):.3f}", "", "0"]], {}
    for name, (symmetric, train) in flows.items():
        torch.manual_seed(settings.seed)
        first = [Abs(2), FromTorch(SoftplusTransform(), 2)] if symmetric else []
        flow = Flow([*first, Standardize(2), *build("nsf", 2, size=32).transforms])
        fit(flow, train, config, validation=reflections(validation))
        with torch.no_grad():
            log_prob, reflected = flow.log_prob(test), flow.log_prob(-test)
        gap = truth - log_prob
        error = float(gap.std()) / len(gap) ** 0.5
        parameters = sum(parameter.numel() for parameter in flow.parameters())
        nats = f"{float(log_prob.mean()):.3f}"
        change = f"{float((log_prob - reflected).abs().median()):.2g}"
        below = f"{float(gap.mean()):.3f} ± {error:.3f}"
        rows.append([name, f"{parameters:,}", nats, below, change])
        figure_flows[name.replace("`", "")] = flow.log_prob
    figure, (axes,) = figure_grid(1, 4)
    resolution = settings.choose(200, 20)
    panels = {"truth": true_log_prob, **figure_flows}
    for ax, (title, log_prob) in zip(axes, panels.items(), strict=True):
        plot_density(log_prob, EXTENT, ax=ax, title=title, resolution=resolution)
    save_figure(figure, settings.out / "abs.png")
    headings = ["flow", "parameters", "test nats", "below the truth", "change from x to -x"]
    return markdown(headings, rows)
