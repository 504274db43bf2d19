"""Our flows as Pyro's. Importing it imports Pyro; `cnf.adapters.to_pyro` does so when called."""

from collections.abc import Sequence
from typing import Any

from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from cnf.distribution import FlowDistribution


class PyroDistribution(TorchDistribution):
    """A flow given a context, as a Pyro distribution.

    Args:
        distribution: The flow given the context.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own form

    def __init__(self, distribution: FlowDistribution) -> None:
        self.distribution = distribution
        self.has_rsample = distribution.has_rsample
        super().__init__(distribution.batch_shape, distribution.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Which values have a density."""
        return self.distribution.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "PyroDistribution":
        """The same distribution for a larger batch."""
        del _instance
        return PyroDistribution(self.distribution.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats."""
        return self.distribution.log_prob(value)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw without gradient."""
        return self.distribution.sample(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw differentiably."""
        return self.distribution.rsample(sample_shape)
