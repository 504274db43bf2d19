"""Multi-scale flows of digits, by max pooling and by slicing.

Three quarters of the pixels are dropped at once, and modelled given the rest by a conditional flow;
the rest goes through coupling steps. `Slice` keeps a pixel of each square of four, `MaxPool2d` the
largest, with a softplus for the others' distances from it. All else is equal. The paper finds both
nearly as good, with large flows of CIFAR-10.

Claim: both learn the digits; max pooling costs likelihood, because the place of a maximum is a fair
draw: log 4 for each square, 0.5 bits per dimension, if the image tells it.
References: Nielsen et al. (2020), SurVAE Flows, section 4.3. https://arxiv.org/abs/2007.02731
"""

import torch
from torch.distributions import SoftplusTransform

from benchmarks.timing import markdown
from cnf.adapters import FromTorch
from cnf.baselines import build
from cnf.transforms import ActNorm, MaxPool2d, Slice, Squeeze, Transform, TransformedBase
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

KEPT = PIXELS // 4
HIDDEN = (32, 32)


def reductions() -> dict[str, list[Transform]]:
    """The two ways from an image of shape (1, 8, 8) to one of shape (1, 4, 4)."""
    others = PIXELS - KEPT
    dropped = [build("realnvp", others, KEPT, size=64) for _ in range(2)]
    softplus = FromTorch(SoftplusTransform(), others)
    distances = TransformedBase([softplus, *dropped[0].transforms])
    return {
        "slicing": [Squeeze(IMAGE), Slice(PIXELS, KEPT, dropped=dropped[1])],
        "max pooling": [MaxPool2d(IMAGE, offsets=distances)],
    }


def show(settings: Settings) -> str:
    """Train both flows, and draw from them."""
    images = digits(settings.data)
    torch.manual_seed(settings.seed)
    rows, draws = [], {"data": images.test[:20]}
    for name, reduction in reductions().items():
        torch.manual_seed(settings.seed)
        end = [*coupling_steps((4, 2, 2), 4, HIDDEN), ActNorm((4, 2, 2))]
        body = [*reduction, Squeeze((1, 4, 4)), *end]
        steps = settings.choose(600, 4)
        fitted = fit_digits(body, images, steps=steps, seed=settings.seed)
        rows.append(fitted.row(name))
        generator = torch.Generator().manual_seed(settings.seed)
        draws[name] = fitted.flow.sample(20, generator=generator)
    draw_digits(draws, settings.out / "maxpool.png")
    return markdown(HEADINGS, rows)
