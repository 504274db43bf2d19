"""A multi-scale convolutional CNF on handwritten digits, in bits per dimension.

Run as ``python -m experiments.digits``; ``--help`` lists the settings. The digits have 8 x 8 pixels
of 17 levels: those of the UCI set that scikit-learn carries (Alpaydin and Kaynak, 1998,
https://archive.ics.uci.edu/ml/datasets/Optical+Recognition+of+Handwritten+Digits), or a file's.

Uniform noise makes the pixels continuous, so that the likelihood is a lower bound of the
log-probability of the integers, and its bits per dimension an upper bound of theirs.

Claim: the bound is lower than that of a Gaussian with full covariance of the noisy pixels. (The
Gaussian of their logits, measured too, is harder to beat.)
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.files import write_text
from benchmarks.settings import check_counts
from cnf import (
    Exact,
    Flow,
    History,
    Hutchinson,
    MaximumLikelihood,
    Standardize,
    TrainingConfig,
    count_evaluations,
    fit,
    save,
)
from cnf.metrics import bits_per_dim
from cnf.plots import figure_grid, plot_training, save_figure
from cnf.plots.figures import GREY, TEXT_SIZE, TITLE_SIZE
from cnf.regularizers import jacobian_frobenius, kinetic_energy
from cnf.transforms import (
    ContinuousTransform,
    Dequantize,
    FactorOut,
    Flatten,
    Logit,
    Squeeze,
    Transform,
)
from cnf.vector_fields import ConvField
from experiments.digits_data import LEVELS, SIDE, Digits, read, read_scikit_learn

PIXELS = SIDE * SIDE
IMAGE = (1, SIDE, SIDE)
WEIGHTS_AT_ONCE = 128
"""The exact divergence makes a product for each pixel and weight, which take memory."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train a multi-scale convolutional CNF on digits of 8 x 8 pixels."""

    data: Path | None = None
    """An .npz file with the arrays x_train, x_val and x_test of 8 x 8 integers from 0 to 16; None
    for the digits of scikit-learn."""
    channels: int = 32
    """Channels of each hidden layer."""
    steps: int = 600
    """Training steps."""
    batch_size: int = 128
    """Images of a minibatch."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    kinetic: float = 0.01
    """Weight of the kinetic energy of the paths."""
    frobenius: float = 0.01
    """Weight of the squared Frobenius norm of the Jacobian along the paths."""
    importance_samples: int = 4
    """Weights for each test image in the tighter bound."""
    seed: int = 0
    """Seed of weights, noise and training."""
    out: Path = Path("runs/digits")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""
    progress: bool = True
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        check_counts(self, "channels", "steps", "batch_size", "importance_samples")


@dataclass(frozen=True)
class Bits:
    """Bits per dimension."""

    mean: float
    standard_error: float
    """Over the images."""

    @classmethod
    def of(cls, log_prob: Tensor) -> "Bits":
        """Those of log-probabilities of images, in nats."""
        bits = bits_per_dim(log_prob.double(), PIXELS)
        return cls(float(bits.mean()), float(bits.std() / len(bits) ** 0.5))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f} bits/dim"


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What is measured on the test images, with the exact divergence."""

    likelihood: str
    bound: Bits
    """By the flow, one draw of the noise for each image."""
    tighter_bound: Bits
    """By the flow, `importance_samples` draws for each image."""
    importance_samples: int
    gaussian_of_pixels: Bits
    """By the Gaussian of the noisy pixels."""
    gaussian_of_logits: Bits
    """By the Gaussian of what the vector field is given."""
    nfe: int
    """Vector-field evaluations of a `log_prob`, in all scales."""
    training_seconds: float
    seconds: float


def main(settings: Settings) -> Metrics:
    """Train, measure, print, and write the results."""
    started = time.perf_counter()
    digits = read(settings.data) if settings.data else read_scikit_learn()
    if settings.quick:
        quick = {"channels": 4, "steps": 4, "batch_size": 32, "importance_samples": 2}
        settings = replace(settings, **quick, out=settings.out / "quick")
        digits = Digits(digits.train, digits.validation[:16], digits.test[:16])
    settings.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(settings.seed)
    flow = build(digits.train, settings.channels)
    history = fit(
        MaximumLikelihood(
            flow, {kinetic_energy: settings.kinetic, jacobian_frobenius: settings.frobenius}
        ),
        digits.train,
        TrainingConfig(
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            validate_every=50,
            seed=settings.seed,
            progress=settings.progress,
        ),
        validation=digits.validation,
    )

    flow = flow.using(divergence=Exact())
    save(flow, settings.out / "model.safetensors")
    history.save(settings.out / "history.csv")
    metrics = measure(flow, digits, history, settings, started)
    draw(flow, digits.test, history, metrics, settings)
    metrics = replace(metrics, seconds=time.perf_counter() - started)
    write_text(settings.out / "metrics.json", json.dumps(asdict(metrics), indent=2))
    print(table(metrics))
    print(f"results in {settings.out}")
    return metrics


def pixels_as_reals() -> list[Transform]:
    """Images of integers as vectors of real numbers."""
    return [Flatten(IMAGE), Dequantize(PIXELS, LEVELS), Logit(PIXELS, alpha=0.01)]


