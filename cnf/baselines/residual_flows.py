"""Named discrete flows built from the transforms of this package."""

from collections.abc import Callable, Sequence
from functools import partial

from cnf.baselines.glow import glow
from cnf.transforms import (
    ActNorm,
    ExactLipschitz,
    LipschitzAttention,
    LipschitzMLP,
    Permute,
    Planar,
    Radial,
    ResidualFlow,
    Transform,
    TruncatedSeries,
)
from cnf.transforms.residual.contractions import ContractiveNetwork
from cnf.transforms.residual.log_det import LogDet

_LAYERS = 4
_BLOCKS = 16
_STEPS = 4
_MOST_LEVELS = 3

Transforms = list[Transform]


def exact_lipschitz(features: int, context_features: int, size: int) -> Transforms:
    """Return exact-Lipschitz layers of hidden width `size`, with reversed order between them."""
    chain: Transforms = []
    for _ in range(_LAYERS):
        layer = ExactLipschitz(features, context_features, hidden_features=(size, size))
        chain += [ActNorm(features), layer, Permute(list(reversed(range(features))))]
    return chain


def residual(
    features: int, context_features: int, size: int, log_det: LogDet | None = None
) -> Transforms:
    """Return residual blocks of perceptrons of width `size`, with `log_det` as in `ResidualFlow`.

    By default the log-determinant is exact for at most 8 features, where it costs less than a
    series and has no noise, and the unbiased series else.
    """
    return _residual(features, _perceptrons(_BLOCKS, features, context_features, size), log_det)


def attentive(features: int, context_features: int, size: int) -> Transforms:
    """Return half the perceptrons of `residual`, with a block of attention before each.

    The features are split evenly into about as many tokens as features in each token. For few
    features the attention has few parameters, so that the flow is nearly `residual`.
    """
    tokens = next(n for n in range(1, features + 1) if n * n >= features and features % n == 0)
    networks: list[ContractiveNetwork] = []
    for network in _perceptrons(_BLOCKS // 2, features, context_features, size):
        networks += [LipschitzAttention(tokens=tokens, width=features // tokens), network]
    return _residual(features, networks, None)


def glow_of_size(shape: Sequence[int], context_features: int, size: int) -> Transforms:
    """Return Glow with `size` hidden channels, and up to three levels, as the image allows."""
    _, height, width = shape
    levels = 1
    while levels < _MOST_LEVELS and not (height % 2 ** (levels + 1) or width % 2 ** (levels + 1)):
        levels += 1
    return glow(shape, context_features, levels=levels, steps=_STEPS, hidden_channels=(size, size))


CHAINS: dict[str, Callable[[int, int, int], Transforms]] = {
    "acf": attentive,
    "elf": exact_lipschitz,
    "iresnet": partial(residual, log_det=TruncatedSeries()),
    "planar": lambda features, _, size: [Planar(features) for _ in range(size)],
    "radial": lambda features, _, size: [Radial(features) for _ in range(size)],
    "residual": residual,
}
"""Constructors by name; they take the numbers of features and context features, and the size."""


def _perceptrons(count: int, features: int, context_features: int, size: int) -> list[LipschitzMLP]:
    return [
        LipschitzMLP(features, context_features, hidden_features=(size, size)) for _ in range(count)
    ]


def _residual(
    features: int, networks: Sequence[ContractiveNetwork], log_det: LogDet | None
) -> Transforms:
    chain: Transforms = []
    for network in networks:
        chain += [ActNorm(features), ResidualFlow(network, log_det=log_det)]
    return [*chain, ActNorm(features)]
