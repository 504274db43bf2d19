"""Does x -> z -> x come back, far from the data too? A coupling flow beside a CNF.

Run as ``python -m experiments.stability``; ``--help`` lists the settings. Both flows learn the same
toy set in float32. Then rings of points farther and farther from the data go to the base and back.
What is shown is the largest error of the round trip, and how much the inverse can stretch an error:
1 over the smallest singular value of the Jacobian of the way to the base.

After Behrmann et al. (2021), Understanding and Mitigating Exploding Inverses in Invertible Neural
Networks. https://arxiv.org/abs/2006.09347

Both are float32, the CNF solved at its usual tolerance of 1e-5, which limits its round trip.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from benchmarks.files import write_text
from benchmarks.settings import check_counts
from cnf import CNF, Flow, ODESolver, Standardize, TrainingConfig, fit, recipe
from cnf.data.toy import TOY_NAMES, toy_density
from cnf.transforms import AffineCoupling

BOUND = 10.0
"""Of the logarithm of a coupling's scale: two of them exceed the digits of float32."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Does x -> z -> x come back, far from the data too? A coupling flow beside a CNF."""

    data: str = "8gaussians"
    """The toy set."""
    layers: int = 8
    """Affine couplings."""
    steps: int = 3000
    """Steps of maximum likelihood of the couplings, and of matching of the CNF."""
    distances: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    """Radii of the rings, in standard deviations of the data."""
    points: int = 256
    """Points on each ring."""
    rows: int = 20_000
    """Rows to train on."""
    seed: int = 0
    """Seed of data, weights and training."""
    out: Path = Path("runs/stability")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "layers", "steps", "points", "rows")
        if self.data not in TOY_NAMES:
            raise ValueError(f"data must be one of {TOY_NAMES}; got {self.data!r}.")


@dataclass(frozen=True, kw_only=True)
class Ring:
    """What is seen on one ring."""

    flow: str
    distance: float
    round_trip: float
    """Largest error of x -> z -> x, in standard deviations of the data."""
    inverse_lipschitz: float
    """Largest factor by which the way back stretches a small error, in the same units."""


def main(settings: Settings) -> list[Ring]:
    """Train both, look, print and write."""
    if settings.quick:
        settings = replace(
            settings,
            layers=2,
            steps=3,
            points=8,
            distances=(1.0, 4.0),
            rows=100,
            out=settings.out / "quick",
        )
    x = toy_density(settings.data).sample(
        settings.rows, generator=torch.Generator().manual_seed(settings.seed)
    )
    rings: list[Ring] = []
    for name, flow in trained(x, settings).items():
        rings += [look(name, flow, distance, settings) for distance in settings.distances]
    settings.out.mkdir(parents=True, exist_ok=True)
    written = table(rings)
    content = {"settings": asdict(settings), "rings": list(map(asdict, rings))}
    write_text(settings.out / "results.json", json.dumps(content, indent=2, default=str))
    write_text(settings.out / "table.md", written)
    print(written)
    print(f"results in {settings.out}")
    return rings


def trained(x: Tensor, settings: Settings) -> dict[str, Flow]:
    """Both flows, by name."""
    torch.manual_seed(settings.seed)
    couplings = Flow(
        [
            Standardize.from_data(x),
            *(
                AffineCoupling(2, mask="first" if i % 2 else "last", bound=BOUND)
                for i in range(settings.layers)
            ),
        ]
    )
    fit(
        couplings,
        x,
        TrainingConfig(steps=settings.steps, learning_rate=1e-3, progress=False),
        validation=None,
    )
    continuous = CNF(2)
    few = max(1, settings.steps // 60)
    fit(
        continuous,
        x,
        recipe(matching_steps=settings.steps, likelihood_steps=few, progress=False),
        validation=None,
    )
    return {"couplings": couplings, "CNF": continuous}


def look(name: str, flow: Flow, distance: float, settings: Settings) -> Ring:
    """The round trip from a ring around the mean, and the Jacobian on it."""
    standardize = flow.chain[0]
    angle = torch.linspace(0, 2 * math.pi, settings.points + 1)[:-1]
    ring = distance * torch.stack([angle.cos(), angle.sin()], -1)
    with torch.no_grad():
        x = standardize.to_data(ring)
        try:
            back = flow.to_data(flow.to_base(x))
            largest = float((standardize.to_base(back) - ring).abs().max())
        except ValueError:  # z is not finite, or has no x that is
            largest = math.inf
    scaled = (jacobian(flow, x) * standardize.log_std.exp()).double()
    finite = bool(scaled.isfinite().all())
    smallest = float(torch.linalg.svdvals(scaled)[:, -1].min()) if finite else 0.0
    return Ring(
        flow=name,
        distance=distance,
        round_trip=largest,
        inverse_lipschitz=1 / smallest if smallest else math.inf,
    )


def jacobian(flow: Flow, x: Tensor) -> Tensor:
    """Of the way to the base, for each row."""
    x = x.clone().requires_grad_()
    z = flow.using(solver=ODESolver(rtol=1e-5, atol=1e-5)).to_base(x)
    rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in z.unbind(-1)]
    return torch.stack(rows, -2)


def table(rings: list[Ring]) -> str:
    """A row for each distance."""
    names = list(dict.fromkeys(ring.flow for ring in rings))
    heads = ["distance", *(f"{name}: {what}" for name in names
                           for what in ("round trip", "inverse Lipschitz"))]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for distance in dict.fromkeys(ring.distance for ring in rings):
        cells = [f"{distance:g}"]
        for ring in rings:
            if ring.distance == distance:
                cells += [f"{ring.round_trip:.1e}", f"{ring.inverse_lipschitz:.1e}"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"stability: {error}")
