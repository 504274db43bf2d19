"""Reconstruction of digits from a code, by flows that are autoencoders.

A conformal embedding (CEF), a pseudo-invertible encoder (PIE) and an autoencoder within a flow
(AEF) start from the principal components of the rows, and learn a likelihood: CEF of the
projections on a surface, the others of the images. The extended form of AEF starts from nothing,
and learns a joint density of an image and its code, no likelihood. The simple answers are the
principal components themselves, and an ordinary autoencoder, a network trained for the squared
error alone.

Claim: CEF, and AEF from four features on, lose less than principal components of the same number;
the ordinary autoencoder, without a likelihood, loses least.
References: https://arxiv.org/abs/2106.05275, https://arxiv.org/abs/2111.00619,
https://arxiv.org/abs/2205.09546
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from benchmarks.timing import markdown
from cnf import Flow, MaximumLikelihood, TrainingConfig, fit
from cnf.flows import PseudoInvertibleEncoder
from cnf.objectives import ExtendedAutoencoder, ManifoldLikelihood, Objective
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import TITLE_SIZE
from cnf.transforms import (
    Affine,
    AffineCoupling,
    Augment,
    AutoencoderCoupling,
    ConformalEmbedding,
    FactorOut,
    MLPConditioner,
    Orthogonal,
    Permute,
    PiecewiseConformal,
    Similarity,
    SpecialConformal,
    Transform,
)
from experiments.digits_data import SIDE
from experiments.digits_fit import PIXELS, digits
from experiments.systems.settings import Settings

_LEVELS_PER_UNIT = 8
"""Levels of grey in a unit of x, in which principal components are of order 1."""
_STD = 0.1
_WEIGHT = 10.0
_HIDDEN = (128,)

Reconstruct: TypeAlias = Callable[[Tensor], Tensor]


def show(settings: Settings) -> str:
    """Return the table of the root mean square errors."""
    images = digits(settings.data)
    torch.manual_seed(settings.seed)
    train, validation, test = (_as_rows(part) for part in images)
    sizes = settings.choose((2, 4, 8, 16), (2,))
    errors: dict[str, list[str]] = {}
    for size in sizes:
        reconstructs = _fitted(train, validation, size, settings)
        with torch.no_grad():
            made = {name: reconstruct(test) for name, reconstruct in reconstructs.items()}
        for name, x in made.items():
            error = _LEVELS_PER_UNIT * (x - test).square().mean().sqrt()
            errors.setdefault(name, []).append(f"{float(error):.2f}")
        if size == 8 or settings.quick:
            _draw({"test images": test, **made}, settings)
    heads = ["code", *(f"error, {size} features" for size in sizes)]
    return markdown(heads, [[name, *each] for name, each in errors.items()])


def _as_rows(images: Tensor) -> Tensor:
    """Return dequantised images as rows."""
    levels = images.flatten(1)
    return (levels + torch.rand_like(levels)) / _LEVELS_PER_UNIT


def _fitted(x: Tensor, validation: Tensor, size: int, settings: Settings) -> dict[str, Reconstruct]:
    """Return the reconstruction by each model with a code of `size` features."""

    def trained(objective: Objective) -> Flow:
        config = TrainingConfig(
            steps=settings.choose(1200, 4),
            batch_size=128,
            learning_rate=1e-3,
            validate_every=settings.choose(100, 4),
            seed=settings.seed,
            progress=False,
        )
        fit(objective, x, config, validation=validation)
        return objective.flow

    directions = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
    components = directions[:size]
    torch.manual_seed(settings.seed)
    surface = trained(ManifoldLikelihood(_conformal(x, directions, size), weight=_WEIGHT))
    pie = PseudoInvertibleEncoder([_rotation(x, directions), *_couplings(PIXELS)], size, std=_STD)
    trained(MaximumLikelihood(pie))
    networks = {
        "encoder": MLPConditioner(PIXELS - size, 2 * size, hidden_features=_HIDDEN),
        "decoder": MLPConditioner(size, 2 * (PIXELS - size), hidden_features=_HIDDEN),
    }
    coupling = AutoencoderCoupling(PIXELS, size, **networks)
    rotation = _rotation(x, directions)
    trained(MaximumLikelihood(Flow([rotation, coupling, _prior(size, PIXELS)])))
    extended = AutoencoderCoupling(
        PIXELS + size,
        size,
        encoder=MLPConditioner(PIXELS, 2 * size, hidden_features=_HIDDEN),
        decoder=MLPConditioner(size, 2 * PIXELS, hidden_features=_HIDDEN),
    )
    core_first = Permute([*range(PIXELS, PIXELS + size), *range(PIXELS)])
    joint = ExtendedAutoencoder(
        Flow([Augment(PIXELS, size), core_first, extended, _prior(size, PIXELS + size)])
    )
    trained(joint)
    return {
        "principal components": lambda y: x.mean(0) + (y - x.mean(0)) @ components.T @ components,
        "CEF": lambda y: surface.to_data(surface.to_base(y)),
        "PIE": lambda y: pie.decode(pie.encode(y)),
        "AEF": lambda y: rotation.to_data(coupling.decode(coupling.encode(rotation.to_base(y)))),
        "extended AEF": lambda y: extended.decode(
            extended.encode(torch.cat([joint.core(y), y], -1))
        )[:, size:],
        "ordinary autoencoder": _autoencoder(x, validation, size, settings),
    }


def _rotation(x: Tensor, directions: Tensor) -> Orthogonal:
    """Return the rotation to the principal components, centred."""
    rotation = Orthogonal(PIXELS)
    rotation.set_to(directions, -directions @ x.mean(0))
    return rotation


def _prior(size: int, features: int) -> FactorOut:
    """Return a flow of the code, the first features."""
    return FactorOut([*_couplings(size), Affine(size)], features)


def _couplings(features: int) -> list[Transform]:
    kept, changed = features // 2, features - features // 2
    return [
        AffineCoupling(
            features, conditioner=MLPConditioner(*sizes, hidden_features=_HIDDEN), mask=mask
        )
        for _ in range(3)
        for mask, sizes in (("first", (kept, 2 * changed)), ("last", (changed, 2 * kept)))
    ]


def _conformal(x: Tensor, directions: Tensor, size: int) -> Flow:
    """Return a sphere in pieces, from the plane of the principal components."""
    maps = [_rotation(x, directions), Similarity(PIXELS), SpecialConformal(PIXELS)]
    maps += [PiecewiseConformal(PIXELS), SpecialConformal(PIXELS)]
    return Flow([ConformalEmbedding(maps, size), *_couplings(size), Affine(size)])


def _autoencoder(x: Tensor, validation: Tensor, size: int, settings: Settings) -> Reconstruct:
    """Return the reconstruction of a network, at its best on validation rows."""
    width = _HIDDEN[0]
    network = nn.Sequential(
        *(nn.Linear(PIXELS, width), nn.SiLU(), nn.Linear(width, size)),
        *(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, PIXELS)),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    best, weights = float("inf"), network.state_dict()
    for step in range(settings.choose(1200, 4)):
        rows = x[torch.randint(len(x), (128,))]
        optimizer.zero_grad()
        (network(rows) - rows).square().mean().backward()
        optimizer.step()
        if step % 100 == 0 or settings.quick:
            with torch.no_grad():
                error = float((network(validation) - validation).square().mean())
            if error < best:
                best = error
                weights = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(weights)
    return network


def _draw(made: dict[str, Tensor], settings: Settings) -> None:
    """Draw ten test images, and their reconstructions."""
    figure, axes = figure_grid(1, len(made), panel_size=1.6)
    figure.set_size_inches(1.6 * len(made), 4.2)
    for panel, (title, rows) in zip(axes[0], made.items(), strict=True):
        images = nn.functional.pad(rows[:10].view(10, SIDE, SIDE), (1, 1, 1, 1))
        pictures = images.unflatten(0, (5, 2)).transpose(1, 2).flatten(2).flatten(0, 1)
        panel.imshow(pictures.numpy(), cmap="gray_r", vmin=0, vmax=17 / _LEVELS_PER_UNIT)
        panel.set_title(title, fontsize=TITLE_SIZE - 2)
        panel.set(xticks=[], yticks=[])
    save_figure(figure, settings.out / "autoencoders.png")
