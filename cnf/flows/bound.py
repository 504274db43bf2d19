"""A flow with the tensors that a running `torch.func.functional_call` has put into it."""

import inspect
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _functional_call

Flow: TypeAlias = Any
"""A `cnf.flows.flow.Flow`, whose module stands above this one."""


class BoundFlow(nn.Module):
    """A flow, and the tensors that `torch.func.functional_call` has put into it for now.

    They would be gone when a distribution that was made within the call is asked. All other
    parameters and buffers are those of the flow, whatever becomes of them: by training, `to` or
    `load_state_dict`.

    Args:
        flow: The flow.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.kept = _exchanged(flow)

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the method of the flow returns, with the tensors kept.

        Raises:
            RuntimeError: If these no longer fit the flow.
        """
        exchanged = self.exchanged()
        if not exchanged:
            return getattr(self.flow, method)(*args, **kwargs)
        return torch.func.functional_call(self, exchanged, (method, *args), kwargs)

    def exchanged(self) -> dict[str, Tensor]:
        """The tensors kept, by their names here, that are not in the flow now.

        Raises:
            RuntimeError: If they no longer fit the flow.
        """
        now = _tensors_of(self.flow) if self.kept else {}
        exchanged = {}
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
                exchanged[f"flow.{name}"] = kept
        return exchanged

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The call with tensors exchanged."""
        return getattr(self.flow, method)(*args, **kwargs)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _exchanged(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a `functional_call` under way has put into a module, by name.

    The module does not show it: the stack of calls does. Under `torch.compile` it cannot be read.
    """
    if torch.compiler.is_compiling():
        return {}
    given: set[int] = set()
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _functional_call.__code__:
            given.update(map(id, frame.f_locals["parameters_and_buffers"].values()))
        frame = frame.f_back
    return {name: tensor for name, tensor in _tensors_of(module).items() if id(tensor) in given}
