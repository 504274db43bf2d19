"""Named discrete flows from zuko, built from a name and a size.

So `save` and `load` work as for any flow. They need zuko: ``pip install zuko``.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Size, Tensor, nn
from torch.distributions import Distribution
from torch.distributions import Transform as TorchTransform

from cnf._checks import check_choice, check_count
from cnf.adapters import TorchBase
from cnf.adapters.transforms import TorchTransformWrapper
from cnf.baselines.monotone import Gaussianization, MonotonicNetwork, start_near_identity
from cnf.bases import Base
from cnf.vector_fields.conditioning import ContextScaling, scaled_context


class NamedTransform(TorchTransformWrapper):
    """Transform of a named flow of zuko.

    The monotonic functions of "naf" and "gf" are surjective here, unlike in zuko, and "gf" starts
    near the identity; see `cnf.baselines.monotone`. The network gets the context scaled.

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
        self.name = check_choice("name", name, _MAKERS)
        self.size = check_count("size", size)
        self.transform: nn.Module = _MAKERS[name](
            _zuko(), self.features, self.context_features, self.size
        )
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)

    def extra_repr(self) -> str:
        """Name and size."""
        return f"name={self.name!r}, size={self.size}"

    def _given(self, context: Tensor | None) -> TorchTransform:
        transform: TorchTransform = self.transform(scaled_context(self, context))
        return transform


class NamedMixture(Base):
    """Mixture of Gaussians with full covariances, from zuko.

    Its draws have no gradient. `initialize` centres the components on rows of the data, with equal
    weights and covariances proportional to the covariance of the data; `fit` calls it.

    Args:
        features: Size of z.
        size: Number of components.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If one is less than 1; from `initialize`, if there are fewer rows than
            components, or they lie in a plane.
        ImportError: If zuko is not installed.

    References:
        Silverman (1986), Density Estimation, for the width of the components.
    """

    has_rsample = False  # the choice of a component has no gradient

    def __init__(self, features: int, size: int) -> None:
        super().__init__(features)
        self.size = check_count("size", size)
        module: nn.Module = _zuko().mixtures.GMM(self.features, components=self.size)
        self.mixture = TorchBase(module)
        self.register_buffer("is_initialized", torch.zeros((), dtype=torch.bool))
        self.is_initialized: Tensor

    @property
    def needs_initialization(self) -> bool:
        """Whether `initialize` has yet to centre the components on data."""
        return not self.is_initialized

    def _initialize(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        # The covariance of all rows, narrower for more components: Silverman (1986), chapter 4.
        if len(z) < self.size:
            raise ValueError(
                f"z must have a row for each of the {self.size} components; got {len(z)}. "
                "Perhaps give fewer components."
            )
        factor, failed = torch.linalg.cholesky_ex(z.double().T.cov().reshape(2 * (self.features,)))
        if failed:
            raise ValueError("z must vary in every direction; its covariance is singular.")
        factor = factor * self.size ** (-1 / (self.features + 4))
        rows = torch.randperm(len(z), generator=generator, device=z.device)[: self.size]
        below = torch.tril_indices(self.features, self.features, offset=-1, device=z.device)
        logits, loc, log_diagonal, off_diagonal = self.mixture.parameters()
        logits.zero_()
        loc.copy_(z[rows])
        log_diagonal.copy_(factor.diagonal().log().expand_as(log_diagonal))
        off_diagonal.copy_(factor[below[0], below[1]].expand_as(off_diagonal))
        self.is_initialized.fill_(True)

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        return self.mixture.log_prob(z)

    def _rsample(self, shape: Size, context: Tensor | None, generator: Generator | None) -> Tensor:
        return self.mixture.rsample(shape, generator=generator)

    def distribution(
        self, batch_shape: Sequence[int] = (), context: Tensor | None = None
    ) -> Distribution:
        """Return the mixture as a `torch.distributions.Distribution`."""
        return self.mixture.distribution(batch_shape)


def _zuko() -> Any:
    try:
        return importlib.import_module("zuko")
    except ImportError as error:
        raise ImportError("zuko is not installed; try pip install zuko.") from error


def _transform(
    zuko: Any, features: int, context: int, size: int, *, kind: str, **settings: Any
) -> Any:
    flow = getattr(zuko.flows, kind)(features, context, hidden_features=(size, size), **settings)
    return flow.transform


def _neural_autoregressive(zuko: Any, features: int, context: int, size: int) -> Any:
    network = {"hidden_features": 2 * (max(size, 2),)}  # zuko splits its units in two
    transform = _transform(zuko, features, context, size, kind="NAF", network=network)
    # Only these, without the soft clips between them.
    layers = [part for part in transform.transforms if hasattr(part, "univariate")]
    for layer in layers:
        layer.univariate = MonotonicNetwork(layer.univariate)
    return zuko.lazy.LazyComposedTransform(*layers)


_coupling = partial(_transform, kind="NICE", transforms=6)


def _additive(zuko: Any, features: int, context: int, size: int) -> Any:
    additive = zuko.transforms.AdditiveTransform  # the default of zuko's NICE is affine
    return _coupling(zuko, features, context, size, univariate=additive, shapes=[()])


def _coupling_spline(zuko: Any, features: int, context: int, size: int) -> Any:
    spline = zuko.transforms.MonotonicRQSTransform
    shapes = [(8,), (8,), (7,)]
    return _coupling(zuko, features, context, size, univariate=spline, shapes=shapes)


def _gaussianization(zuko: Any, features: int, context: int, size: int) -> Any:
    transform = zuko.flows.GF(features, context, transforms=6, components=size).transform
    for layer in transform.transforms[::2]:
        layer.univariate = Gaussianization
        start_near_identity(layer, size)
    return transform


_MAKERS: dict[str, Callable[[Any, int, int, int], Any]] = {
    "gf": _gaussianization,
    "iaf": lambda *given: _transform(*given, kind="MAF", transforms=4).inv,
    "maf": partial(_transform, kind="MAF", transforms=4),
    "naf": _neural_autoregressive,
    "nice": _additive,
    "nsf": partial(_transform, kind="NSF"),
    "nsf_coupling": _coupling_spline,
    "realnvp": _coupling,
}
