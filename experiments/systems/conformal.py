"""Densities on learned surfaces: a circle, a sphere, and an ellipse that no conformal map reaches.

The rows lie on the surface. A `ConformalEmbedding` learns the surface, and a spline flow behind it
the density, both from `ManifoldLikelihood`. One point of the surface is at infinity of the plane,
where the flow has hardly any density; so no rows are around one point of each. The plane of the
first principal components is the simple answer for the surface. The integral of the density is
taken by quadrature over the area of small pieces of the learned surface, without the ladj.

Claim: the flow finds circle and sphere, and its density on them is near the truth and integrates to
one; on an ellipse the surface stays off the data, and its distance says so.
References: Ross & Cresswell (2021), https://arxiv.org/abs/2106.05275
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import matplotlib.figure
import torch
from torch import Tensor

from benchmarks.timing import markdown
from cnf import Flow, TrainingConfig, fit
from cnf.baselines import build
from cnf.bases import VonMisesFisherMixture
from cnf.manifolds import Sphere, Torus
from cnf.objectives import ManifoldLikelihood
from cnf.plots.figures import TITLE_SIZE, save_figure
from cnf.transforms import Affine, ConformalEmbedding, Orthogonal, Similarity, SpecialConformal
from experiments.systems.settings import Settings

_RADIUS = 1.5
_HALF_AXES = torch.tensor([2.0, 1.0])
_WEIGHT = 1000.0
_REACH = 8.0
"""Largest asinh of a coordinate of the quadrature."""


@dataclass(frozen=True, kw_only=True)
class _Surface:
    """Rows on a surface, and their true log-density by area."""

    draw: Callable[[int], tuple[Tensor, Tensor]]
    features: int


def show(settings: Settings) -> str:
    """Return the table of the surfaces."""
    surfaces = {
        "circle": _Surface(draw=partial(_on_ellipse, torch.full((2,), _RADIUS)), features=2),
        "sphere": _Surface(draw=_on_sphere, features=3),
        "ellipse": _Surface(draw=partial(_on_ellipse, _HALF_AXES), features=2),
    }
    lines, shown = [], {}
    for name, surface in surfaces.items():
        torch.manual_seed(settings.seed)
        x, _ = surface.draw(settings.choose(5000, 200))
        other, truth = surface.draw(settings.choose(5000, 200))
        flow = _fitted(x, settings).double()
        other = other.double()
        with torch.no_grad():
            nats = flow.log_prob(flow.to_data(flow.to_base(other)))
            distance = _root_mean_square(flow.distance(other))
            mass = _mass(flow, settings.choose(1000 if surface.features == 3 else 100_000, 50))
        plane = _root_mean_square(_distance_from_plane(x.double(), other))
        lines.append(
            [
                name,
                f"{distance:.4f}",
                f"{plane:.4f}",
                f"{float(nats.mean()):.3f}",
                f"{float(truth.mean()):.3f}",
                f"{mass:.4f}",
            ]
        )
        shown[name] = (other, flow)
    _draw(shown, settings)
    heads = [
        *("surface", "distance of held-out rows", "from the principal plane"),
        *("nats of their projections", "nats, truth", "integral"),
    ]
    return markdown(heads, lines)


def _on_ellipse(half_axes: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return rows on an ellipse in the plane, with two modes."""
    circle = VonMisesFisherMixture(Torus(1), 2)
    means = torch.tensor([[0.0], [math.pi / 2]])
    circle.set_components(torch.zeros(2), means, torch.tensor([[8.0], [20.0]]))
    angle = circle.rsample(torch.Size([rows]))
    points = half_axes * torch.cat([angle.cos(), angle.sin()], -1)
    # Arc length for one radian.
    stretch = (half_axes * torch.cat([-angle.sin(), angle.cos()], -1)).norm(dim=-1)
    return points + torch.tensor([1.0, -0.5]), circle.log_prob(angle) - stretch.log()


