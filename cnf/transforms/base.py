"""A transform: one step of a flow between data and base."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import constraints

from cnf._checks import check_count
from cnf.regularizers import CostRate
from cnf.vector_fields.conditions import context_scalings

if TYPE_CHECKING:
    from cnf.transforms.continuous import ContinuousTransform

Likelihood = Literal["exact", "estimate", "lower_bound", "biased_estimate"]
"""What a ladj, and so a likelihood, is, the strongest first: exact up to rounding and solver
tolerance; an unbiased estimate; part of a lower bound; or an estimate whose mean may be on either
side of the truth."""


class Transform(nn.Module, ABC):
    """A map between data and base that reports its contribution to the log-likelihood.

    The base side is always vectors, ``(*batch, base_features)``. The data side is vectors too,
    ``(*batch, features)``, unless `event_shape` says otherwise, as for images.

    Args:
        features: Number of entries of x.
        context_features: Size of the context; 0 for none.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range.
    """

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
    def likelihood(self) -> Likelihood:
        """What the ladj of this transform is."""
        return "exact"

    @property
    def is_bijective(self) -> bool:
        """Whether each z comes from one x only, and the ladj is that of a Jacobian."""
        return True

    @property
    def awaits_data(self) -> bool:
        """Whether something is still to be set from data by `initialize`."""
        return any(scaling.awaits_data for scaling in context_scalings(self))

    def initialize(
        self,
        x: Float[Tensor, "*batch_and_event"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set, once, what depends on the data, from the first rows that come.

        Here the scaling of the context, in a part that has one.
        """
        del x, generator
        for scaling in context_scalings(self):
            scaling.initialize(context)

    def rebuilt(
        self, change: Callable[["ContinuousTransform"], "ContinuousTransform"]
    ) -> "Transform":
        """The same transform, sharing every parameter, with `change` made to what is continuous."""
        del change
        return self

    @abstractmethod
    def to_base_and_ladj(
        self,
        x: Float[Tensor, "*batch_and_event"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "*batch base_features"], Float[Tensor, "*batch"]]:
        """Towards the base: z and log|det dz/dx|, in nats, for each row."""

    @abstractmethod
    def to_data_and_ladj(
        self,
        z: Float[Tensor, "*batch base_features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "*batch_and_event"], Float[Tensor, "*batch"]]:
        """Towards the data: x and log|det dx/dz|, in nats, for each row."""

    def to_base_with_costs(
        self,
        x: Float[Tensor, "*batch_and_event"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        regularizers: Sequence[CostRate],
        generator: torch.Generator | None = None,
    ) -> tuple[
        Float[Tensor, "*batch base_features"],
        Float[Tensor, "*batch"],
        Float[Tensor, "costs *batch"],
    ]:
        """Towards the base: z, ladj and the cost of the path by each regularizer; here none."""
        z, ladj = self.to_base_and_ladj(x, context, generator=generator)
        return z, ladj, x.new_zeros(len(regularizers), *ladj.shape)

    def to_base(
        self,
        x: Float[Tensor, "*batch_and_event"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch base_features"]:
        """Towards the base, without the ladj."""
        return self.to_base_and_ladj(x, context, generator=generator)[0]

    def to_data(
        self,
        z: Float[Tensor, "*batch base_features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch_and_event"]:
        """Towards the data, without the ladj."""
        return self.to_data_and_ladj(z, context, generator=generator)[0]
