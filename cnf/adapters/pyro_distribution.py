"""Our flows as Pyro's. Importing it imports Pyro; `cnf.adapters.to_pyro` does so when called."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from cnf.flows.distribution import FlowDistribution


class _Drawn(NamedTuple):
    """A draw and its log-density."""

    value: Tensor
    log_prob: Tensor
    state: list[object]


class PyroDistribution(TorchDistribution):
    """A flow given a context, as a Pyro distribution.

    Args:
        distribution: The flow given the context.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own form

    def __init__(self, distribution: FlowDistribution) -> None:
        self.distribution = distribution
        self.has_rsample = distribution.has_rsample
        self._drawn: _Drawn | None = None
        super().__init__(distribution.batch_shape, distribution.event_shape, validate_args=False)

    def __getstate__(self) -> dict[str, Any]:
        """All but the last draw, whose graph cannot be copied."""
        return {**vars(self), "_drawn": None}

    @property
    def support(self) -> constraints.Constraint:
        """Which values have a density."""
        return self.distribution.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "PyroDistribution":
        """The same distribution for a larger batch."""
        del _instance
        return PyroDistribution(self.distribution.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats; of the last draw by `rsample`, without a solve."""
        drawn = self._drawn
        if drawn is not None and value is drawn.value and self._state(value) == drawn.state:
            return drawn.log_prob
        return self.distribution.log_prob(value)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw without gradient."""
        return self.distribution.sample(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw differentiably; the log-density, which Pyro asks for next, comes from the solve."""
        value, log_prob = self.distribution.rsample_and_log_prob(sample_shape)
        self._drawn = _Drawn(value, log_prob, self._state(value))
        return value

    def _state(self, value: Tensor) -> list[object]:
        """What a log-density of `value` depends on, to tell whether it has changed."""
        tensors = [value, *self.distribution.flow.parameters(), *self.distribution.flow.buffers()]
        versions = [None if part.is_inference() else part._version for part in tensors]
        return [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *versions]
