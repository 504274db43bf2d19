"""Conditional flow by a prescribed rule, beside a conditional flow.

Two crescents, and which of them a point is on. A Real NVP of point and label learns to copy the
label (`PrescribedConditional`); a CNF with the label as its context needs not learn that.

Claim: both draw on the right crescent; the first is a likelihood only as far as it copies, and the
conditional flow has more of it.
"""

import math
import time
import warnings

import torch
from torch import Tensor

from benchmarks.timing import markdown
from cnf import CNF, Flow, TrainingConfig, baselines, fit, recipe
from cnf.data.degeneracy import DegenerateDataWarning
from cnf.objectives import PrescribedConditional
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import TITLE_SIZE
from experiments.systems.settings import Settings

_NOISE = 0.1


def show(settings: Settings) -> str:
    """Return the table of the two."""
    torch.manual_seed(settings.seed)
    rows = settings.choose(20_000, 200)
    (x, labels), (other, other_labels) = crescents(rows), crescents(rows // 4)
    draws = settings.choose(5000, 50)
    asked = torch.tensor([[-1.0], [1.0]])

    start = time.process_time()
    conditional = CNF(2, context_features=1)
    matching, likelihood = settings.choose((3000, 50), (10, 2))
    phases = recipe(rows, matching_steps=matching, likelihood_steps=likelihood, progress=False)
    fit(conditional, (x, labels), phases)
    seconds = time.process_time() - start
    with torch.no_grad():
        nats = float(conditional.log_prob(other, other_labels).mean())
    drawn = [conditional.sample(draws, label).reshape(draws, 2) for label in asked]
    lines = [_line("CNF given the label", drawn, "0", f"{nats:.3f}", seconds)]
    panels = {"given the label": drawn}

    start = time.process_time()
    joint = Flow(baselines.build("realnvp", 3).transforms)
    objective = PrescribedConditional(joint, condition_features=1)
    config = TrainingConfig(
        steps=settings.choose(4000, 10), batch_size=512, learning_rate=2e-3, progress=False
    )
    with warnings.catch_warnings():
        # The labels are two numbers, whose density is not asked for.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        fit(objective, torch.cat([x, labels], -1), config)
    seconds = time.process_time() - start
    with torch.no_grad():
        error = float(objective.copying_error(other, other_labels).max())
        try:
            score = f"{float(objective.log_prob(other, other_labels).mean()):.3f}"
        except ValueError:
            score = "no likelihood"
    drawn = [objective.sample(label, draws).reshape(draws, 2) for label in asked]
    lines.append(_line("prescribed rule", drawn, f"{error:.1g}", score, seconds))
    panels["prescribed rule"] = drawn
    _draw(panels, settings)
    heads = ["flow", "on the right crescent", "copying error", "nats, held out", "CPU-s"]
    return markdown(heads, lines)


def crescents(rows: int) -> tuple[Tensor, Tensor]:
    """Return points on two crescents, and -1 or 1 for the lower and the upper one."""
    labels = 2.0 * torch.randint(2, (rows, 1)) - 1
    angle = math.pi * torch.rand(rows, 1)
    arc = torch.cat([angle.cos() - 0.5 * labels.sign(), labels * (angle.sin() - 0.25)], -1)
    return arc + _NOISE * torch.randn(rows, 2), labels


def _is_upper(x: Tensor) -> Tensor:
    """Return whether points are nearer to the upper crescent."""
    angle = torch.linspace(0, math.pi, 200)
    distances = [
        torch.cdist(x, torch.stack([angle.cos() - 0.5 * sign, sign * (angle.sin() - 0.25)], -1))
        for sign in (-1.0, 1.0)
    ]
    return distances[1].amin(-1) < distances[0].amin(-1)


def _line(name: str, drawn: list[Tensor], error: str, nats: str, seconds: float) -> list[str]:
    right = torch.cat([~_is_upper(drawn[0]), _is_upper(drawn[1])]).double().mean()
    return [name, f"{100 * right:.2f} %", error, nats, f"{seconds:.0f}"]


def _draw(drawn: dict[str, list[Tensor]], settings: Settings) -> None:
    figure, (panels,) = figure_grid(1, len(drawn), panel_size=4)
    for panel, (title, parts) in zip(panels, drawn.items(), strict=True):
        for part, color in zip(parts, ("tab:blue", "tab:orange"), strict=True):
            panel.scatter(*part.T.numpy(), s=0.5, color=color, linewidths=0)
        panel.set_title(title, fontsize=TITLE_SIZE)
        panel.set_aspect("equal")
    save_figure(figure, settings.out / "prescribed.png")
