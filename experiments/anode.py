"""Two functions that no neural ODE represents, and their cure by appended zeros.

Run as ``python -m experiments.anode``; ``--help`` lists the settings. After Dupont, Doucet and Teh
(2019), Augmented Neural ODEs, https://arxiv.org/abs/1904.01681.

Swap: -1 goes to 1 and 1 to -1, and the answer is the first coordinate of x(1), without a head.
Trajectories in one dimension cannot cross, so a = x(1) from -1 stays below b = x(1) from 1, and
the mean square loss is ((a - 1)² + (b + 1)²) / 2 = 1 + (b - a) + (a² + b²) / 2 > 1.

Annuli: a ball and the annulus around it are to lie on two sides of a line, a linear head. The map
is a homeomorphism of the plane, so the image of the annulus surrounds that of the ball and no line
parts them. The share of points on the wrong side is never zero, but nothing else bounds it: the map
may open the annulus along a narrow slit.

Claim: with one zero appended, the loss of the swap falls below 1e-6 and every held-out point of the
annuli is on its side, for no more evaluations than the plain neural ODE takes to fail.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tyro
from torch import Tensor, nn

from benchmarks.files import write_text
from benchmarks.settings import check_counts
from cnf import MLPField, NeuralODE, ODESolver, count_evaluations
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import BLUE, GREY, ORANGE, TEXT_SIZE, TITLE_SIZE

if TYPE_CHECKING:
    import matplotlib.axes

KINDS = {0: "plain", 1: "augmented"}
"""Numbers of zeros appended, and what the pictures call them."""
COLOURS = {0: BLUE, 1: ORANGE}
INNER, OUTER = (0.0, 0.5), (1.0, 1.5)
"""Radii of the ball and of the annulus, those of the paper's code."""
POINTS_SHOWN = 2000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train plain and augmented neural ODEs where the plain ones must fail."""

    steps: int = 400
    """Training steps of each model."""
    batch_size: int = 256
    """Fresh points of the annuli in a step; the swap has two points in all."""
    learning_rate: float = 5e-3
    """Learning rate of Adam."""
    held_out: int = 20_000
    """Fresh points of the annuli to measure on."""
    seeds: int = 3
    """Models of each kind; the figure shows the first."""
    seed: int = 0
    """Seed of the first."""
    out: Path = Path("runs/anode")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size", "held_out", "seeds")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one model came to, on held-out points, with the solver that it was trained with."""

    task: str
    augment: int
    seed: int
    loss: float
    """Mean square error of the swap, logistic loss of the annuli in nats."""
    accuracy: float
    """Share of answers with the right sign."""
    nfe: int
    """Vector-field evaluations of one solve of all points."""
    training_seconds: float


@dataclass(frozen=True)
class Task:
    """Points with targets -1 or 1, how an answer is read off the final state, and its loss."""

    features: int
    sample: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    make_head: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """A trained model, with the losses of its training and the points it was measured on."""

    result: Result
    ode: NeuralODE
    head: nn.Module
    losses: list[float]
    x: Tensor
    target: Tensor


class FirstCoordinate(nn.Module):
    """Reads the first coordinate, and learns nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """The first coordinate, (n, 1)."""
        return x[..., :1]


def swap(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The two points where the function is defined, however many are asked for."""
    x = torch.tensor([[-1.0], [1.0]])
    return x, -x


