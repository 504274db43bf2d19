"""Base class of transforms between data and base."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints

from cnf._checks import check_count, refuse_overrides
from cnf._shapes import BaseRows, Context, Costs, Events, Values
from cnf.bases import Likelihood
from cnf.regularizers import CostRate
from cnf.vector_fields.conditioning import context_scalings

WithLadj: TypeAlias = tuple[Tensor, Tensor]
"""Result of a hook: the moved points, and the ladj of each."""

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
"""Hook of a subclass for each final method."""


class Transform(nn.Module, ABC):
    """Map between data and base with its contribution to the log-likelihood, the ladj.

    The base side is always vectors, ``(*batch, base_features)``; so is the data side, ``(*batch,
    features)``, unless it has another `event_shape`, such as images.

    The public methods are final; a subclass writes hooks. `_to_base` and `_to_data` get the points,
    the context (or None) and the generator, and return the moved points and the ladj.
    `_to_base_value` and `_to_data_value` return the points alone, if that costs less;
    `_to_base_with_costs` is for a transform that follows a path. A transform that is initialised
    from data writes `needs_initialization` and `_initialize`.

    A transform that is no bijection of real vectors declares it by its attributes. If z is drawn
    given x, the ladj gives a lower bound; if x is drawn given z, a surjection has an exact
    likelihood, with a contribution instead of a log-determinant (Nielsen et al., 2020, table 1).

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
        """Refuse a class that overrides a final method."""
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
        """Constraint on x; None for the support of the next transform."""
        return constraints.real_vector

    @property
    def codomain(self) -> constraints.Constraint | None:
        """Constraint on z; None for the support of x."""
        return None if self.support is None else constraints.real_vector

    @property
    def stochastic_to_base(self) -> bool:
        """Whether z is drawn given x."""
        return False

    @property
    def stochastic_to_data(self) -> bool:
        """Whether x is drawn given z."""
        return False

    @property
    def is_bijective(self) -> bool:
        """Whether neither direction draws, and both sides have the same size."""
        drawn = self.stochastic_to_base or self.stochastic_to_data
        return not drawn and self.base_features == self.features

    @property
    def is_conformal(self) -> bool:
        """Whether the map stretches all directions alike, as a `ConformalEmbedding` needs."""
        return False

    @property
    def likelihood(self) -> Likelihood:
        """Kind of likelihood, by default from the sizes and draws.

        "lower_bound" if z is drawn; "not_a_likelihood" for more entries of z than of x;
        "on_manifold", the density on the surface that `to_data` covers, for fewer entries of z from
        which x is not drawn; else "exact".
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
        """Whether `initialize` must still set something from data."""
        return any(scaling.needs_initialization for scaling in context_scalings(self))

    @final
    @torch.no_grad()
    def initialize(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> None:
        """Initialise from rows of data, once: later calls change nothing.

        Raises:
            ValueError: If these rows do not suffice.
        """
        if self.needs_initialization:
            self._initialize(x, context, generator)

    @final
    def to_base_and_ladj(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> tuple[BaseRows, Values]:
        """Map data to base: z and the ladj of each row, in nats.

        The ladj is log|det dz/dx| for a bijection, else the contribution to the log-likelihood.
        """
        return self._to_base(x, context, generator)

    @final
    def to_data_and_ladj(
        self, z: BaseRows, context: Context | None = None, *, generator: Generator | None = None
    ) -> tuple[Events, Values]:
        """Map base to data: x and minus the ladj of x to z, in nats, for each row."""
        return self._to_data(z, context, generator)

    @final
    def to_base(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> BaseRows:
        """Map data to base, without the cost of the ladj."""
        return self._to_base_value(x, context, generator)

    @final
    def to_data(
        self, z: BaseRows, context: Context | None = None, *, generator: Generator | None = None
    ) -> Events:
        """Map base to data, without the cost of the ladj."""
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
        """Map data to base: z, ladj and the cost of the path by each regularizer, or 0."""
        return self._to_base_with_costs(x, context, generator, regularizers)

    @final
    def contributions(self, x: Events, context: Context | None = None) -> BaseRows:
        """Return the contribution of each entry of z to the log-likelihood, in nats.

        The sum over entries is the ladj. It is the logarithm of the derivative of the entry where
        this transform is elementwise or a coupling; channels that are mixed share theirs equally.

        Raises:
            NotImplementedError: If the ladj is no such sum, or this transform draws.
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
        """Hook: z alone, if that costs less."""
        return self._to_base(x, context, generator)[0]

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        """Hook: x alone, if that costs less."""
        return self._to_data(z, context, generator)[0]

    def _to_base_with_costs(
        self,
        x: Tensor,
        context: Tensor | None,
        generator: Generator | None,
        regularizers: Sequence[CostRate],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hook: z, ladj and costs of a path."""
        z, ladj = self._to_base(x, context, generator)
        return z, ladj, x.new_zeros(len(regularizers), *ladj.shape)

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Hook: the contribution of each entry of z."""
        raise NotImplementedError(
            f"the ladj of a {type(self).__name__} is no sum over the entries of z; ask "
            "to_base_and_ladj for the whole."
        )

    def _rearranged(self, numbers: Tensor) -> Tensor:
        """Hook: a number for each entry of x, in the order of z."""
        return numbers

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        """Hook: initialise from data; here scalings of the context."""
        for scaling in context_scalings(self):
            scaling.initialize(context)
