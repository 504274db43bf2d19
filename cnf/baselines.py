"""Named discrete flows, to compare a CNF with: one constructor, sizes matched by parameters.

The classics come from zuko, which ``pip install zuko`` brings. They are rebuilt from their name
and size, so that `save` and `load` keep them like any flow.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions import Transform as TorchTransform

from cnf._checks import check_count
from cnf.adapters import TorchBase
from cnf.bases import Base
from cnf.flow import Flow
from cnf.transforms import Affine, Likelihood
from cnf.transforms.adapters import OfTorchTransforms

_LARGEST = 2**13


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What a named flow is."""

    name: str
    """What `build` takes."""
    kind: str
    """In a few words."""
    likelihood: Likelihood = "exact"
    """What its likelihood is."""
    size: int = 64
    """Default of what grows with the number of parameters."""
    size_of: str = "hidden layers"
    """What the size is the width or number of."""
    conditional: bool = True
    """Whether it takes a context."""


_BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline(name="gf", kind="Gaussianization", size=8, size_of="components"),
        Baseline(name="gmm", kind="mixture", size=8, size_of="components", conditional=False),
        Baseline(name="iaf", kind="inverse autoregressive, affine"),
        Baseline(name="maf", kind="autoregressive, affine"),
        Baseline(name="naf", kind="autoregressive, monotonic networks"),
        Baseline(name="nice", kind="coupling, additive"),
        Baseline(name="nsf", kind="autoregressive, rational-quadratic splines"),
        Baseline(name="nsf_coupling", kind="coupling, rational-quadratic splines"),
        Baseline(name="realnvp", kind="coupling, affine"),
    )
}


def names() -> tuple[Baseline, ...]:
    """Every named flow, with what it is.

    Example:
        >>> [baseline.name for baseline in names()]
        ['gf', 'gmm', 'iaf', 'maf', 'naf', 'nice', 'nsf', 'nsf_coupling', 'realnvp']
    """
    return tuple(_BASELINES.values())


def build(
    name: str,
    features: int,
    context_features: int = 0,
    *,
    size: int | None = None,
    parameters: int | None = None,
) -> Flow:
    """A named discrete flow, untrained. Data are to be standardised.

    Outside of [-5, 5] splines are the identity; "gf" and "naf" are inverted by bisection between
    -10 and 10, so that before training their draws need not follow their density.

    Args:
        name: One of `names`.
        features: Number of entries of x.
        context_features: Size of the context; 0 for none.
        size: Width of the hidden layers, or number of components; None for a default.
        parameters: Number of parameters to come as near to as a size can, in place of `size`.
            Weights that a mask sets to zero count.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If there is no such name, a number is out of range, both `size` and
            `parameters` are given, or no size comes near to so many parameters.
        ImportError: If zuko is not installed.

    Example:
        >>> flow = build("maf", 2, parameters=10_000)
        >>> sum(parameter.numel() for parameter in flow.parameters())
        9952
    """
    baseline = _baseline(name)
    if context_features and not baseline.conditional:
        raise ValueError(f"context_features must be 0 for {name!r}; got {context_features}.")
    if size is not None and parameters is not None:
        raise ValueError("give size or parameters, not both.")
    if parameters is not None:
        size = _size_for(name, features, context_features, check_count("parameters", parameters))
    size = check_count("size", baseline.size if size is None else size)
    if name == "gmm":
        return Flow([], NamedMixture(features, size))
    transform = NamedTransform(name, features, context_features, size=size)
    # Additive couplings keep volume; the last scaling lets it change.
    return Flow([transform, Affine(features)] if name == "nice" else [transform])


def _baseline(name: str) -> Baseline:
    if name not in _BASELINES:
        raise ValueError(f"name must be one of {', '.join(_BASELINES)}; got {name!r}.")
    return _BASELINES[name]


def _size_for(name: str, features: int, context_features: int, parameters: int) -> int:
    """The size whose number of parameters, which grows with it, is nearest."""

    def count(size: int) -> int:
        with torch.random.fork_rng(devices=[]):
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


