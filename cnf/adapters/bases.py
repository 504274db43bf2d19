"""Base distributions from torch and normflows."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Size, Tensor, nn
from torch.distributions import Distribution, constraints

from cnf._building import Building
from cnf._checks import rows_inside
from cnf.adapters.library_modes import as_rows, drawing_from, is_a
from cnf.bases import Base
from cnf.transforms.support.constraints import spread


class TorchBase(Base):
    """Base from a `torch.distributions.Distribution` of vectors, or a module that returns one.

    Tensors of a distribution are not parameters: they are not trained, and keep their device and
    dtype. Log-densities and draws have the dtype that the base was moved to. A module, such as a
    lazy distribution of zuko, keeps its parameters.

    Args:
        source: The distribution, with one event axis and no batch; or the module.

    Raises:
        TypeError: If `source` is neither.
        ValueError: If it has another shape.

    Example:
        >>> from torch.distributions import Independent, Laplace
        >>> base = TorchBase(Independent(Laplace(torch.zeros(2), torch.ones(2)), 1))
        >>> base.log_prob(torch.zeros(2))
        tensor(-1.3863)
    """

    def __init__(self, source: Distribution | nn.Module) -> None:
        distribution = source() if isinstance(source, nn.Module) else source
        if not isinstance(distribution, Distribution):
            raise TypeError(
                "source must be a torch distribution, or a module that returns one; "
                f"got {type(source).__name__}."
            )
        batch, event = tuple(distribution.batch_shape), tuple(distribution.event_shape)
        if batch or len(event) != 1:
            raise ValueError(
                "source must have batch shape () and an event shape such as (2,); "
                f"got {batch} and {event}. Perhaps wrap it in Independent(source, 1)."
            )
        super().__init__(event[0])
        self.source = source
        with Building():
            drawn = distribution.sample()
        # Carries the dtype and device of a distribution that is no module.
        self.register_buffer("loc", torch.zeros_like(drawn), persistent=False)
        self.loc: Tensor

    @property
    def has_rsample(self) -> bool:
        """Whether the distribution has a differentiable `rsample`."""
        return self._distribution().has_rsample

    def _distribution(self) -> Distribution:
        found: Distribution = self.source() if isinstance(self.source, nn.Module) else self.source
        return found

    @property
    def support(self) -> constraints.Constraint:
        """Support of the distribution."""
        return _support(self._distribution())

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        distribution = self._distribution()
        inside = rows_inside(z, _support(distribution))
        if not inside.any():  # torch cannot check an empty batch
            return z.new_full(inside.shape, -math.inf)
        if inside.all():
            return distribution.log_prob(z).to(z)
        return spread(inside, distribution.log_prob(z[inside]).to(z), elsewhere=-math.inf)

    def _rsample(self, shape: Size, context: Tensor | None, generator: Generator | None) -> Tensor:
        distribution = self._distribution()
        _check_gradient(distribution, distribution.has_rsample)
        if 0 in shape:  # some distributions, such as mixtures, refuse it
            return self.loc.new_empty(*shape, self.features)
        draw = distribution.rsample if distribution.has_rsample else distribution.sample
        with drawing_from(generator):
            return draw(shape).to(self.loc)

    def distribution(
        self, batch_shape: Sequence[int] = (), context: Tensor | None = None
    ) -> Distribution:
        """Return the wrapped distribution, expanded to the batch shape."""
        expanded: Distribution = self._distribution().expand(Size(batch_shape))
        return expanded


def _support(distribution: Distribution) -> constraints.Constraint:
    try:
        return distribution.support or constraints.real_vector
    except NotImplementedError:  # some mixtures have none
        return constraints.real_vector


def _check_gradient(distribution: object, has_rsample: bool) -> None:
    if torch.is_grad_enabled() and not has_rsample:
        raise NotImplementedError(
            f"{type(distribution).__name__} cannot be drawn from differentiably; use "
            "flow.sample, or torch.no_grad()."
        )


class NormflowsBase(Base):
    """Base from a base distribution of normflows, without context.

    Args:
        wrapped: The distribution. Its events, of shape `shape`, are vectors here.

    Raises:
        TypeError: If it needs a context or a class, or its `log_prob` is wrong.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        _check_base(wrapped)
        with Building(), torch.no_grad():
            drawn: Tensor = wrapped(1)[0]
        self.shape = tuple(drawn.shape[1:])
        super().__init__(math.prod(self.shape))
        self.wrapped = wrapped
        # Carries the dtype and device of a distribution without tensors.
        self.register_buffer("loc", drawn.new_zeros(self.features), persistent=False)
        self.loc: Tensor

    @property
    def has_rsample(self) -> bool:
        """False for a mixture: the choice of a component has no gradient."""
        return not is_a(self.wrapped, "normflows", "GaussianMixture")

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        wrapped: Any = self.wrapped
        log_prob: Tensor = wrapped.log_prob(as_rows(z, self.shape))
        return log_prob.to(z).reshape(z.shape[:-1])

    def _rsample(self, shape: Size, context: Tensor | None, generator: Generator | None) -> Tensor:
        _check_gradient(self.wrapped, self.has_rsample)
        if 0 in shape:  # which some, such as mixtures, refuse
            return self.loc.new_empty(*shape, self.features)
        with drawing_from(generator):
            drawn: Tensor = self.wrapped(math.prod(shape))[0]
        return drawn.to(self.loc).reshape(*shape, self.features)


def _check_base(wrapped: nn.Module) -> None:
    """Refuse a base that depends on a context or a class, or has a wrong density."""
    conditional = ("ConditionalDiagGaussian", "ClassCondDiagGaussian")
    by_class = getattr(wrapped, "class_cond", False)
    if by_class or any(is_a(wrapped, "normflows", name) for name in conditional):
        raise TypeError(
            "a base must have no context or class of its own; "
            f"got {type(wrapped).__name__} of normflows."
        )
    if is_a(wrapped, "normflows", "GaussianPCA"):
        raise TypeError(
            "GaussianPCA of normflows cannot be a base: its log_prob is not the density of its "
            "draws; use another base."
        )