def _on_sphere(rows: int) -> tuple[Tensor, Tensor]:
    """Return rows on a sphere, with two modes."""
    sphere = VonMisesFisherMixture(Sphere(3), 2)
    means = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
    sphere.set_components(torch.zeros(2), means, torch.tensor([[6.0], [20.0]]))
    points = sphere.rsample(torch.Size([rows]))
    center = torch.tensor([0.5, -0.5, 1.0])
    return center + _RADIUS * points, sphere.log_prob(points) - 2 * math.log(_RADIUS)


def _fitted(x: Tensor, settings: Settings) -> Flow:
    """Return a flow trained on rows, from their principal plane."""
    features = x.shape[-1]
    similarity, rotation = Similarity(features), Orthogonal(features)
    directions = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
    rotation.set_to(directions, torch.zeros(features))
    special = SpecialConformal(features)
    with torch.no_grad():
        similarity.shift.copy_(x.mean(0))
        special.b[-1] = 0.1  # away from the plane, which is a saddle point
    size = features - 1
    embedding = ConformalEmbedding([similarity, rotation, special], size)
    flow = Flow([embedding, Affine(size), *build("nsf", size, size=32).transforms])
    config = TrainingConfig(
        steps=settings.choose(1500, 10), batch_size=256, learning_rate=3e-3, progress=False
    )
    fit(ManifoldLikelihood(flow, weight=_WEIGHT), x, config)
    return flow


def _mass(flow: Flow, pieces: int) -> float:
    """Return the integral of the density over the surface, by the sizes of small pieces."""
    surface = flow.transforms.onto_surface
    ends = torch.linspace(-_REACH, _REACH, pieces + 1, dtype=torch.float64)
    middles = (ends[1:] + ends[:-1]) / 2
    if surface.base_features == 1:
        corners = surface.to_data(ends.sinh().unsqueeze(-1))
        sizes = corners.diff(dim=0).norm(dim=-1)
        points = middles.sinh().unsqueeze(-1)
    else:
        corners = surface.to_data(torch.cartesian_prod(ends, ends).sinh())
        corners = corners.view(pieces + 1, pieces + 1, 3)
        diagonals = (corners[1:, 1:] - corners[:-1, :-1], corners[:-1, 1:] - corners[1:, :-1])
        sizes = torch.linalg.cross(*diagonals).norm(dim=-1).flatten() / 2
        points = torch.cartesian_prod(middles, middles).sinh()
    return float((flow.log_prob(surface.to_data(points)).exp() * sizes).sum())


def _distance_from_plane(x: Tensor, other: Tensor) -> Tensor:
    """Return the distances of rows from the principal plane of x."""
    normal = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[-1]
    return ((other - x.mean(0)) @ normal).abs()


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _draw(shown: dict[str, tuple[Tensor, Flow]], settings: Settings) -> None:
    """Draw held-out rows, and draws of the flow, whose color is their log-density."""
    figure = matplotlib.figure.Figure(figsize=(3.4 * len(shown), 6.4), layout="constrained")
    for column, (name, (rows, flow)) in enumerate(shown.items()):
        draws = settings.choose(2000, 50)
        with torch.no_grad():
            x = flow.sample(draws, generator=torch.Generator().manual_seed(settings.seed))
            density = flow.log_prob(x)
        projection = "3d" if flow.features == 3 else None
        for row, points in enumerate((rows[:draws], x)):
            panel = figure.add_subplot(
                2, len(shown), row * len(shown) + column + 1, projection=projection
            )
            colors = {"c": density, "cmap": "viridis"} if row else {"color": "black"}
            panel.scatter(*points.T, s=1, **colors)
            panel.set_title(f"{name}: {('held-out rows', 'draws')[row]}", fontsize=TITLE_SIZE)
            panel.set_aspect("equal")
    save_figure(figure, settings.out / "conformal.png")