class NamedTransform(OfTorchTransforms):
    """The transform of a named flow of zuko.

    Args:
        name: One of `names`.
        features: Number of entries of x.
        context_features: Size of the context; 0 for none.
        size: Width of the hidden layers, or number of components.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If there is no such name, or a number is out of range.
        ImportError: If zuko is not installed.

    References:
        NICE: Dinh et al. (2015), https://arxiv.org/abs/1410.8516. Real NVP: Dinh et al. (2017),
        https://arxiv.org/abs/1605.08803. MAF: Papamakarios et al. (2017),
        https://arxiv.org/abs/1705.07057. IAF: Kingma et al. (2016),
        https://arxiv.org/abs/1606.04934. NAF: Huang et al. (2018),
        https://arxiv.org/abs/1804.00779. Spline flows: Durkan et al. (2019),
        https://arxiv.org/abs/1906.04032. Gaussianization flows: Meng et al. (2020),
        https://arxiv.org/abs/2003.01941
    """

    def __init__(self, name: str, features: int, context_features: int = 0, *, size: int) -> None:
        super().__init__(features, context_features)
        if name not in _MAKERS:
            raise ValueError(f"name must be one of {', '.join(_MAKERS)}; got {name!r}.")
        self.name = name
        self.size = check_count("size", size)
        self.transform: nn.Module = _MAKERS[name](
            _zuko(), self.features, self.context_features, self.size
        )

    def extra_repr(self) -> str:
        """Name and size."""
        return f"name={self.name!r}, size={self.size}"

    def _at(self, context: Tensor | None) -> TorchTransform:
        transform: TorchTransform = self.transform(context)
        return transform


class NamedMixture(Base):
    """Mixture of Gaussians with full covariances, of zuko.

    Its draws have no gradient.

    Args:
        features: Size of z.
        size: Number of components.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If one is less than 1.
        ImportError: If zuko is not installed.
    """

    def __init__(self, features: int, size: int) -> None:
        super().__init__(features)
        self.size = check_count("size", size)
        self.mixture = TorchBase(_zuko().mixtures.GMM(self.features, components=self.size))

    def log_prob(self, z: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch"]:
        """Log-density of `z`, in nats."""
        return self.mixture.log_prob(z)

    def rsample(
        self, shape: torch.Size, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch features"]:
        """Draws of batch shape `shape`.

        Raises:
            NotImplementedError: If gradients are on.
        """
        return self.mixture.rsample(shape, generator=generator)

    def distribution(self, batch_shape: Sequence[int] = ()) -> Distribution:
        """The same as a `torch.distributions.Distribution`."""
        return self.mixture.distribution(batch_shape)


def _zuko() -> Any:
    try:
        return importlib.import_module("zuko")
    except ImportError as error:
        raise ImportError("zuko is not installed; try pip install zuko.") from error


def _autoregressive(zuko: Any, features: int, context: int, size: int) -> Any:
    return zuko.flows.MAF(features, context, transforms=4, hidden_features=(size, size)).transform


def _inverse_autoregressive(zuko: Any, features: int, context: int, size: int) -> Any:
    return _autoregressive(zuko, features, context, size).inv


def _neural_autoregressive(zuko: Any, features: int, context: int, size: int) -> Any:
    widths = (size, size)
    network = {"hidden_features": widths}
    return zuko.flows.NAF(features, context, hidden_features=widths, network=network).transform


def _spline(zuko: Any, features: int, context: int, size: int) -> Any:
    return zuko.flows.NSF(features, context, hidden_features=(size, size)).transform


def _coupling(zuko: Any, features: int, context: int, size: int, **univariate: Any) -> Any:
    widths = (size, size)
    flow = zuko.flows.NICE(features, context, transforms=6, hidden_features=widths, **univariate)
    return flow.transform


def _additive(zuko: Any, features: int, context: int, size: int) -> Any:
    additive = zuko.transforms.AdditiveTransform  # zuko's NICE is affine unless it is told
    return _coupling(zuko, features, context, size, univariate=additive, shapes=[()])


def _coupling_spline(zuko: Any, features: int, context: int, size: int) -> Any:
    spline = zuko.transforms.MonotonicRQSTransform
    shapes = [(8,), (8,), (7,)]
    return _coupling(zuko, features, context, size, univariate=spline, shapes=shapes)


def _gaussianization(zuko: Any, features: int, context: int, size: int) -> Any:
    return zuko.flows.GF(features, context, transforms=6, components=size).transform


_MAKERS: dict[str, Callable[[Any, int, int, int], Any]] = {
    "gf": _gaussianization,
    "iaf": _inverse_autoregressive,
    "maf": _autoregressive,
    "naf": _neural_autoregressive,
    "nice": _additive,
    "nsf": _spline,
    "nsf_coupling": _coupling_spline,
    "realnvp": _coupling,
}
