"""Which features a multi-scale flow factors out: ranked by contributions, or not.

The first steps of a flow are trained alone. Then half of the features is factored out, and the
other half takes more steps. The flows go on from the same first steps, and differ in what they
keep: the features with the largest share in the log-likelihood of the first steps, the first ones,
or those with the smallest share.

Two data sets: eight columns, four of them pairs of moons and four normal, in random order; and
digits, of which channels are kept.

Claim: keeping the largest shares gives the best likelihood.
References: Das, Abbeel & Spanos (2019). https://arxiv.org/abs/1908.01686
"""

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor

from benchmarks.timing import markdown
from cnf import Flow, Standardize, TrainingConfig, fit
from cnf.data.toy import toy_density
from cnf.transforms import (
    ActNorm,
    AffineCoupling,
    FactorOut,
    Permute,
    Squeeze,
    Transform,
    rank_by_contributions,
)
from experiments.digits_fit import HEADINGS, IMAGE, PIXELS, coupling_steps, digits, fit_digits
from experiments.systems.settings import Settings

_HIDDEN = (32, 32)
_SHAPE, _KEPT = (16, 2, 2), (8, 2, 2)
_COLUMNS = 8


def show(settings: Settings) -> str:
    """Return a table of the columns, and one of the digits."""
    return f"{_columns(settings)}\n{_digits(settings)}"


def _columns(settings: Settings) -> str:
    """Train the flows on columns in random order."""
    generator = torch.Generator().manual_seed(settings.seed)
    moons = toy_density("moons")
    order = torch.randperm(_COLUMNS, generator=generator)

    def drawn(rows: int) -> tuple[Tensor, Tensor]:
        pairs = [moons.sample(rows, generator=generator) for _ in range(2)]
        noise = torch.randn(rows, _COLUMNS - 4, generator=generator)
        x = torch.cat([*pairs, noise], -1)
        truth = sum(moons.log_prob(pair) for pair in pairs) + _normal_log_prob(noise)
        return x[:, order], truth

    rows = settings.choose(20_000, 200)
    x, (test, truth) = drawn(rows)[0], drawn(rows)

    def fitted(body: Iterable[Transform]) -> tuple[Flow, float]:
        flow = Flow(body)
        config = TrainingConfig(
            steps=settings.choose(1500, 4), learning_rate=3e-3, seed=settings.seed, progress=False
        )
        fit(flow, x, config)
        with torch.no_grad():
            return flow, float((truth - flow.log_prob(test)).mean())

    torch.manual_seed(settings.seed)
    start = [Standardize(_COLUMNS), *_couplings(_COLUMNS, 1), ActNorm(_COLUMNS)]
    first, below = fitted(start)
    ranking = rank_by_contributions(first.transforms, x)
    cells = [["first steps alone", "", f"{below:.3f}"]]
    for name, kept in _kept(ranking, 1).items():
        torch.manual_seed(settings.seed)
        more = FactorOut([*_couplings(_COLUMNS // 2, 6), ActNorm(_COLUMNS // 2)], _COLUMNS)
        _, below = fitted([*deepcopy(list(first.transforms)), kept, more, ActNorm(_COLUMNS)])
        moons_kept = sum(int(order[place]) < 4 for place in kept.order[: _COLUMNS // 2])
        cells.append([f"keeps the {name}", f"{moons_kept} of 4", f"{below:.3f}"])
    return markdown(["flow of columns", "kept columns of moons", "nats from the truth"], cells)


def _normal_log_prob(z: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)


def _couplings(features: int, pairs: int) -> list[Transform]:
    masks = ("first", "last")
    return [AffineCoupling(features, mask=mask) for _ in range(pairs) for mask in masks]


def _digits(settings: Settings) -> str:
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
    rows = [first.row("first steps alone")]
    for name, kept in _kept(ranking, _SHAPE[1] * _SHAPE[2]).items():
        torch.manual_seed(settings.seed)
        more = FactorOut([*coupling_steps(_KEPT, 4, _HIDDEN), ActNorm(_KEPT)], PIXELS)
        body = [*deepcopy(list(trained)), kept, more, ActNorm(_SHAPE)]
        fitted = fit_digits(body, images, steps=settings.choose(1000, 4), seed=settings.seed)
        rows.append(fitted.row(f"keeps the {name}"))
    return markdown(["flow of digits", *HEADINGS[1:]], rows)


def _kept(ranking: Permute, pixels: int) -> dict[str, Permute]:
    """Return orders whose first half is kept: the ranking, none, and the ranking reversed."""
    last_first = torch.tensor(ranking.order).view(-1, pixels).flip(0)
    return {
        "largest": ranking,
        "first": Permute(range(len(ranking.order))),
        "smallest": Permute(last_first.flatten().tolist()),
    }
