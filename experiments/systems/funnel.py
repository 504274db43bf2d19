"""A funnel flow of digits beside a flow of full width.

The full flow takes all 64 numbers through all of its layers. The funnel flow has a `ConvFunnel`
after its first coupling steps, which keeps a pixel of each square of four: the later steps are of
16 numbers, and have a quarter of the channels. A third flow slices where the second has a funnel.

Claim: the funnel flow has the bits per dimension of the full flow with fewer parameters.
References: Klein et al. (2021), Funnels. https://arxiv.org/abs/2112.08069
"""

import torch

from benchmarks.timing import markdown
from cnf.bases import ConditionalNormal
from cnf.transforms import ActNorm, ConvConditioner, ConvFunnel, Slice, Squeeze, Transform
from experiments.digits_fit import HEADINGS, IMAGE, PIXELS, coupling_steps, digits, fit_digits
from experiments.systems.settings import Settings

HIDDEN = (32, 32)
FIRST, LAST = (4, 4, 4), (4, 2, 2)


def bodies() -> dict[str, list[Transform]]:
    """Transforms of each flow, after the logits."""

    def conditioner() -> ConvConditioner:
        return ConvConditioner(LAST, 2 * 12, hidden_channels=(32,))

    start = [Squeeze(IMAGE), *coupling_steps(FIRST, 4, HIDDEN)]
    end = [*coupling_steps(LAST, 4, HIDDEN), ActNorm(LAST)]
    dropped = [ConditionalNormal(PIXELS - 16, 16, conditioner=conditioner()) for _ in range(2)]
    return {
        "full": [
            *start,
            Squeeze(FIRST),
            *coupling_steps((16, 2, 2), 4, HIDDEN),
            ActNorm((16, 2, 2)),
        ],
        "funnel": [*start, ConvFunnel(FIRST, dropped=dropped[0]), *end],
        "slice": [*start, Squeeze(FIRST), Slice(PIXELS, 16, dropped=dropped[1]), *end],
    }


def show(settings: Settings) -> str:
    """Train the three flows on digits."""
    images, rows = digits(settings.data), []
    for name in bodies():
        torch.manual_seed(settings.seed)
        steps = settings.choose(2000, 4)
        rows.append(fit_digits(bodies()[name], images, steps=steps, seed=settings.seed).row(name))
    return markdown(HEADINGS, rows)