def annuli(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points uniform on the ball (-1) or on the annulus (1), each with probability one half."""
    outside = torch.rand(rows, 1, generator=generator) < 0.5
    low, high = (torch.where(outside, b**2, a**2) for a, b in zip(INNER, OUTER, strict=True))
    radius = (low + (high - low) * torch.rand(rows, 1, generator=generator)).sqrt()
    angle = 2 * torch.pi * torch.rand(rows, 1, generator=generator)
    return radius * torch.cat([angle.cos(), angle.sin()], -1), 2.0 * outside - 1


TASKS = {
    "swap": Task(1, swap, lambda _: FirstCoordinate(), nn.functional.mse_loss),
    "annuli": Task(2, annuli, lambda size: nn.Linear(size, 1), nn.functional.soft_margin_loss),
}


def main(settings: Settings) -> list[Result]:
    """Train, measure, print, and write the results."""
    if settings.quick:
        quick = {"steps": 40, "batch_size": 64, "held_out": 1000, "seeds": 1}
        settings = replace(settings, **quick, out=settings.out / "quick")
    settings.out.mkdir(parents=True, exist_ok=True)
    runs = []
    print(
        f"{'task':<8}{'zeros':>6}{'seed':>6}{'loss':>12}{'accuracy':>10}{'nfe':>6}{'training':>10}"
    )
    for name in TASKS:
        for augment in KINDS:
            for seed in range(settings.seed, settings.seed + settings.seeds):
                runs.append(run(name, augment, seed, settings))
                print(row(runs[-1].result), flush=True)
    results = [each.result for each in runs]
    content = json.dumps([asdict(result) for result in results], indent=2)
    write_text(settings.out / "metrics.json", content)
    draw(runs[:: settings.seeds], settings.out / "figure.png", coarse=settings.quick)
    print(f"results in {settings.out}")
    return results


def run(name: str, augment: int, seed: int, settings: Settings) -> Run:
    """Train one model, and measure it."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    data = torch.Generator().manual_seed(seed)
    task = TASKS[name]
    size = task.features + augment
    field = MLPField(size, hidden_features=(32, 32), layer="ignore", activation="tanh")
    solver = ODESolver(rtol=1e-4, atol=1e-4, error_norm="points")
    ode, head = NeuralODE(field, augment=augment, solver=solver), task.make_head(size)
    losses = train(nn.Sequential(ode, head), task, data, settings)
    seconds = time.perf_counter() - started
    x, target = task.sample(settings.held_out, data)
    with torch.no_grad(), count_evaluations(ode) as nfe:
        answer = head(ode(x))
    result = Result(
        task=name,
        augment=augment,
        seed=seed,
        loss=float(task.loss(answer, target)),
        accuracy=float((answer * target > 0).double().mean()),
        nfe=nfe.value,
        training_seconds=seconds,
    )
    return Run(result, ode, head, losses, x, target)


def train(
    model: nn.Module, task: Task, generator: torch.Generator, settings: Settings
) -> list[float]:
    """Minimise the loss by Adam on fresh points; the loss of each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    losses = []
    for _ in range(settings.steps):
        x, target = task.sample(settings.batch_size, generator)
        loss = task.loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def row(result: Result) -> str:
    """A result as a row of the table for people."""
    return (
        f"{result.task:<8}{result.augment:>6}{result.seed:>6}{result.loss:>12.6g}"
        f"{result.accuracy:>10.4f}{result.nfe:>6}{result.training_seconds:>8.1f} s"
    )


@torch.no_grad()
def draw(runs: list[Run], path: Path, *, coarse: bool) -> None:
    """Above the swap: paths, and losses; below the annuli: decisions, and final states."""
    figure, (top, bottom) = figure_grid(2, 4)
    *swaps, plain, augmented = runs
    draw_swaps(top, swaps, times=20 if coarse else 100)
    for each, (left, right) in ((plain, bottom[:2]), (augmented, bottom[2:])):
        draw_decisions(left, each, resolution=40 if coarse else 400)
        draw_final_states(right, each)
    for ax in figure.axes:
        ax.title.set_size(TITLE_SIZE)
        ax.tick_params(labelsize=TEXT_SIZE)
        ax.xaxis.label.set_size(TEXT_SIZE)
        ax.yaxis.label.set_size(TEXT_SIZE)
    save_figure(figure, path)


def draw_swaps(panels: list["matplotlib.axes.Axes"], runs: list[Run], *, times: int) -> None:
    """Paths of the plain model, twice those of the augmented one, and the losses of both."""
    starts = torch.cat([torch.linspace(-1.6, 1.6, 17), torch.tensor([-1.0, 1.0])])
    t = torch.linspace(0, 1, times)
    for panel, each in zip(panels, runs, strict=False):
        kind = KINDS[each.result.augment]
        states = each.ode.trajectory(starts.unsqueeze(-1), t)
        draw_paths(panel, t.expand(len(starts), -1).T, states[..., 0])
        panel.set(title=f"swap, {kind}: x against t", xlabel="t", ylabel="x", ylim=(-2, 2))
        panels[3].plot(each.losses, color=COLOURS[each.result.augment], linewidth=1.2, label=kind)
    draw_paths(panels[2], states[..., 0], states[..., 1])
    panels[2].set(title="swap, augmented: the same paths")
    panels[2].set(xlabel="x", ylabel="appended coordinate")
    panels[3].axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    panels[3].set(title="swap: loss (dashed: bound in 1-D)", xlabel="step", yscale="log")
    panels[3].legend(fontsize=TEXT_SIZE, frameon=False)


def draw_paths(ax: "matplotlib.axes.Axes", across: Tensor, up: Tensor) -> None:
    """Paths in grey, of which the last two start from -1 and 1."""
    ax.plot(across.numpy(), up.numpy(), color=GREY, alpha=0.5, linewidth=0.6)
    for path, colour, label in ((-2, BLUE, "from -1"), (-1, ORANGE, "from 1")):
        ax.plot(across[:, path], up[:, path], color=colour, linewidth=1.6, label=label)
        ax.plot(across[-1:, path], up[-1:, path], color=colour, marker="o", markersize=4)
    ax.legend(fontsize=TEXT_SIZE, frameon=False)


def draw_decisions(ax: "matplotlib.axes.Axes", run: Run, *, resolution: int) -> None:
    """The plane by the side of the line where it ends up, points by label, the wrong as crosses."""
    axis = torch.linspace(-1.7, 1.7, resolution)
    grid = torch.cartesian_prod(axis, axis).flip(-1)
    answer = run.head(run.ode(grid)).reshape(resolution, resolution)
    sides = [-torch.inf, 0, torch.inf]
    ax.contourf(axis, axis, answer, levels=sides, colors=[BLUE, ORANGE], alpha=0.25)
    if answer.min() < 0 < answer.max():  # matplotlib warns of a line that is not there
        ax.contour(axis, axis, answer, levels=[0], colors=["black"], linewidths=0.8)
    draw_points(ax, run.x, run.target)
    wrong = run.x[(run.head(run.ode(run.x)) * run.target <= 0).squeeze(-1)]
    ax.plot(*wrong.T, color="black", marker="x", markersize=4, linestyle="none")
    kind = KINDS[run.result.augment]
    ax.set(title=f"annuli, {kind}: {len(wrong)} of {len(run.x)} wrong", aspect="equal")
    ax.set(xlabel="first coordinate", ylabel="second coordinate")


def draw_final_states(ax: "matplotlib.axes.Axes", run: Run) -> None:
    """Final states by distance from the boundary and along it, where they spread most."""
    states, scale = run.ode(run.x), run.head.weight.norm()
    normal, distance = run.head.weight[0] / scale, run.head(states) / scale
    along = states - (states @ normal).unsqueeze(-1) * normal
    widest = torch.linalg.svd(along - along.mean(0), full_matrices=False).Vh[0]
    draw_points(ax, torch.cat([distance, (along @ widest).unsqueeze(-1)], -1), run.target)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(title=f"annuli, {KINDS[run.result.augment]}: final states")
    ax.set(xlabel="distance from the boundary", ylabel="widest direction along it")


def draw_points(ax: "matplotlib.axes.Axes", points: Tensor, target: Tensor) -> None:
    """The first points, in the colour of their target."""
    points, target = points[:POINTS_SHOWN], target[:POINTS_SHOWN]
    for sign, colour in ((-1, BLUE), (1, ORANGE)):
        chosen = points[target[:, 0] == sign]
        ax.plot(*chosen.T, color=colour, marker=".", markersize=2, linestyle="none")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"anode: {error}")