def build(x: Tensor, channels: int) -> Flow:
    """A flow of two scales, which starts from the standardised logits of images like `x`.

    An ODE moves whole images, and the next images of half the side and four times the channels.
    Half of these channels are then done; the others move on.
    """

    def convolutional(shape: tuple[int, int, int]) -> ContinuousTransform:
        field = ConvField(shape, hidden_channels=(channels, channels))
        return ContinuousTransform(field, divergence=Hutchinson())

    logits = Flow(pixels_as_reals()).to_base(x)
    return Flow(
        [
            *pixels_as_reals(),
            Standardize.from_data(logits),
            convolutional(IMAGE),
            Squeeze(IMAGE),
            convolutional((4, SIDE // 2, SIDE // 2)),
            FactorOut([convolutional((2, SIDE // 2, SIDE // 2))], features=PIXELS),
        ]
    )


@torch.no_grad()
def measure(
    flow: Flow, digits: Digits, history: History, settings: Settings, started: float
) -> Metrics:
    """Bits per dimension of the test images, by the flow and by Gaussians."""
    generator = torch.Generator().manual_seed(settings.seed)
    chunks = digits.test.split(WEIGHTS_AT_ONCE)
    with count_evaluations(flow) as nfe:
        bound = [flow.log_prob(chunk, generator=generator) for chunk in chunks]
    few = digits.test.split(max(1, WEIGHTS_AT_ONCE // settings.importance_samples))
    tighter_bound = [
        flow.log_prob(chunk, importance_samples=settings.importance_samples, generator=generator)
        for chunk in few
    ]
    logits = pixels_as_reals()
    pixels = logits[:-1]
    return Metrics(
        likelihood=flow.likelihood,
        bound=Bits.of(torch.cat(bound)),
        tighter_bound=Bits.of(torch.cat(tighter_bound)),
        importance_samples=settings.importance_samples,
        gaussian_of_pixels=Bits.of(gaussian_log_prob(pixels, digits, generator)),
        gaussian_of_logits=Bits.of(gaussian_log_prob(logits, digits, generator)),
        nfe=round(nfe.value / len(chunks)),
        training_seconds=history.seconds[-1],
        seconds=time.perf_counter() - started,
    )


def gaussian_log_prob(
    transforms: Sequence[Transform], digits: Digits, generator: torch.Generator
) -> Tensor:
    """Log-probability of the test images, in nats, by the Gaussian of the transformed train images.

    Its covariance is full. The value is a lower bound as that of a flow with these transforms is.
    """
    flow = Flow(transforms)
    rows = flow.to_base(digits.train, generator=generator).double().numpy()
    z, ladj = flow.to_base_and_ladj(digits.test, generator=generator)
    covariance = np.cov(rows, rowvar=False, bias=True)
    offset = z.double().numpy() - rows.mean(0)
    distance = (offset * np.linalg.solve(covariance, offset.T).T).sum(1)
    log_volume = np.linalg.slogdet(2 * math.pi * covariance).logabsdet
    return ladj.double() - torch.as_tensor(0.5 * (distance + log_volume))


def table(metrics: Metrics) -> str:
    """The metrics as a table for people."""
    rows = [
        ("test bits", metrics.bound),
        (f"with {metrics.importance_samples} weights", metrics.tighter_bound),
        ("likelihood", metrics.likelihood),
        ("Gaussian of pixels", metrics.gaussian_of_pixels),
        ("Gaussian of logits", metrics.gaussian_of_logits),
        ("nfe of a log_prob", metrics.nfe),
        ("training", f"{metrics.training_seconds:.1f} s"),
        ("in all", f"{metrics.seconds:.1f} s"),
    ]
    return "\n".join(["digits", *(f"  {name:<20}{value}" for name, value in rows)])


def draw(flow: Flow, x: Tensor, history: History, metrics: Metrics, settings: Settings) -> None:
    """Real digits, samples of the flow, and the training curve."""
    generator = torch.Generator().manual_seed(settings.seed)
    rows = min(10, math.isqrt(len(x)))
    samples = flow.sample(rows * rows, generator=generator)
    figure, ((left, middle, right),) = figure_grid(1, 3, panel_size=4)
    for panel, images, title in ((left, x, "test images"), (middle, samples, "samples")):
        panel.imshow(mosaic(images, rows).numpy(), cmap="gray_r", vmin=0, vmax=LEVELS - 1)
        panel.set_title(title, fontsize=TITLE_SIZE)
        panel.set_axis_off()
    nats = np.array([history.loss, history.validation])
    bits, measured = np.full_like(nats, np.nan), np.isfinite(nats)
    bits[measured] = bits_per_dim(torch.as_tensor(-nats[measured]), PIXELS)
    loss, validation = bits.tolist()
    columns = {"step": history.step, "loss": loss, "validation": validation}
    right.axhline(
        metrics.gaussian_of_logits.mean,
        color=GREY,
        linewidth=0.9,
        linestyle="--",
        label="Gaussian of logits, test",
    )
    plot_training(columns, ax=right, title="training")
    right.set_ylabel("bits per dimension, penalties included in the loss", fontsize=TEXT_SIZE)
    save_figure(figure, settings.out / "figure.png")


def mosaic(images: Tensor, rows: int) -> Tensor:
    """The first images, in as many columns as rows, with a line of 0 after each."""
    padded = torch.nn.functional.pad(images[: rows * rows, 0], (0, 1, 0, 1))
    side = SIDE + 1
    grid = padded.reshape(rows, rows, side, side)
    return grid.movedim(1, 2).reshape(rows * side, rows * side)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"digits: {error}")
