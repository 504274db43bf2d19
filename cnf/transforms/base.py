"""A transform: one step of a flow between data and base."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cnf._checks import check_count
from cnf.regularizers import CostRate

Likelihood = Literal["exact", "estimate", "lower_bound"]
"""What a ladj, and so a likelihood, is: exact up to rounding and solver tolerance, an unbiased
estimate, or part of a lower bound."""


class Transform(nn.Module, ABC):
    """A map between data and base that reports its contribution to the log-likelihood.

    Args:
        features: Size of x.
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
    def likelihood(self) -> Likelihood:
        """What the ladj of this transform is."""
        return "exact"

    @abstractmethod
    def to_base_and_ladj(
        self,
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "*batch"]]:
        """Towards the base: z and log|det dz/dx|, in nats, for each row."""

    @abstractmethod
    def to_data_and_ladj(
        self,
        z: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "*batch"]]:
        """Towards the data: x and log|det dx/dz|, in nats, for each row."""

    def to_base_with_costs(
        self,
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        regularizers: Sequence[CostRate],
        generator: torch.Generator | None = None,
    ) -> tuple[
        Float[Tensor, "*batch features"], Float[Tensor, "*batch"], Float[Tensor, "costs *batch"]
    ]:
        """Towards the base: z, ladj and the cost of the path by each regularizer; here none."""
        z, ladj = self.to_base_and_ladj(x, context, generator=generator)
        return z, ladj, x.new_zeros(len(regularizers), *x.shape[:-1])

    def to_base(
        self,
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> Float[Tensor, "*batch features"]:
        """Towards the base, without the ladj."""
        return self.to_base_and_ladj(x, context)[0]

    def to_data(
        self,
        z: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> Float[Tensor, "*batch features"]:
        """Towards the data, without the ladj."""
        return self.to_data_and_ladj(z, context)[0]
