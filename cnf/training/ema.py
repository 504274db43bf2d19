"""Exponential moving average of the weights."""

import copy
from typing import Any

import torch

from cnf.flows.flow import Flow
from cnf.vector_fields.compiled import compile_alike


class Average:
    """Copy of a flow with an exponential moving average of its weights, and its buffers.

    The decay of step n is ``min(decay, (1 + n) / (10 + n))``, so the initial weights are soon
    forgotten.
    """

    def __init__(self, flow: Flow, decay: float) -> None:
        self.flow = copy.deepcopy(flow)
        compile_alike(self.flow, flow)
        self.decay = decay
        self.steps = 0
        # torch's AveragedModel looks the weights up at each step, noticeably in flow matching.
        self._weights = [weight.detach() for weight in self.flow.parameters()]
        self._followed = [weight.detach() for weight in flow.parameters()]
        self._buffers = list(zip(self.flow.buffers(), flow.buffers(), strict=True))

    def update(self) -> None:
        """Average the weights of the flow in, and copy its buffers."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._weights, self._followed, 1 - decay)
        for buffer, followed in self._buffers:
            buffer.copy_(followed)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights, and the number of steps."""
        return {"steps": self.steps, "flow": self.flow.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.steps = state["steps"]
        self.flow.load_state_dict(state["flow"])
