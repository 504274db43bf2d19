"""The exponential moving average of the weights."""

import copy
from typing import Any

import torch

from cnf.flows.flow import Flow
from cnf.vector_fields.compiled import compile_alike


class Average:
    """A copy of a flow whose weights follow those of the flow slowly.

    After n steps the share of the past is ``min(decay, (1 + n) / (10 + n))``, so that the initial
    weights are soon forgotten, whatever the decay. Buffers, such as the statistics of a normalising
    layer, are those of the flow.

    Args:
        flow: The flow that is followed.
        decay: Share of the past that each step keeps in the end.
    """

    def __init__(self, flow: Flow, decay: float) -> None:
        self.flow = copy.deepcopy(flow)
        compile_alike(self.flow, flow)
        self.decay = decay
        self.steps = 0
        # torch's AveragedModel looks the weights up anew each time, which a step of flow matching
        # is short enough to feel.
        self._weights = [weight.detach() for weight in self.flow.parameters()]
        self._followed = [weight.detach() for weight in flow.parameters()]
        self._buffers = list(zip(self.flow.buffers(), flow.buffers(), strict=True))

    def update(self) -> None:
        """Follow the weights of the flow, and copy its buffers."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._weights, self._followed, 1 - decay)
        for buffer, followed in self._buffers:
            buffer.copy_(followed)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights, and the steps so far."""
        return {"steps": self.steps, "flow": self.flow.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.steps = state["steps"]
        self.flow.load_state_dict(state["flow"])
