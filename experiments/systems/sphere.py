"""Flows on the sphere: places on the Earth, beside mixtures without a network.

Claim: a continuous flow on the sphere, trained by Riemannian flow matching from a uniform base,
learns densities with sharp features. Beside it stand two models without a network, which may be
better: a mixture of von Mises-Fisher distributions by expectation-maximisation, and kernels around
the training rows, which say how much of a likelihood comes from places that repeat. The last model
is the mixture of the flow and the kernels, with the share of the flow that is best for the
validation rows.

``--data`` is an .npz file with arrays of latitudes and longitudes in degrees, a row for each place,
named as in `_PLACES`; without one, the density is a spiral. The splits are random, 80/10/10, by
``numpy.random.RandomState(seed)``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import matplotlib.figure
import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import markdown
from cnf import CNF, FlowMatching, ODESolver, TrainingConfig, fit
from cnf.bases import VonMisesFisherMixture
from cnf.manifolds import Sphere
from cnf.plots import save_figure
from experiments.systems.settings import Settings

_PLACES = {"earthquake": (5, 1000), "fire": (5, 1000), "volcano": (5, 300), "cities": (1, 1000)}
"""Sets of places, each with the number of splits, and of steps of training."""
_MODELS = ("EM mixture", "kernels", "flow", "flow and kernels")

_SPHERE = Sphere(3)
_FINEST = math.radians(0.1)
"""Standard deviation of the narrowest kernel: about 11 km."""
_NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64, 128)
_LEAST_SHARE = 0.01
_MOST_ROWS = 13_000
"""Most rows of a set: of more, a part is drawn at random."""


@dataclass(frozen=True)
class _Split:
    """Unit vectors of one split."""

    training: Tensor
    validation: Tensor
    test: Tensor


def show(settings: Settings) -> str:
    """Fit all models to each set and split; return the table of their test NLL."""
    rows, maps = [], {}
    for name, steps, splits in _sets(settings):
        of_splits = []
        for seed, split in enumerate(splits):
            torch.manual_seed(seed)
            scores, densities = _scores(split, steps, settings)
            is_new = are_new(split.test, split.training)
            repeated = 1 - float(is_new.double().mean())
            nll = [-float(score.mean()) for score in scores]
            of_splits.append([100 * repeated, *nll, *(-float(s[is_new].mean()) for s in scores)])
            maps.setdefault(name, (split.test, densities))
        repeated, *values = zip(*of_splits, strict=True)
        cells = [_mean_and_spread(value) for value in values]
        new = [f"{float(np.mean(value)):.2f}" for value in values[len(_MODELS) :]]
        share = f"{np.mean(repeated):.0f} %"
        rows.append([name, *cells[: len(_MODELS)], share, " / ".join(new)])
    _draw(maps, settings)
    return markdown(["test NLL, nats", *_MODELS, "repeated", "NLL of the others"], rows)


def _sets(settings: Settings) -> Iterator[tuple[str, int, list[_Split]]]:
    """Yield the name of each set, the steps of training, and its splits."""
    if settings.data is None:
        x = _spiral(settings.choose(4000, 400), settings.seed)
        yield "spiral", settings.choose(2000, 20), [_split(x, settings.seed)]
        return
    with np.load(settings.data) as file:
        for name, (splits, steps) in _PLACES.items():
            latitude, longitude = torch.as_tensor(np.radians(file[name])).unbind(-1)
            some = np.random.RandomState(settings.seed).permutation(len(latitude))[:_MOST_ROWS]
            x = _directions(latitude, longitude).float()
            x = x[torch.as_tensor(some)] if len(x) > _MOST_ROWS else x
            yield name, steps, [_split(x, settings.seed + seed) for seed in range(splits)]


def _directions(latitude: Tensor, longitude: Tensor) -> Tensor:
    around = latitude.cos()
    return torch.stack([around * longitude.cos(), around * longitude.sin(), latitude.sin()], -1)


def _split(x: Tensor, seed: int) -> _Split:
    order = np.random.RandomState(seed).permutation(len(x))
    parts = np.split(order, [int(0.8 * len(x)), int(0.9 * len(x))])
    return _Split(*(x[torch.as_tensor(part)] for part in parts))


def _spiral(rows: int, seed: int) -> Tensor:
    """Draw around a spiral from pole to pole, more narrowly on the way north."""
    generator = torch.Generator().manual_seed(seed)
    height = torch.linspace(-0.95, 0.95, 200)
    around, radius = 4 * math.pi * height, (1 - height.square()).sqrt()
    means = torch.stack([radius * around.cos(), radius * around.sin(), height], -1)
    spiral = VonMisesFisherMixture(_SPHERE, len(means))
    concentrations = torch.logspace(1.5, 3.5, len(means)).unsqueeze(-1)
    spiral.set_components(torch.zeros(len(means)), _SPHERE.project(means), concentrations)
    return spiral.rsample(torch.Size([rows]), generator=generator)


def _scores(
    split: _Split, steps: int, settings: Settings
) -> tuple[list[Tensor], list[VonMisesFisherMixture | CNF]]:
    """Return the log-densities of the test rows by each of `_MODELS`, and kernels and flow."""
    sizes = settings.choose((50, 200), (8,))
    mixtures = [VonMisesFisherMixture.from_data(split.training, _SPHERE, size) for size in sizes]
    mixture = max(mixtures, key=lambda model: float(model.log_prob(split.validation).mean()))
    kernels = _kernels(split.training, split.validation)
    flow = _flow(split, steps)
    with torch.no_grad():
        held_out, scores = (
            torch.stack([model.log_prob(x).double() for model in (mixture, kernels, flow)])
            for x in (split.validation, split.test)
        )
    shares = _shares(held_out[1:])
    both = (scores[1:] + shares.log().unsqueeze(-1)).logsumexp(0)
    return [*scores, both], [kernels, flow]


def _flow(split: _Split, steps: int) -> CNF:
    """Train a flow from a uniform base."""
    solver = ODESolver(rtol=1e-3, atol=1e-3, error_norm="points_and_ladj")
    flow = CNF(3, manifold=_SPHERE, hidden_features=(256, 256, 256), frequency=12.0, solver=solver)
    config = TrainingConfig(
        objective=partial(FlowMatching, times="late"),
        steps=steps,
        learning_rate=2e-3,
        ema=0.99,
        progress=False,
    )
    fit(flow, split.training, config, validation=None, accuracy=None)
    return flow


def _shares(scores: Tensor) -> Tensor:
    """Return the shares of models ``(models, rows)`` in the mixture most likely for the rows."""
    shares = torch.full_like(scores[:, 0], 1 / len(scores))
    for _ in range(300):
        shares = (scores + shares.log().unsqueeze(-1)).softmax(0).mean(-1)
    return shares


def _kernels(training: Tensor, validation: Tensor) -> VonMisesFisherMixture:
    """Return a mixture of kernels around the training rows, of several widths.

    The width of a kernel is the distance of a neighbour, or half of it, or the narrowest one. The
    shares of the widths, and of a uniform density, maximise the likelihood of the validation rows.
    """
    most = min(_NEIGHBOURS[-1] + 1, len(training))
    distances = torch.cdist(training.double(), training.double())
    nearest = distances.topk(most, largest=False).values
    near = nearest[:, [min(number, most - 1) for number in _NEIGHBOURS]]
    widths = torch.cat([near, near / 2, torch.zeros_like(near[:, :1])], -1).clamp(min=_FINEST)
    concentrations = 1 / widths.square()
    uniform = validation.new_full((len(validation),), -_SPHERE.log_volume)
    scores = [_around(training, column).log_prob(validation) for column in concentrations.T]
    shares = _shares(torch.stack([*scores, uniform]).double())
    kept = shares[:-1] >= _LEAST_SHARE
    weights = torch.cat([shares[:-1][kept] / len(training), shares[-1:].clamp(min=1e-4)])
    counts = torch.tensor([len(training)] * int(kept.sum()) + [1])
    mixture = VonMisesFisherMixture(_SPHERE, int(counts.sum()))
    means = torch.cat([training.repeat(int(kept.sum()), 1), training[:1]])
    flat = torch.cat([concentrations.T[kept].flatten(), concentrations.new_zeros(1)])
    mixture.set_components(weights.log().repeat_interleave(counts), means, flat.unsqueeze(-1))
    return mixture


def _around(means: Tensor, concentrations: Tensor) -> VonMisesFisherMixture:
    mixture = VonMisesFisherMixture(_SPHERE, len(means))
    mixture.set_components(torch.zeros(len(means)), means, concentrations.unsqueeze(-1))
    return mixture


def are_new(x: Tensor, others: Tensor) -> Tensor:
    """Return the mask of the rows that equal none of the others."""
    # By products, as torch does for many rows, rounding would hide or make distances of 3 km.
    exact = "donot_use_mm_for_euclid_dist"
    return (torch.cdist(x, others, compute_mode=exact) > 0).all(-1)


def _mean_and_spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def _draw(
    maps: dict[str, tuple[Tensor, list[VonMisesFisherMixture | CNF]]], settings: Settings
) -> None:
    """Draw the test rows and the densities of each set on maps of the whole sphere."""
    size = settings.choose(60, 10)
    latitude = math.pi * ((torch.arange(size) + 0.5) / size - 0.5)
    longitude = math.pi * ((torch.arange(2 * size) + 0.5) / size - 1)
    grid = torch.meshgrid(latitude, longitude, indexing="ij")
    points = _SPHERE.project(_directions(*grid)).flatten(0, 1)
    figure = matplotlib.figure.Figure(figsize=(9, 2.1 * len(maps)), layout="constrained")
    for row, (name, (test, densities)) in enumerate(maps.items()):
        titles = (f"{name}: test rows", *_MODELS[1:3])
        axes = [
            figure.add_subplot(len(maps), 3, 3 * row + column, projection="mollweide")
            for column in range(1, 4)
        ]
        for panel, title in zip(axes, titles, strict=True):
            panel.set_title(title, fontsize=9)
            panel.set(xticks=[], yticks=[])
        east = torch.atan2(test[:, 1], test[:, 0])
        north = test[:, 2].clamp(-1, 1).arcsin()
        axes[0].scatter(east.numpy(), north.numpy(), s=1, linewidths=0)
        for panel, density in zip(axes[1:], densities, strict=True):
            with torch.no_grad():
                log_prob = density.log_prob(points).view(size, 2 * size)
            shown = log_prob.clamp(-6, 4).numpy()
            panel.pcolormesh(
                longitude.numpy(), latitude.numpy(), shown, cmap="magma", rasterized=True
            )
    save_figure(figure, settings.out / "sphere.png")
