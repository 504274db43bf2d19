"""An i-ResNet as classifier, density and generator of handwritten digits in one.

Run as ``python -m experiments.hybrid``; ``--help`` lists the settings. The digits are those of
`experiments.digits`, with their labels. The flow learns by `HybridObjective`, and the same flow
without labels, for as many steps, by maximum likelihood.

Claim: the hybrid classifies at least 97 % of the test images, and as a density it is within 0.1
bits per dimension of the flow without labels.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from benchmarks.files import write_text
from benchmarks.settings import check_counts
from cnf import Flow, MaximumLikelihood, Standardize, TrainingConfig, baselines, fit, save
from cnf.objectives import HybridObjective, Objective
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import TITLE_SIZE
from experiments.compare import with_exact_log_dets
from experiments.digits import PIXELS, Bits, mosaic, pixels_as_reals
from experiments.digits_data import CLASSES, LEVELS, Digits, read, read_labels, read_scikit_learn


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train an i-ResNet as classifier, density and generator of digits of 8 x 8 pixels."""

    data: Path | None = None
    """An .npz file with images as for `experiments.digits`, and their labels y_train, y_val and
    y_test, integers from 0 to 9; None for the digits of scikit-learn."""
    size: int = 32
    """Width of the hidden layers."""
    likelihood_weight: float = 1 / PIXELS
    """Weight of the log-density beside that of the labels."""
    steps: int = 600
    """Training steps, with and without labels."""
    batch_size: int = 128
    """Images of a minibatch."""
    learning_rate: float = 0.01
    """Peak learning rate."""
    seed: int = 0
    """Seed of weights, noise and training."""
    out: Path = Path("runs/hybrid")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""
    progress: bool = True
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        check_counts(self, "size", "steps", "batch_size")


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What is measured on the test images; likelihoods with exact log-determinants."""

    accuracy: float
    """Share of the images that get their label, by one draw of the noise for each."""
    bits: Bits
    """By the flow with labels."""
    bits_without_labels: Bits
    """By the flow without."""
    seconds: float
    """Training with labels."""
    seconds_without_labels: float


def main(settings: Settings) -> Metrics:
    """Train with and without labels, measure, print, and write the results."""
    digits = read(settings.data) if settings.data else read_scikit_learn()
    labels = read_labels(settings.data)
    if settings.quick:
        quick = {"size": 4, "steps": 4, "batch_size": 32}
        settings = replace(settings, **quick, out=settings.out / "quick")
    settings.out.mkdir(parents=True, exist_ok=True)

    plain = MaximumLikelihood(build(digits.train, settings))
    seconds_without_labels = train(plain, digits.train, digits.validation, settings)
    hybrid = HybridObjective(
        build(digits.train, settings), CLASSES, likelihood_weight=settings.likelihood_weight
    )
    validation = (digits.validation, labels.validation)
    seconds = train(hybrid, (digits.train, labels.train), validation, settings)

    generator = torch.Generator().manual_seed(settings.seed)
    found = hybrid.classify(digits.test, generator=generator)
    metrics = Metrics(
        accuracy=float((found == labels.test).double().mean()),
        bits=bits_of(hybrid.flow, digits.test, settings.seed),
        bits_without_labels=bits_of(plain.flow, digits.test, settings.seed),
        seconds=seconds,
        seconds_without_labels=seconds_without_labels,
    )
    save(hybrid.flow, settings.out / "model.safetensors")
    draw(hybrid, digits, settings)
    write_text(settings.out / "metrics.json", json.dumps(asdict(metrics), indent=2))
    print(table(metrics))
    print(f"results in {settings.out}")
    return metrics


def build(x: Tensor, settings: Settings) -> Flow:
    """An i-ResNet of the standardised logits of images like `x`."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    logits = Flow(pixels_as_reals()).to_base(x, generator=generator)
    flow = baselines.build("iresnet", PIXELS, size=settings.size)
    return Flow([*pixels_as_reals(), Standardize.from_data(logits), *flow.transforms], flow.base)


def train(
    objective: Objective,
    data: Tensor | tuple[Tensor, Tensor],
    validation: Tensor | tuple[Tensor, Tensor],
    settings: Settings,
) -> float:
    """Train in place, and return the seconds."""
    started = time.perf_counter()
    fit(
        objective,
        data,
        TrainingConfig(
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            ema=0.99,
            validate_every=30,
            seed=settings.seed,
            progress=settings.progress,
        ),
        validation=validation,
    )
    return time.perf_counter() - started


@torch.no_grad()
def bits_of(flow: Flow, x: Tensor, seed: int) -> Bits:
    """Bits per dimension, a bound by one draw of the noise for each image."""
    generator = torch.Generator().manual_seed(seed)
    return Bits.of(with_exact_log_dets(flow).log_prob(x, generator=generator))


def table(metrics: Metrics) -> str:
    """The metrics as a table for people."""
    rows = [
        ("accuracy", f"{metrics.accuracy:.1%}"),
        ("test bits", metrics.bits),
        ("without labels", metrics.bits_without_labels),
        ("training", f"{metrics.seconds:.1f} s"),
        ("without labels", f"{metrics.seconds_without_labels:.1f} s"),
    ]
    return "\n".join(["hybrid", *(f"  {name:<20}{value}" for name, value in rows)])


def draw(hybrid: HybridObjective, digits: Digits, settings: Settings) -> None:
    """Real digits, and samples of the flow in rows by the class that it finds in them."""
    generator = torch.Generator().manual_seed(settings.seed)
    samples = hybrid.flow.sample(100 * CLASSES, generator=generator)
    classes = hybrid.classify(samples, generator=generator)
    each = [samples[classes == label][:CLASSES] for label in range(CLASSES)]
    rows = torch.cat(
        [torch.cat([few, few.new_zeros(CLASSES - len(few), *few.shape[1:])]) for few in each]
    )
    figure, ((left, right),) = figure_grid(1, 2, panel_size=4)
    for panel, images, title in (
        (left, digits.train, "training images"),
        (right, rows, "samples, in rows by the class that the flow finds"),
    ):
        panel.imshow(mosaic(images, CLASSES).numpy(), cmap="gray_r", vmin=0, vmax=LEVELS - 1)
        panel.set_title(title, fontsize=TITLE_SIZE)
        panel.set_axis_off()
    save_figure(figure, settings.out / "figure.png")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"hybrid: {error}")
