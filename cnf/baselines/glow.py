"""Glow, the multi-scale flow of images."""

from collections.abc import Sequence
from functools import partial

from cnf._checks import check_choice, check_count, check_image_shape
from cnf.transforms.base import Transform
from cnf.transforms.conditioners import ConvConditioner
from cnf.transforms.coupling import AdditiveCoupling, AffineCoupling, Coupling
from cnf.transforms.elementwise import ConditionalAffine
from cnf.transforms.factor_out import FactorOut
from cnf.transforms.from_data import ActNorm
from cnf.transforms.linear.conv1x1 import Conv1x1
from cnf.transforms.reshape import Flatten, Squeeze

_COUPLINGS: dict[str, type[Coupling]] = {"affine": AffineCoupling, "additive": AdditiveCoupling}


def glow(
    shape: Sequence[int],
    context_features: int = 0,
    *,
    levels: int = 2,
    steps: int = 4,
    hidden_channels: Sequence[int] = (64, 64),
    coupling: str = "affine",
    lu: bool = True,
) -> list[Transform]:
    """Return the transforms of Glow, from images to the base, for `Flow`.

    Each level squeezes the image and takes some steps: an `ActNorm`, a `Conv1x1` and a coupling of
    halves of the channels. Then the last half of the channels is factored out: given the first, it
    is Gaussian, with mean and standard deviation by one convolution (an `AffineCoupling`, so that
    the whole base is standard normal). The first half goes on to the next level. At the end each
    channel has a Gaussian prior with learned mean and standard deviation, which depend on the
    context, such as a class in one-hot form, if there is one.

    The couplings depend on the context too. The flow is the identity but for rotations until `fit`
    or `Flow.initialize` initialises `ActNorm`.

    Args:
        shape: Shape ``(channels, height, width)`` of the images.
        context_features: Size of the context; 0 for none.
        levels: Number of levels; each halves height and width.
        steps: Steps of each level.
        hidden_channels: Channels of the hidden layers of each coupling's `ConvConditioner`.
        coupling: Kind of the couplings in the steps: "affine" or "additive".
        lu: Whether each `Conv1x1` is in its triangular form.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If an argument is out of range, or height or width is no multiple of
            ``2 ** levels``.

    References:
        Kingma & Dhariwal (2018), Glow. https://arxiv.org/abs/1807.03039

    Example:
        >>> from cnf import Flow
        >>> from cnf.transforms import Dequantize, Logit
        >>> flatten, *others = glow((3, 8, 8), levels=2, steps=2, hidden_channels=(8, 8))
        >>> flow = Flow([flatten, Dequantize(192, levels=256), Logit(192), *others])
        >>> flow.sample(5).shape
        torch.Size([5, 3, 8, 8])

        Draws at temperature 0.7, which have another density than the flow:

        >>> import torch
        >>> flow.to_data(0.7 * flow.base.rsample(torch.Size([5]))).shape
        torch.Size([5, 3, 8, 8])
    """
    channels, height, width = check_image_shape(shape)
    check_count("context_features", context_features, least=0)
    check_count("levels", levels)
    check_count("steps", steps)
    check_choice("coupling", coupling, _COUPLINGS)
    if height % 2**levels or width % 2**levels:
        raise ValueError(
            f"shape must have height and width that are multiples of {2**levels} with "
            f"levels={levels}; got {(channels, height, width)}. "
            "Take fewer levels, or pad the images."
        )
    step = partial(
        _step,
        context_features=context_features,
        hidden_channels=hidden_channels,
        coupling=_COUPLINGS[coupling],
        lu=lu,
    )
    chain: list[Transform] = []
    for level in reversed(range(levels)):
        squeeze = Squeeze((channels * 2**level, height // 2**level, width // 2**level))
        image = squeeze.squeezed_shape
        end = (
            _factor_out(image, context_features, chain) if chain else _top(image, context_features)
        )
        chain = [squeeze, *(part for _ in range(steps) for part in step(image)), *end]
    return [Flatten(shape), *chain]


def _step(
    shape: tuple[int, int, int],
    *,
    context_features: int,
    hidden_channels: Sequence[int],
    coupling: type[Coupling],
    lu: bool,
) -> list[Transform]:
    channels, height, width = shape
    conditioner = ConvConditioner(
        (channels // 2, height, width),
        coupling.numbers * (channels // 2),
        context_features,
        hidden_channels=hidden_channels,
    )
    return [
        ActNorm(shape),
        Conv1x1(shape, lu=lu),
        coupling(shape, context_features, conditioner=conditioner),
    ]


def _factor_out(
    shape: tuple[int, int, int], context_features: int, others: list[Transform]
) -> list[Transform]:
    """Make the last half of the channels standard normal given the first; factor it out."""
    channels, height, width = shape
    conditioner = ConvConditioner(
        (channels // 2, height, width), channels, context_features, hidden_channels=()
    )
    prior = AffineCoupling(shape, context_features, conditioner=conditioner)
    return [prior, FactorOut(others, channels * height * width)]


def _top(shape: tuple[int, int, int], context_features: int) -> list[Transform]:
    return [ConditionalAffine(shape, context_features) if context_features else ActNorm(shape)]
