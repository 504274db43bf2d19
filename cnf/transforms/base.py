"""A transform: one step of a flow between data and base."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints

from cnf._checks import check_count, refuse_overrides
from cnf._shapes import BaseRows, Context, Costs, Events, Rows, Values
from cnf.bases import Likelihood
from cnf.regularizers import CostRate
from cnf.vector_fields.conditioning import context_scalings

WithLadj: TypeAlias = tuple[Tensor, Tensor]
"""What a hook returns: the moved points, and the ladj of each."""

_HOOKS = {
    "to_base_and_ladj": "_to_base(x, context, generator), which returns z and ladj",
    "to_data_and_ladj": "_to_data(z, context, generator), which returns x and ladj",
    "to_base": "_to_base_value(x, context, generator), which returns z",
    "to_data": "_to_data_value(z, context, generator), which returns x",
    "to_base_with_costs": (
        "_to_base_with_costs(x, context, generator, regularizers), which returns z, ladj and costs"
    ),
    "initialize": "_initialize(x, context, generator), called while needs_initialization is true",
}
"""What a subclass writes in place of each final method."""


class Transform(nn.Module, ABC):
    """A map between data and base that reports its contribution to the log-likelihood.

    The base side is always vectors, ``(*batch, base_features)``. The data side is vectors too,
    ``(*batch, features)``, unless `event_shape` says otherwise, as for images.

    The public methods are final; a subclass writes hooks. `_to_base` and `_to_data` are given the
    points, the context (or None) and the generator, and return the moved points and the ladj.
    `_to_base_value` and `_to_data_value` return the points alone, for a transform whose ladj costs
    more than them; `_to_base_with_costs` is for one that follows a path. A transform that starts
    from data writes `needs_initialization` and `_initialize`.

    A transform that is no bijection of real vectors says so by its attributes. Where z is drawn,
    given x, the ladj is that of a lower bound; where x is drawn, given z, a surjection has an exact
    likelihood, whose contribution stands in place of a log-determinant (Nielsen et al., 2020, table
    1).

    Args:
        features: Number of entries of x.
        context_features: Size of the context; 0 for none.

    Raises:
        TypeError: If a size is not an int, or a subclass overrides a final method.
        ValueError: If a size is out of range.

    Example:
        >>> class Reflection(Transform):
        ...     def _to_base(self, x, context, generator):
        ...         return -x, x.new_zeros(x.shape[:-1])
        ...
        ...     def _to_data(self, z, context, generator):
        ...         return -z, z.new_zeros(z.shape[:-1])
        >>> Reflection(2).to_base(torch.tensor([1.0, 2.0]))
        tensor([-1., -2.])
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that overrides a final method, whose hook it would have to write."""
        super().__init_subclass__(**kwargs)
        refuse_overrides(cls, Transform, _HOOKS)

    def __init__(self, features: int, context_features: int = 0) -> None:
        super().__init__()
        self.features = check_count("features", features)
        self.context_features = check_count("context_features", context_features, least=0)

    @property
    def base_features(self) -> int:
        """Number of entries of z."""
        return self.features

    @property
    def event_shape(self) -> torch.Size:
        """Shape of a single x."""
        return torch.Size([self.features])

    @property
    def support(self) -> constraints.Constraint | None:
        """Which vectors x may be; None where that is for the next transform to say."""
        return constraints.real_vector

    @property
    def codomain(self) -> constraints.Constraint | None:
        """Which vectors z may be; None for the same numbers as those of x."""
        return None if self.support is None else constraints.real_vector

    @property
    def stochastic_to_base(self) -> bool:
        """Whether z is drawn, given x."""
        return False

    @property
    def stochastic_to_data(self) -> bool:
        """Whether x is drawn, given z."""
        return False

    @property
    def is_bijective(self) -> bool:
        """Whether neither direction draws, and both sides have the same size."""
        drawn = self.stochastic_to_base or self.stochastic_to_data
        return not drawn and self.base_features == self.features

    @property
    def likelihood(self) -> Likelihood:
        """What the ladj of this transform is.

        Here what the sizes and draws allow: a lower bound where z is drawn; for a map to fewer
        numbers, from which x is not drawn, the density on the surface that `to_data` covers; for
        one to more numbers, which are not drawn, no likelihood; exact otherwise.
        """
        if self.stochastic_to_base:
            return "lower_bound"
        if self.base_features > self.features:
            return "not_a_likelihood"
        if self.base_features < self.features and not self.stochastic_to_data:
            return "on_manifold"
        return "exact"

    @property
    def needs_initialization(self) -> bool:
        """Whether something is still to be set from data by `initialize`."""
        return any(scaling.needs_initialization for scaling in context_scalings(self))

    @final
    @torch.no_grad()
    def initialize(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> None:
        """Set what depends on the data from these rows. Once only: later calls change nothing.

        Raises:
            ValueError: If these rows do not do, such as too few of them.
        """
        if self.needs_initialization:
            self._initialize(x, context, generator)

    @final
    def to_base_and_ladj(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> tuple[BaseRows, Values]:
        """Towards the base: z and the ladj of each row, in nats.

        The ladj is log|det dz/dx| for a bijection, else the contribution to the log-likelihood.
        """
        return self._to_base(x, context, generator)

    @final
    def to_data_and_ladj(
        self, z: BaseRows, context: Context | None = None, *, generator: Generator | None = None
    ) -> tuple[Events, Values]:
        """Towards the data: x and minus the ladj of the way back, in nats, for each row."""
        return self._to_data(z, context, generator)

    @final
    def to_base(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> BaseRows:
        """Towards the base, without the ladj and its cost."""
        return self._to_base_value(x, context, generator)

    @final
    def to_data(
        self, z: BaseRows, context: Context | None = None, *, generator: Generator | None = None
    ) -> Events:
        """Towards the data, without the ladj and its cost."""
        return self._to_data_value(z, context, generator)

    @final
    def to_base_with_costs(
        self,
        x: Events,
        context: Context | None = None,
        *,
        regularizers: Sequence[CostRate],
        generator: Generator | None = None,
    ) -> tuple[BaseRows, Values, Costs]:
        """Towards the base: z, ladj and the cost of the path by each regularizer, 0 without one."""
        return self._to_base_with_costs(x, context, generator, regularizers)

    @final
    def contributions(self, x: Rows, context: Context | None = None) -> Rows:
        """The contribution of each feature to the log-likelihood, in nats; their sum is the ladj.

        Known of transforms that take each feature alone and draw nothing.

        Raises:
            NotImplementedError: If this transform is of another kind.
        """
        return self._contributions(x, context)

    @abstractmethod
    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        """Hook: z and log|det dz/dx| of each row."""

    @abstractmethod
    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        """Hook: x and log|det dx/dz| of each row."""

    def _to_base_value(
        self, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        """Hook: z alone, where that costs less."""
        return self._to_base(x, context, generator)[0]

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        """Hook: x alone, where that costs less."""
        return self._to_data(z, context, generator)[0]

    def _to_base_with_costs(
        self,
        x: Tensor,
        context: Tensor | None,
        generator: Generator | None,
        regularizers: Sequence[CostRate],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hook: z, ladj and costs, where the way to the base is a path."""
        z, ladj = self._to_base(x, context, generator)
        return z, ladj, x.new_zeros(len(regularizers), *ladj.shape)

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Hook: the contribution of each feature."""
        raise NotImplementedError(
            f"the ladj of a {type(self).__name__} is no sum over the features of x; ask "
            "to_base_and_ladj for the whole."
        )

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        """Hook: set what depends on the data; here scalings of the context."""
        for scaling in context_scalings(self):
            scaling.initialize(context)
