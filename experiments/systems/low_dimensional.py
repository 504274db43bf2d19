"""A flow whose base is drawn from one number: draws on a curve in space.

Rows lie on a helix. A flow with a `LowDimensionalNormal` as base draws curves, and has no density:
it learns by the energy distance between draws and rows. The same flow with a standard normal base
learns by likelihood, and so does a `PseudoInvertibleEncoder`, which has a density and a curve too.

Claim: draws from one number lie nearer to the helix than those of a standard normal.
References: Das, Abbeel & Spanos (2019), Dimensionality Reduction Flows; Székely & Rizzo (2013),
Energy statistics, https://doi.org/10.1016/j.jspi.2013.03.018
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from benchmarks.timing import markdown
from cnf import Flow, MaximumLikelihood, TrainingConfig, fit
from cnf.bases import LowDimensionalNormal, StandardNormal
from cnf.flows import PseudoInvertibleEncoder
from cnf.objectives import Objective
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import TITLE_SIZE
from cnf.transforms import AffineCoupling, Permute, Transform
from experiments.systems.settings import Settings

_TURNS = 2.0
_DRAWS = 2000


class EnergyDistance(Objective):
    """Energy distance between as many draws of a flow as there are rows, and the rows."""

    @property
    def is_kept_whole(self) -> bool:
        """True: the flow may have no log-density to be validated by."""
        return True

    def _loss(
        self,
        x: Tensor,
        context: Tensor | None,
        weight: Tensor | None,
        draws: int | None,
        generator: Generator | None,
    ) -> Tensor:
        del weight, draws  # rows count alike, and there are as many draws
        made = self.flow.rsample(len(x), context, generator=generator)
        pairs = len(x) / (len(x) - 1)  # without those of a row and itself
        within: Tensor = torch.cdist(x, x).mean() + torch.cdist(made, made).mean()
        return 2 * torch.cdist(made, x).mean() - pairs * within


def show(settings: Settings) -> str:
    """Return the table of the distances between draws and the helix."""
    generator = torch.Generator().manual_seed(settings.seed)
    x = _helix(torch.rand(settings.choose(10_000, 200), generator=generator))
    curve = _helix(torch.linspace(0, 1, 2000))
    torch.manual_seed(settings.seed)
    objectives: dict[str, Callable[[], Objective]] = {
        "from one number": lambda: EnergyDistance(Flow(_couplings(), LowDimensionalNormal(3, 1))),
        "normal": lambda: MaximumLikelihood(Flow(_couplings(), StandardNormal(3))),
        "normal, energy distance": lambda: EnergyDistance(Flow(_couplings(), StandardNormal(3))),
        "PIE": lambda: MaximumLikelihood(PseudoInvertibleEncoder(_couplings(), 1, std=0.01)),
    }
    rows, made = [], {"rows": x[:_DRAWS]}
    for name, make in objectives.items():
        objective = make()
        start = time.process_time()
        fit(objective, x, _config(settings), validation=None)
        seconds = time.process_time() - start
        with torch.no_grad():
            draws = objective.flow.sample(_DRAWS, generator=generator)
        distance = torch.cdist(draws, curve)
        made[name] = draws
        rows.append(
            [
                name,
                f"{float(distance.amin(1).median()):.3f}",
                f"{float(distance.amin(0).max()):.2f}",
                objective.flow.likelihood,
                f"{seconds:.0f}",
            ]
        )
    _draw(made, settings)
    heads = ["base", "of draws to the helix", "of the helix to draws", "likelihood", "CPU-s"]
    return markdown(heads, rows)


def _helix(share: Tensor) -> Tensor:
    angle = 2 * math.pi * _TURNS * share
    return torch.stack([angle.cos(), angle.sin(), 4 * share - 2], -1)


def _couplings() -> list[Transform]:
    return [
        part
        for _ in range(6)
        for part in (AffineCoupling(3), AffineCoupling(3, mask="last"), Permute([2, 0, 1]))
    ]


def _config(settings: Settings) -> TrainingConfig:
    return TrainingConfig(
        steps=settings.choose(2000, 3), learning_rate=2e-3, seed=settings.seed, progress=False
    )


def _draw(made: dict[str, Tensor], settings: Settings) -> None:
    """Draw the rows and the draws of each flow, from the side."""
    figure, axes = figure_grid(1, len(made), panel_size=2.2)
    for panel, (title, points) in zip(axes[0], made.items(), strict=True):
        panel.scatter(points[:, 2], points[:, 0], s=1, linewidths=0)
        panel.set_title(title, fontsize=TITLE_SIZE - 2)
        panel.set(xticks=[], yticks=[], xlim=(-2.6, 2.6), ylim=(-1.6, 1.6))
    save_figure(figure, settings.out / "low_dimensional.png")
