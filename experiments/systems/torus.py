"""Flow on the torus: pairs of angles, beside a mixture of von Mises distributions.

Claim: a continuous flow on the torus learns how two angles depend on each other, across the seam
too, as well as a mixture of products of von Mises distributions, which must tile what is bent or
tilted with many components. The angles are made up, in the manner of the dihedral angles of a
protein: one bent ridge across the seam, a tilted ellipse and a small round cluster.
"""

import math

import torch
from torch import Tensor

from benchmarks.timing import markdown
from cnf import CNF, fit, recipe
from cnf.bases import Base, VonMisesFisherMixture
from cnf.manifolds import Torus
from cnf.plots import figure_grid, plot_density, plot_samples, save_figure
from experiments.systems.settings import Settings

_TORUS = Torus(2)
_EXTENT = (-math.pi, math.pi, -math.pi, math.pi)


def show(settings: Settings) -> str:
    """Fit both, and return the table of their held-out NLL."""
    generator = torch.Generator().manual_seed(settings.seed)
    training, validation, test = (
        _angles(rows, generator) for rows in settings.choose((5000, 1000, 10_000), (300, 100, 300))
    )
    sizes = settings.choose((8, 16, 32, 64, 128), (2, 4))
    mixtures = [VonMisesFisherMixture.from_data(training, _TORUS, size) for size in sizes]
    mixture = min(mixtures, key=lambda model: _nll(model, validation))

    torch.manual_seed(settings.seed)
    flow = CNF(2, manifold=_TORUS, frequency=2.0)
    steps = settings.choose(
        {"matching_steps": 5000, "likelihood_steps": 40},
        {"matching_steps": 20, "likelihood_steps": 1},
    )
    fit(flow, training, recipe(progress=False, **steps), validation=validation, accuracy=1e-2)

    figure, axes = figure_grid(1, 3)
    plot_samples(test, extent=_EXTENT, ax=axes[0][0], title="held-out angles")
    titles = f"mixture of {mixture.components}", "flow on the torus"
    for panel, model, title in zip(axes[0][1:], (mixture, flow), titles, strict=True):
        resolution = settings.choose(150, 10)
        plot_density(model.log_prob, _EXTENT, ax=panel, title=title, resolution=resolution)
    save_figure(figure, settings.out / "torus.png")
    single = VonMisesFisherMixture.from_data(training, _TORUS, 1)
    rows = [
        ["uniform", f"{_TORUS.log_volume:.3f}"],
        ["one product of von Mises", f"{_nll(single, test):.3f}"],
        [f"mixture of {mixture.components}, by validation", f"{_nll(mixture, test):.3f}"],
        ["flow on the torus", f"{_nll(flow, test):.3f}"],
    ]
    return markdown(["model", "test NLL, nats"], rows)


def _nll(model: Base | CNF, x: Tensor) -> float:
    with torch.no_grad():
        return -float(model.log_prob(x).mean())


def _angles(rows: int, generator: torch.Generator) -> Tensor:
    """Draw pairs of angles."""
    kind = torch.rand(rows, generator=generator)
    first, second, third = torch.randn(3, rows, generator=generator)
    along = 1.2 * first
    ridge = torch.stack([along + 2.6, 1.5 * along.sin() - 1.0 + 0.15 * second], -1)
    ellipse = torch.stack([-1.2 + 0.4 * second, -0.7 - 0.35 * second + 0.12 * third], -1)
    cluster = torch.stack([1.0 + 0.15 * second, 0.8 + 0.15 * third], -1)
    chosen = torch.where(kind < 0.55, 0, torch.where(kind < 0.9, 1, 2))
    parts = torch.stack([ridge, ellipse, cluster])
    return _TORUS.project(parts[chosen, torch.arange(rows)])
