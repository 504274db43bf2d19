"""Stochastic normalizing flows: random steps between the transforms of a flow.

Three unnormalised densities with known integrals: a double well and eight separate normals in the
plane, and a funnel in ten dimensions. A Real NVP learns each by reverse KL; a stochastic flow goes
from a wide normal to it by Hamiltonian Monte Carlo at annealed densities, untrained, or with
couplings in between that are trained by the weights of its paths. log Z is estimated by each from
as many draws.

Claim: the plain flow misses modes, and its standard error does not show it; the weights of paths
average to Z. Where one flow can be the density, as the funnel, the plain flow is the better one.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.timing import markdown
from cnf import Flow, ReverseKL, TrainingConfig, baselines, fit
from cnf.flows import log_normalizer
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import TITLE_SIZE
from cnf.transforms import (
    Affine,
    AffineCoupling,
    AnnealedDensity,
    HamiltonianMonteCarlo,
    MLPConditioner,
    Transform,
)
from experiments.systems.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Target:
    """An unnormalised density."""

    name: str
    log_density: Callable[[Tensor], Tensor]
    log_z: float
    features: int
    width: float
    """Standard deviation of the normal from which annealing starts."""
    step_size: float
    """Of the leapfrog steps."""


class Wide(nn.Module):
    """A normal density around zero."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Return the log-density of each row."""
        return normal(x, self.width).sum(-1)


def normal(x: Tensor, width: Tensor | float) -> Tensor:
    """Return the log-density of numbers around zero."""
    log_width = torch.as_tensor(width).log()
    return -0.5 * (x / width).square() - log_width - 0.5 * math.log(2 * math.pi)


def targets() -> list[Target]:
    """Return the three densities."""
    grid = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    integral = torch.trapezoid((-_well(grid)).exp(), grid)
    return [
        Target(
            name="double well",
            log_density=lambda x: -_well(x[..., 0]) - 0.5 * x[..., 1].square(),
            log_z=float(integral.log()) + 0.5 * math.log(2 * math.pi),
            features=2,
            width=2.0,
            step_size=0.3,
        ),
        Target(
            name="eight normals",
            log_density=_eight,
            log_z=0.0,
            features=2,
            width=4.0,
            step_size=0.25,
        ),
        Target(
            name="funnel", log_density=_funnel, log_z=0.0, features=10, width=1.5, step_size=0.3
        ),
    ]


def _well(x: Tensor) -> Tensor:
    return 0.25 * x**4 - 3 * x**2 + x


def _eight(x: Tensor) -> Tensor:
    angles = torch.arange(8, dtype=x.dtype) * math.pi / 4
    centres = 4 * torch.stack([angles.cos(), angles.sin()], -1)
    each = normal(x.unsqueeze(-2) - centres, 0.3).sum(-1)
    return each.logsumexp(-1) - math.log(8)


def _funnel(x: Tensor) -> Tensor:
    first, others = x[..., :1], x[..., 1:]
    return normal(first, 3.0).sum(-1) + normal(others, (0.5 * first).exp()).sum(-1)


def annealed(target: Target, temperatures: int, *, couplings: bool) -> Flow:
    """Return a flow of annealed Hamiltonian steps, perhaps with couplings in between."""
    parts: list[Transform] = []
    wide = Wide(target.width)
    for share in torch.linspace(1, 1 / temperatures, temperatures).tolist():
        density = AnnealedDensity(wide, target.log_density, share)
        kernel = HamiltonianMonteCarlo(
            target.features, density, steps=1, step_size=target.step_size
        )
        parts.append(kernel)
        if couplings:
            parts += [_coupling(target.features, mask) for mask in ("first", "last")]
    start = Affine(target.features).requires_grad_(False)
    nn.init.constant_(start.log_scale, math.log(target.width))
    return Flow([*parts, start])


def _coupling(features: int, mask: Literal["first", "last"]) -> AffineCoupling:
    """Return a coupling that starts as the identity."""
    half = features // 2
    conditioner = MLPConditioner(half, 2 * half, hidden_features=(32,))
    return AffineCoupling(features, conditioner=conditioner, mask=mask)


def show(settings: Settings) -> str:
    """Return the table of log Z by each flow."""
    lines, drawn = [], []
    few, many = settings.choose((10, 40), (2, 3))
    steps = settings.choose((600, 200), (2, 2))
    for target in targets():
        torch.manual_seed(settings.seed)
        flows = {
            "Real NVP": (baselines.build("realnvp", target.features), steps[0]),
            f"{few} annealed steps": (annealed(target, few, couplings=False), 0),
            f"{few}, trained": (annealed(target, few, couplings=True), steps[1]),
            f"{many} annealed steps": (annealed(target, many, couplings=False), 0),
        }
        for name, (flow, training_steps) in flows.items():
            lines.append([target.name, name, *_measured(flow, target, training_steps, settings)])
            if target.name == "eight normals":
                with torch.no_grad():
                    drawn.append((name, flow.sample(settings.choose(4000, 50))))
    _draw(drawn, settings)
    heads = ["density", "flow", "log Z - truth", "standard error", "ESS", "warned", "CPU-s"]
    return markdown(heads, lines)


def _measured(flow: Flow, target: Target, steps: int, settings: Settings) -> list[str]:
    start = time.process_time()
    if steps:
        objective = ReverseKL(flow, target.log_density, draws=settings.choose(512, 32))
        fit(objective, None, TrainingConfig(steps=steps, learning_rate=1e-3, progress=False))
    draws = settings.choose(20_000, 100)
    generator = torch.Generator().manual_seed(settings.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = log_normalizer(target.log_density, flow, draws, generator=generator)
    seconds = time.process_time() - start
    return [
        f"{found.log_z - target.log_z:+.4f}",
        f"{found.standard_error:.4f}",
        f"{100 * found.effective_sample_size / draws:.1f} %",
        "yes" if caught else "no",
        f"{seconds:.0f}",
    ]


def _draw(drawn: list[tuple[str, Tensor]], settings: Settings) -> None:
    figure, (panels,) = figure_grid(1, len(drawn), panel_size=4)
    for panel, (title, samples) in zip(panels, drawn, strict=True):
        panel.scatter(*samples.T.numpy(), s=0.5, color="black", linewidths=0)
        panel.set_title(title, fontsize=TITLE_SIZE)
        panel.set_xlim(-6, 6)
        panel.set_ylim(-6, 6)
        panel.set_aspect("equal")
    save_figure(figure, settings.out / "stochastic.png")
