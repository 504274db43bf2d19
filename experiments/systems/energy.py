"""Energy-based model with a flow as proposal (LED).

A network is trained as the log-density of eight normals up to a constant, and a Real NVP both
follows it, by reverse KL with its entropy, and measures its integral. The truth is known.

Claim: the integral is measured within its error, with most of the draws effective; and the network,
which needs not be invertible, is nearer to the truth than the flow that was trained by likelihood
for as long.
"""

import time

import torch
from torch import Tensor, nn

from benchmarks.timing import markdown
from cnf import Flow, MaximumLikelihood, TrainingConfig, baselines, fit
from cnf.data.toy import toy_density
from cnf.flows import EnergyModel
from cnf.objectives import EnergyObjective
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import TITLE_SIZE
from experiments.systems.settings import Settings


class Energy(nn.Module):
    """Log-density up to a constant: a network, and a square by which it falls off."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            nn.Linear(width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the log-density of each row."""
        value: Tensor = self.network(x).squeeze(-1)
        return value - x.square().sum(-1) / 18


def show(settings: Settings) -> str:
    """Return the table of flow and energy."""
    torch.manual_seed(settings.seed)
    density = toy_density("8gaussians")
    rows = settings.choose(50_000, 300)
    x, held_out = (density.sample(count).float() for count in (rows, rows // 5))
    truth = density.log_prob(held_out)
    first, then = settings.choose((1000, 4000), (5, 5))

    def config(steps: int) -> TrainingConfig:
        return TrainingConfig(steps=steps, batch_size=512, learning_rate=1e-3, progress=False)

    start = time.process_time()
    flow = baselines.build("realnvp", 2)
    fit(MaximumLikelihood(flow), x, config(first))
    begun = time.process_time() - start
    model = EnergyModel(Energy(), flow)
    objective = EnergyObjective(model, draws=512)
    fit(objective, x, config(then))
    found = model.estimate_normalizer(settings.choose(20_000, 100))
    seconds = time.process_time() - start

    start = time.process_time()
    alone = baselines.build("realnvp", 2)
    fit(MaximumLikelihood(alone), x, config(settings.choose(5 * (first + then) // 2, 10)))
    alone_seconds = time.process_time() - start

    lines = []
    with torch.no_grad():
        for name, log_prob, time_taken in (
            ("flow by likelihood", alone.log_prob(held_out), alone_seconds),
            ("energy", model.log_prob(held_out), seconds),
            ("its proposal", flow.log_prob(held_out), begun),
        ):
            gap, error = truth.mean() - log_prob.mean(), (log_prob - truth).abs().median()
            lines.append([name, f"{gap:.3f}", f"{error:.3f}", "", "", f"{time_taken:.0f}"])
    share = float(found.effective_sample_size) / settings.choose(20_000, 100)
    lines[1][3:5] = [f"{found.log_z:.3f} ± {found.standard_error:.3f}", f"{100 * share:.0f} %"]
    _draw({"flow by likelihood": alone, "energy": model}, settings)
    heads = ["model", "nats from the truth", "median error of a row", "log Z", "ESS", "CPU-s"]
    return markdown(heads, lines)


def _draw(models: dict[str, Flow | EnergyModel], settings: Settings) -> None:
    steps = torch.linspace(-4, 4, settings.choose(200, 20))
    points = torch.cartesian_prod(steps, steps)
    figure, (panels,) = figure_grid(1, len(models), panel_size=4)
    for panel, (title, model) in zip(panels, models.items(), strict=True):
        with torch.no_grad():
            values = model.log_prob(points).exp().view(len(steps), len(steps))
        panel.imshow(values.T.numpy(), origin="lower", extent=(-4, 4, -4, 4), cmap="magma")
        panel.set_title(title, fontsize=TITLE_SIZE)
    save_figure(figure, settings.out / "energy.png")
