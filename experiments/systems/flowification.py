"""Ordinary convolutional networks of digits, turned into flows by `flowify`.

One network has convolutions whose patches do not overlap: its likelihood is exact. The other starts
with a 3 x 3 convolution with padding, whose copies of pixels and padding are noise: a lower bound.
Both end in linear layers, and drop coordinates on the way, each given the others. Beside them stand
a Gaussian with full covariance, and a flow of coupling steps with about as many parameters.

Claim: an ordinary network, flowified, is a density model that learns to draw digits. In as many
steps, a flow that was designed as one is better, and so is the Gaussian.
References: Máté et al. (2022),
Flowification. https://arxiv.org/abs/2205.15209
"""

import torch
from torch import nn

from benchmarks.timing import markdown
from cnf.transforms import ActNorm, Affine, Squeeze, Standardize, Transform, Whiten, flowify
from experiments.digits_fit import (
    HEADINGS,
    IMAGE,
    PIXELS,
    coupling_steps,
    digits,
    draw_digits,
    fit_digits,
)
from experiments.systems.settings import Settings

SLOPE = 0.5


def non_overlapping() -> nn.Sequential:
    """A network whose convolutions have the stride of their kernels."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 2, stride=2),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(4, 12, 2, stride=2),
        nn.LeakyReLU(SLOPE),
        nn.Flatten(),
        nn.Linear(48, 32),
        nn.LeakyReLU(SLOPE),
        nn.Linear(32, 16),
    )


def overlapping() -> nn.Sequential:
    """A network that starts with a convolution with padding."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(4, 8, 2, stride=2),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(8, 12, 2, stride=2),
        nn.LeakyReLU(SLOPE),
        nn.Flatten(),
        nn.Linear(48, 16),
    )


def standardised(network: nn.Sequential) -> list[Transform]:
    """The flowified network, with standardised pixels before it and results behind it."""
    chain = flowify(network, IMAGE)[1:]
    return [Standardize(PIXELS), *chain, Standardize(chain.base_features)]


def couplings() -> list[Transform]:
    """A flow of couplings."""
    return [Squeeze(IMAGE), *coupling_steps((4, 4, 4), 6, (32, 32)), ActNorm((4, 4, 4))]


def show(settings: Settings) -> str:
    """Train the flowified networks and their rivals, and draw from them."""
    images = digits(settings.data)
    bodies = {
        "flowified, patches that do not overlap": lambda: standardised(non_overlapping()),
        "flowified, 3 x 3 and padding": lambda: standardised(overlapping()),
        "Gaussian": lambda: [Whiten(PIXELS), Affine(PIXELS)],
        "couplings": couplings,
    }
    rows, draws = [], {"data": images.test[:20]}
    for name, make in bodies.items():
        torch.manual_seed(settings.seed)
        body = list(make())
        steps = settings.choose(1000, 4)
        fitted = fit_digits(body, images, steps=steps, seed=settings.seed)
        rows.append([*fitted.row(name), fitted.flow.chain[3:].likelihood])
        generator = torch.Generator().manual_seed(settings.seed)
        draws[name] = fitted.flow.sample(20, generator=generator)
    draw_digits(draws, settings.out / "flowification.png")
    return markdown([*HEADINGS, "likelihood behind the dequantisation"], rows)
