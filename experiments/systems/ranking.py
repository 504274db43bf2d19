"""Which channels a multi-scale flow of digits factors out: ranked by contributions, or not.

The first steps of a flow are trained alone. Then half of the 16 channels is factored out, and the
other half takes more steps. The flows go on from the same first steps, and differ in the channels
that they keep: those with the largest share in the log-likelihood of the first steps, the first
ones, or those with the smallest share.

Claim: which channels are kept makes no difference that shows on digits.
References: Das, Abbeel & Spanos (2019). https://arxiv.org/abs/1908.01686
"""

from copy import deepcopy

import torch

from benchmarks.timing import markdown
from cnf.transforms import ActNorm, FactorOut, Permute, Squeeze, rank_by_contributions
from experiments.digits_fit import HEADINGS, IMAGE, PIXELS, coupling_steps, digits, fit_digits
from experiments.systems.settings import Settings

_HIDDEN = (32, 32)
_SHAPE, _KEPT = (16, 2, 2), (8, 2, 2)


def show(settings: Settings) -> str:
    """Train the flows on digits."""
    images = digits(settings.data)
    torch.manual_seed(settings.seed)
    start = [Squeeze(IMAGE), *coupling_steps((4, 4, 4), 2, _HIDDEN), Squeeze((4, 4, 4))]
    start += [*coupling_steps(_SHAPE, 2, _HIDDEN), ActNorm(_SHAPE)]
    first = fit_digits(start, images, steps=settings.choose(1000, 4), seed=settings.seed)
    before, trained = first.flow.transforms[:3], first.flow.transforms[3:]
    noise = torch.Generator().manual_seed(settings.seed)
    logits = before.to_base(images.train, generator=noise)
    ranking = rank_by_contributions(trained, logits, shape=_SHAPE)
    in_order = list(range(PIXELS))
    kept = {"largest": ranking, "first": Permute(in_order), "smallest": reversed_channels(ranking)}
    rows = [first.row("first steps alone")]
    for name, order in kept.items():
        torch.manual_seed(settings.seed)
        more = FactorOut([*coupling_steps(_KEPT, 4, _HIDDEN), ActNorm(_KEPT)], PIXELS)
        body = [*deepcopy(list(trained)), order, more, ActNorm(_SHAPE)]
        fitted = fit_digits(body, images, steps=settings.choose(1000, 4), seed=settings.seed)
        rows.append(fitted.row(f"keeps the {name}"))
    return markdown(HEADINGS, rows)


def reversed_channels(ranking: Permute) -> Permute:
    """Return the ranking of channels from the last to the first."""
    pixels = _SHAPE[1] * _SHAPE[2]
    channels = torch.tensor(ranking.order).view(-1, pixels).flip(0)
    return Permute(channels.flatten().tolist())
