"""Densities of sets of points: invariant to their order by sorting, or by a random permutation.

A set is the four corners of a square in the plane, of random place, size and rotation, with noise,
in random order. A spline flow of the eight numbers must learn all 24 orders. Behind `Sort` (and
`LogGaps`) it sees one order only, and its density is exactly invariant. Behind
`StochasticPermutation` its density is the mean over all orders, bounded from below.

Claim: `Sort` learns the density best; the permutation is invariant on average alone, and its bound
rises with importance samples. References: Nielsen et al. (2020), SurVAE Flows.
https://arxiv.org/abs/2007.02731
"""

import math

import torch
from torch import Tensor

from benchmarks.timing import markdown
from cnf import Flow, TrainingConfig, fit
from cnf.baselines import build
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import BLUE, GREY, TITLE_SIZE, Axes
from cnf.transforms import LogGaps, Sort, Standardize, StochasticPermutation, Transform
from cnf.transforms.surjections.sort import permuted_points
from experiments.systems.settings import Settings

POINTS = 4
FEATURES = 2 * POINTS
NOISE = 0.05


def draw(rows: int, generator: torch.Generator) -> Tensor:
    """Squares in random order, ``(rows, 8)``."""
    centre = torch.randn(rows, 1, 2, generator=generator)
    angle = 0.5 * math.pi * (torch.rand(rows, 1, generator=generator) + torch.arange(POINTS))
    radius = 0.5 + torch.rand(rows, 1, 1, generator=generator)
    corners = centre + radius * torch.stack([angle.cos(), angle.sin()], -1)
    corners = corners + NOISE * torch.randn(corners.shape, generator=generator)
    return permuted_points(corners.flatten(-2), 2, generator)


def show(settings: Settings) -> str:
    """Train a flow of each kind, and compare them on held-out sets."""
    generator = torch.Generator().manual_seed(settings.seed)
    train, test = (draw(rows, generator) for rows in settings.choose((5000, 1000), (300, 50)))
    config = TrainingConfig(
        steps=settings.choose(2500, 10), batch_size=256, learning_rate=2e-3, progress=False
    )
    starts: dict[str, list[Transform]] = {
        "plain": [],
        "behind `StochasticPermutation`": [StochasticPermutation(FEATURES, point_features=2)],
        "behind `Sort`": [Sort(FEATURES, point_features=2), LogGaps(FEATURES, point_features=2)],
    }
    rows, draws = [], {"data": test}
    for name, start in starts.items():
        torch.manual_seed(settings.seed)
        body = build("nsf", FEATURES, size=64).transforms
        flow = Flow([*start, Standardize(FEATURES), *body])
        fit(flow, train, config)
        counts = (1, 24) if flow.likelihood == "lower_bound" else (1,)
        rows += [[name, str(n), *measured(flow, test, n, settings.seed)] for n in counts]
        draws[name.replace("`", "")] = flow.sample(9, generator=generator)
    figure, (axes,) = figure_grid(1, len(draws))
    for ax, (title, sets) in zip(axes, draws.items(), strict=True):
        draw_sets(ax, sets[:9], title)
    save_figure(figure, settings.out / "sets.png")
    return markdown(
        ["flow", "importance samples", "test nats of a set", "change when points are permuted"],
        rows,
    )


@torch.no_grad()
def measured(flow: Flow, test: Tensor, count: int, seed: int) -> list[str]:
    """Mean log-density with its standard error, and the median change by another order."""
    generator = torch.Generator().manual_seed(seed)
    other = permuted_points(test, 2, generator)
    log_prob, again = (
        flow.log_prob(x, importance_samples=count, generator=generator) for x in (test, other)
    )
    error = float(log_prob.std()) / len(log_prob) ** 0.5
    change = float((log_prob - again).abs().median())
    return [f"{float(log_prob.mean()):.2f} ± {error:.2f}", f"{change:.2g}"]


def draw_sets(ax: Axes, sets: Tensor, title: str) -> None:
    """Draw nine sets as polygons, in the order of the angles of their points."""
    for place, flat in enumerate(sets):
        points = flat.unflatten(-1, (POINTS, 2))
        centred = points - points.mean(0)
        order = torch.atan2(centred[:, 1], centred[:, 0]).argsort()
        corners = centred[order] + 4.0 * torch.tensor([place % 3, place // 3])
        closed = torch.cat([corners, corners[:1]])
        ax.plot(*closed.T.tolist(), color=GREY, linewidth=0.8)
        ax.scatter(*corners.T.tolist(), color=BLUE, s=8)
    ax.set_title(title, fontsize=TITLE_SIZE)
    ax.set_aspect("equal")
    ax.set_axis_off()
