"""Catalogue of named discrete flows, with sizes matched by number of parameters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cnf._building import Building
from cnf._checks import check_choice, check_count, check_image_shape
from cnf.baselines.residual_flows import CHAINS, glow_of_size
from cnf.baselines.zuko_flows import NamedMixture, NamedTransform
from cnf.bases import Likelihood
from cnf.flows.flow import Flow
from cnf.transforms import Affine, Flatten, Transform

_LARGEST = 2**13


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Properties of a named flow."""

    name: str
    """Name, for `build`."""
    kind: str
    """Kind of flow, in a few words."""
    likelihood: Likelihood = "exact"
    """Kind of likelihood. With at most 8 features, a flow with an "estimate" is exact instead."""
    size: int = 64
    """Default size."""
    size_of: str = "hidden layers"
    """Meaning of the size: width of the hidden layers, or number of components or layers."""
    conditional: bool = True
    """Whether it takes a context."""
    images_alone: bool = False
    """Whether it takes images only."""


_BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline(name="acf", kind="residual, with attention", likelihood="estimate", size=32),
        Baseline(name="elf", kind="autoregressive, exact-Lipschitz residual"),
        Baseline(name="gf", kind="Gaussianization", size=8, size_of="components"),
        Baseline(name="glow", kind="multi-scale coupling", size_of="channels", images_alone=True),
        Baseline(name="gmm", kind="mixture", size=64, size_of="components", conditional=False),
        Baseline(name="iaf", kind="inverse autoregressive, affine"),
        Baseline(name="iresnet", kind="residual", likelihood="biased_estimate", size=32),
        Baseline(name="maf", kind="autoregressive, affine"),
        Baseline(name="naf", kind="autoregressive, monotonic networks"),
        Baseline(name="nice", kind="coupling, additive"),
        Baseline(name="nsf", kind="autoregressive, rational-quadratic splines"),
        Baseline(name="nsf_coupling", kind="coupling, rational-quadratic splines"),
        Baseline(name="planar", kind="planar", size=32, size_of="layers", conditional=False),
        Baseline(name="radial", kind="radial", size=32, size_of="layers", conditional=False),
        Baseline(name="realnvp", kind="coupling, affine"),
        Baseline(name="residual", kind="residual", likelihood="estimate", size=32),
    )
}


def names() -> tuple[Baseline, ...]:
    """Return every named flow, with its properties.

    Example:
        >>> [baseline.name for baseline in names() if baseline.likelihood != "exact"]
        ['acf', 'iresnet', 'residual']
    """
    return tuple(_BASELINES.values())


def build(
    name: str,
    features: int | Sequence[int],
    context_features: int = 0,
    *,
    size: int | None = None,
    parameters: int | None = None,
) -> Flow:
    """Build a named discrete flow, untrained, for standardised data.

    Args:
        name: One of `names`.
        features: Number of entries of x, or shape ``(channels, height, width)`` of images, which
            a flow of vectors flattens.
        context_features: Size of the context; 0 for none.
        size: Width of the hidden layers, or number of components or layers; None for a default.
        parameters: Number of parameters, in place of `size`; the size with the nearest number is
            taken. Masked weights count.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If there is no such name, a number is out of range, both `size` and
            `parameters` are given, or no size gives so many parameters.
        ImportError: If the flow is zuko's, and zuko is not installed.

    Example:
        >>> flow = build("maf", 2, parameters=10_000)
        >>> sum(parameter.numel() for parameter in flow.parameters())
        9952
    """
    baseline = _BASELINES[check_choice("name", name, _BASELINES)]
    if context_features and not baseline.conditional:
        raise ValueError(f"context_features must be 0 for {name!r}; got {context_features}.")
    if size is not None and parameters is not None:
        raise ValueError("give size or parameters, not both.")
    if parameters is not None:
        size = _size_for(name, features, context_features, check_count("parameters", parameters))
    size = check_count("size", baseline.size if size is None else size)
    if isinstance(features, int):
        if baseline.images_alone:
            raise ValueError(f"features must be the shape of images for {name!r}; got {features}.")
        return _vector_flow(name, features, context_features, size, [])
    shape = check_image_shape(features)
    if baseline.images_alone:
        return Flow(glow_of_size(shape, context_features, size))
    return _vector_flow(name, math.prod(shape), context_features, size, [Flatten(shape)])


def _vector_flow(
    name: str, features: int, context_features: int, size: int, first: list[Transform]
) -> Flow:
    if name == "gmm":
        return Flow(first, NamedMixture(features, size))
    if name in CHAINS:
        check_count("features", features)
        return Flow([*first, *CHAINS[name](features, context_features, size)])
    transform = NamedTransform(name, features, context_features, size=size)
    # Additive couplings preserve volume; the last scaling does not.
    last = [Affine(features)] if name == "nice" else []
    return Flow([*first, transform, *last])


def _size_for(
    name: str, features: int | Sequence[int], context_features: int, parameters: int
) -> int:
    """Return the size with the nearest number of parameters, by bisection."""

    def count(size: int) -> int:
        with Building():
            flow = build(name, features, context_features, size=size)
        return sum(parameter.numel() for parameter in flow.parameters())

    low, high = 1, 1
    while count(high) < parameters:
        low, high = high, 2 * high
        if high > _LARGEST:
            raise ValueError(
                f"no size up to {_LARGEST} gives {name!r} so many parameters; got {parameters}."
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    return min((low, high), key=lambda size: abs(count(size) - parameters))
