"""Does x -> z -> x come back, far from the data too? Coupling flows, with and without remedies.

Run as ``python -m experiments.stability``; ``--help`` lists the settings. Flows learn the same toy
set in float32: affine couplings with large scales, their remedies, spline couplings and a CNF. Then
rings of points farther and farther from the data go to the base and back. Shown are the largest
error of the round trip, and how much the inverse can stretch an error: 1 over the smallest singular
value of the Jacobian of the way to the base. Then couplings learn to classify, by labels alone.

Claim: bounded scales keep the inverse stable on all rings at no cost in test nats. The penalty of
`BiLipschitz` keeps it stable at the data of a classifier at no cost in accuracy, and not far away.

After Behrmann et al. (2021), Understanding and Mitigating Exploding Inverses in Invertible Neural
Networks. https://arxiv.org/abs/2006.09347

All is float32; `fit` calibrates the solver of the CNF, whose accuracy limits its round trip.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro
import zuko
from torch import Tensor

from benchmarks.files import write_text
from benchmarks.settings import check_counts
from benchmarks.timing import markdown
from cnf import CNF, Flow, MaximumLikelihood, ODESolver, Standardize, TrainingConfig, fit, recipe
from cnf.adapters import FromZuko
from cnf.data.toy import TOY_NAMES, toy_density
from cnf.objectives import BiLipschitz, HybridObjective, Objective
from cnf.transforms import AdditiveCoupling, Affine, AffineCoupling, Coupling

LARGE = 10.0
"""Bound of the logarithm of a coupling's scale: two of them exceed the digits of float32."""
SMALL = math.log(2) / 2
"""Bound with a ratio of 2 between the largest and the smallest scale."""
MODES = 8
"""Number of modes of "8gaussians", whose classes alternate."""
TRAINING = TrainingConfig(learning_rate=1e-3, progress=False)
"""Training of a coupling flow."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Does x -> z -> x come back, far from the data too? Coupling flows and their remedies."""

    data: str = "8gaussians"
    """The toy set of the densities."""
    layers: int = 8
    """Couplings; half as many with splines."""
    steps: int = 1500
    """Steps of maximum likelihood of the couplings, and of matching of the CNF."""
    classifier_steps: int = 1000
    """Steps of the classifiers."""
    penalty: float = 1e-3
    """Weight of the bi-Lipschitz penalty."""
    likelihood_weight: float = 1e-2
    """Weight of the log-density in a classifier."""
    distances: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 32.0)
    """Radii of the rings, in standard deviations of the data."""
    points: int = 256
    """Points on each ring."""
    rows: int = 20_000
    """Rows to train on, and to test on."""
    seed: int = 0
    """Seed of data, weights and training."""
    out: Path = Path("runs/stability")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "layers", "steps", "classifier_steps", "points", "rows")
        if self.data not in TOY_NAMES:
            raise ValueError(f"data must be one of {TOY_NAMES}; got {self.data!r}.")


@dataclass(frozen=True, kw_only=True)
class Inverse:
    """How well points come back."""

    round_trip: float
    """Largest error of x -> z -> x, in standard deviations of the data."""
    lipschitz: float
    """Largest factor by which the way back stretches a small error, in the same units."""


@dataclass(frozen=True, kw_only=True)
class Density:
    """What a flow is worth as a density, and on each ring."""

    flow: str
    nats: float
    """Mean negative log-likelihood of the test rows."""
    rings: list[Inverse]


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """What a classifier is worth, and its flow at the test rows."""

    trained_by: str
    accuracy: float
    inverse: Inverse


