"""A flow with the tensors of a running `torch.func.functional_call`."""

import inspect
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _functional_call

Flow: TypeAlias = Any
"""A `cnf.flows.flow.Flow`, whose module stands above this one."""


class BoundFlow(nn.Module):
    """A flow that keeps the tensors of the `torch.func.functional_call` in which it was made.

    A distribution made within the call keeps them after it. All other parameters and buffers
    follow the flow, through training, `to` and `load_state_dict`.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.kept = _functional_tensors(flow)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the flow, with the tensors kept."""
        replacements = self.replacements()
        if not replacements:
            return self(method, *args, **kwargs)
        return torch.func.functional_call(self, replacements, (method, *args), kwargs)

    def replacements(self) -> dict[str, Tensor]:
        """Return the tensors kept that are not in the flow now, by their names here.

        Raises:
            RuntimeError: If they no longer fit the flow.
        """
        now = _tensors_of(self.flow) if self.kept else {}
        replacements = {}
        for name, kept in self.kept.items():
            there = now.get(name)
            if there is None or (kept.dtype, kept.device) != (there.dtype, there.device):
                raise RuntimeError(
                    f"the flow was changed after the distribution was made by functional_call: "
                    f"{name} was {kept.dtype} on {kept.device}, and is "
                    f"{'gone' if there is None else f'{there.dtype} on {there.device}'}. Make the "
                    "distribution anew, with parameters of the new kind."
                )
            if kept is not there:
                replacements[f"flow.{name}"] = kept
        return replacements

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the flow, with the tensors that it has now."""
        return getattr(self.flow, method)(*args, **kwargs)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _functional_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that running functional calls have put into a module, by name."""
    if torch.compiler.is_compiling():  # cannot read the stack of calls, which alone shows them
        return {}
    given: set[int] = set()
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _functional_call.__code__:
            given.update(map(id, frame.f_locals["parameters_and_buffers"].values()))
        frame = frame.f_back
    return {name: tensor for name, tensor in _tensors_of(module).items() if id(tensor) in given}
