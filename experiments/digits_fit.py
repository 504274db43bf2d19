"""Fit a flow to the digits, and measure its bits per dimension."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cnf import Flow, TrainingConfig, fit
from cnf.metrics import bits_per_dim
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import TITLE_SIZE
from cnf.transforms import (
    ActNorm,
    AffineCoupling,
    Conv1x1,
    ConvConditioner,
    Dequantize,
    Flatten,
    Logit,
    Transform,
)
from experiments.digits_data import LEVELS, SIDE, Digits, read, read_scikit_learn

PIXELS = SIDE * SIDE
IMAGE = (1, SIDE, SIDE)
IMPORTANCE_SAMPLES = 16
"""Importance weights of each test image."""


@dataclass(frozen=True, kw_only=True)
class FittedFlow:
    """A flow that was fitted to the digits."""

    flow: Flow
    bits: float
    """Mean bits per dimension of the test images, an upper bound."""
    standard_error: float
    """Standard error of this mean."""
    seconds: float
    """CPU time of the training."""

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.flow.parameters())

    def row(self, name: str) -> list[str]:
        """A row of a table: name, parameters, bits and seconds."""
        bits = f"{self.bits:.3f} ± {self.standard_error:.3f}"
        return [name, f"{self.parameters:,}", bits, f"{self.seconds:.0f}"]


HEADINGS = ["flow", "parameters", "test bits per dimension", "CPU seconds"]


def digits(path: Path | None) -> Digits:
    """The digits of a file, or of scikit-learn."""
    return read_scikit_learn() if path is None else read(path)


def fit_digits(body: Sequence[Transform], images: Digits, *, steps: int, seed: int) -> FittedFlow:
    """Fit a flow that starts with dequantisation and logits, and goes on with `body`."""
    flow = Flow([Flatten(IMAGE), Dequantize(PIXELS, LEVELS), Logit(PIXELS), *body])
    config = TrainingConfig(
        steps=steps,
        batch_size=128,
        learning_rate=3e-3,
        validate_every=max(1, steps // 20),
        seed=seed,
        progress=False,
    )
    start = time.process_time()
    fit(flow, images.train, config, validation=images.validation)
    seconds = time.process_time() - start
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        log_prob = flow.log_prob(
            images.test, importance_samples=IMPORTANCE_SAMPLES, generator=generator
        )
    bits = bits_per_dim(log_prob, PIXELS)
    return FittedFlow(
        flow=flow,
        bits=float(bits.mean()),
        standard_error=float(bits.std() / len(bits) ** 0.5),
        seconds=seconds,
    )


def draw_digits(sheets: Mapping[str, Tensor], path: Path) -> None:
    """Save a picture of twenty digits of each name."""
    figure, (axes,) = figure_grid(1, len(sheets))
    for ax, (title, images) in zip(axes, sheets.items(), strict=True):
        sheet = images.reshape(4, 5, SIDE, SIDE).transpose(1, 2).reshape(4 * SIDE, 5 * SIDE)
        ax.imshow(sheet.numpy(), cmap="gray_r")
        ax.set_title(title, fontsize=TITLE_SIZE)
        ax.set_axis_off()
    save_figure(figure, path)


def coupling_steps(
    shape: tuple[int, int, int], count: int, hidden_channels: Sequence[int]
) -> list[Transform]:
    """Steps of Glow on an image: `ActNorm`, `Conv1x1` and a coupling of halves of the channels."""
    channels, height, width = shape
    steps: list[Transform] = []
    for _ in range(count):
        conditioner = ConvConditioner(
            (channels // 2, height, width), channels, hidden_channels=hidden_channels
        )
        coupling = AffineCoupling(shape, conditioner=conditioner)
        steps += [ActNorm(shape), Conv1x1(shape), coupling]
    return steps