def main(settings: Settings) -> tuple[list[Density], list[Classifier]]:
    """Train all, look, print and write."""
    if settings.quick:
        settings = replace(
            settings,
            layers=2,
            steps=3,
            classifier_steps=3,
            points=8,
            distances=(1.0, 4.0),
            rows=100,
            out=settings.out / "quick",
        )
    densities = [density(name, flow, settings) for name, flow in trained(settings)]
    classifiers = classified(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    written = "\n".join([*tables(densities, settings), classifier_table(classifiers)])
    content = {
        "settings": asdict(settings),
        "densities": list(map(asdict, densities)),
        "classifiers": list(map(asdict, classifiers)),
    }
    write_text(settings.out / "results.json", json.dumps(content, indent=2, default=str))
    write_text(settings.out / "table.md", written)
    print(written)
    print(f"results in {settings.out}")
    return densities, classifiers


def trained(settings: Settings) -> Iterator[tuple[str, Flow]]:
    """Train each flow, by name."""
    x = rows(settings.data, settings, offset=0)
    makers: dict[str, Callable[[], Objective]] = {
        "affine, scales to exp(10)": lambda: MaximumLikelihood(affine(x, LARGE, settings)),
        "the same, with the penalty": lambda: BiLipschitz(
            MaximumLikelihood(affine(x, LARGE, settings)), weight=settings.penalty
        ),
        "affine, scales to sqrt(2)": lambda: MaximumLikelihood(affine(x, SMALL, settings)),
        "additive": lambda: MaximumLikelihood(additive(x, settings)),
        "splines, slope=0.001": lambda: MaximumLikelihood(splines(x, 1e-3, settings)),
        "splines, slope=0.1": lambda: MaximumLikelihood(splines(x, 1e-1, settings)),
    }
    for name, make in makers.items():
        torch.manual_seed(settings.seed)
        objective = make()
        fit(objective, x, replace(TRAINING, steps=settings.steps), validation=None)
        yield name, objective.flow
    torch.manual_seed(settings.seed)
    continuous, few = CNF(2), max(1, settings.steps // 60)
    phases = recipe(matching_steps=settings.steps, likelihood_steps=few, progress=False)
    fit(continuous, x, phases, validation=None)
    yield "CNF", continuous


def classified(settings: Settings) -> list[Classifier]:
    """Train classifiers by large couplings, and one by couplings with bounded scales."""
    x, test = (rows("8gaussians", settings, offset=offset) for offset in (0, 1))
    labels, true = (
        (torch.atan2(y, x) * MODES / (2 * math.pi)).round().long() % 2
        for x, y in (each.unbind(-1) for each in (x, test))
    )
    results = []
    for trained_by, bound, likelihood_weight, penalised in (
        ("cross-entropy alone", LARGE, 0.0, False),
        ("the same, scales to sqrt(2)", SMALL, 0.0, False),
        (
            f"{settings.likelihood_weight:g} log p(x) added",
            LARGE,
            settings.likelihood_weight,
            False,
        ),
        (f"{settings.penalty:g} penalty added", LARGE, 0.0, True),
    ):
        torch.manual_seed(settings.seed)
        flow = affine(x, bound, settings)
        hybrid = HybridObjective(flow, 2, likelihood_weight=likelihood_weight)
        objective = BiLipschitz(hybrid, weight=settings.penalty) if penalised else hybrid
        config = replace(TRAINING, steps=settings.classifier_steps)
        fit(objective, (x, labels), config, validation=None)
        accuracy = float((hybrid.classify(test) == true).float().mean())
        results.append(
            Classifier(trained_by=trained_by, accuracy=accuracy, inverse=inverse(flow, test))
        )
    return results


def rows(data: str, settings: Settings, *, offset: int) -> Tensor:
    """Rows of a toy set."""
    generator = torch.Generator().manual_seed(settings.seed + offset)
    return toy_density(data).sample(settings.rows, generator=generator)


def couplings(kind: Callable[..., Coupling], settings: Settings) -> list[Coupling]:
    """Couplings of alternating halves."""
    return [kind(2, mask="first" if i % 2 else "last") for i in range(settings.layers)]


def affine(x: Tensor, bound: float, settings: Settings) -> Flow:
    """Affine couplings."""
    kind = partial(AffineCoupling, bound=bound)
    return Flow([Standardize.from_data(x), *couplings(kind, settings)])


def additive(x: Tensor, settings: Settings) -> Flow:
    """Additive couplings and one scale for each feature."""
    layers = couplings(AdditiveCoupling, settings)
    for layer in layers:  # from zero weights, symmetric data have a gradient of zero
        torch.nn.init.normal_(layer.conditioner.layers[-1].weight, std=0.1)
    return Flow([Standardize.from_data(x), *layers, Affine(2)])


def splines(x: Tensor, slope: float, settings: Settings) -> Flow:
    """Couplings of zuko by rational-quadratic splines."""
    flow = zuko.flows.NICE(
        2,
        transforms=max(1, settings.layers // 2),
        univariate=partial(zuko.transforms.MonotonicRQSTransform, slope=slope),
        shapes=[(8,), (8,), (7,)],
        hidden_features=(64, 64),
    )
    return Flow([Standardize.from_data(x), FromZuko(flow.transform, 2)])


def density(name: str, flow: Flow, settings: Settings) -> Density:
    """Measure a trained flow."""
    angle = torch.linspace(0, 2 * math.pi, settings.points + 1)[:-1]
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    with torch.no_grad():
        nats = -float(flow.log_prob(rows(settings.data, settings, offset=1)).mean())
        rings = [flow.chain[0].to_data(radius * circle) for radius in settings.distances]
    return Density(flow=name, nats=nats, rings=[inverse(flow, ring) for ring in rings])


def inverse(flow: Flow, x: Tensor) -> Inverse:
    """Measure the round trip from points, and the Jacobian there."""
    standardize = flow.chain[0]
    with torch.no_grad():
        try:
            error = standardize.to_base(flow.to_data(flow.to_base(x))) - standardize.to_base(x)
            largest = float(error.abs().max())
        except ValueError:  # z is not finite, or has no x that is
            largest = math.inf
    scaled = (jacobian(flow, x) * standardize.log_std.exp()).double()
    finite = scaled.isfinite().all()
    smallest = float(torch.linalg.svdvals(scaled)[:, -1].min()) if finite else 0.0
    return Inverse(round_trip=largest, lipschitz=1 / smallest if smallest else math.inf)


def jacobian(flow: Flow, x: Tensor) -> Tensor:
    """Of the way to the base, for each row."""
    x = x.clone().requires_grad_()
    z = flow.using(solver=ODESolver(rtol=1e-5, atol=1e-5)).to_base(x)
    rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in z.unbind(-1)]
    return torch.stack(rows, -2)


def tables(densities: list[Density], settings: Settings) -> list[str]:
    """Tables of the rings: a row for each flow."""
    at = [f"at {distance:g}" for distance in settings.distances]
    stretches = [
        [each.flow, f"{each.nats:.3f}", *(f"{ring.lipschitz:.1e}" for ring in each.rings)]
        for each in densities
    ]
    errors = [[each.flow, *(f"{ring.round_trip:.1e}" for ring in each.rings)] for each in densities]
    return [
        markdown(["inverse Lipschitz", "test nats", *at], stretches),
        markdown(["round trip", *at], errors),
    ]


def classifier_table(classifiers: list[Classifier]) -> str:
    """A row for each classifier."""
    lines = []
    for each in classifiers:
        numbers = (each.inverse.lipschitz, each.inverse.round_trip)
        found = [f"{each.accuracy:.2%}", *(f"{number:.1e}" for number in numbers)]
        lines.append([each.trained_by, *found])
    return markdown(["classifier", "test accuracy", "inverse Lipschitz", "round trip"], lines)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"stability: {error}")
