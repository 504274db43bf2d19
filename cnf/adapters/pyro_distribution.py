"""Flows as Pyro distributions. This imports Pyro; `cnf.adapters.to_pyro` imports it when called."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from cnf.flows.as_torch.distribution import FlowDistribution


class PyroDistribution(TorchDistribution):
    """Pyro distribution of a flow given a context."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own form

    def __init__(self, distribution: FlowDistribution) -> None:
        self.distribution = distribution
        self.has_rsample = distribution.has_rsample
        self._drawn: tuple[Tensor, Tensor, list[object]] | None = None
        super().__init__(distribution.batch_shape, distribution.event_shape, validate_args=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the last draw, whose graph cannot be copied."""
        return {**vars(self), "_drawn": None}

    @property
    def support(self) -> constraints.Constraint:
        """Support of the flow."""
        return self.distribution.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "PyroDistribution":
        """Return the same distribution for a larger batch."""
        return PyroDistribution(self.distribution.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density in nats; for the last draw by `rsample`, without a solve."""
        if self._drawn is not None:
            drawn, log_prob, state = self._drawn
            if value is drawn and self._state(value) == state:
                return log_prob
        return self.distribution.log_prob(value)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw without gradient."""
        return self.distribution.sample(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw differentiably; the log-density, which Pyro asks for next, comes from the solve."""
        value, log_prob = self.distribution.rsample_and_log_prob(sample_shape)
        self._drawn = value, log_prob, self._state(value)
        return value

    def _state(self, value: Tensor) -> list[object]:
        """Return the versions of the tensors that a log-density of `value` depends on."""
        tensors = [value, *self.distribution.flow.parameters(), *self.distribution.flow.buffers()]
        versions = [None if part.is_inference() else part._version for part in tensors]
        return [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *versions]
