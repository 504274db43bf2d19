"""Distributed training: processes, sums and broadcasts."""

import os
import pickle
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class OtherProcessError(RuntimeError):
    """Another process failed; its own error says why."""


class Processes:
    """Processes that train together: the ones that torchrun started, or this one alone.

    Each takes a part of the rows. Their sums also tell every process whether another one failed, so
    an error in one is an error in all, and none is left waiting. Therefore gradients are summed
    once a step, and not during the backward pass as by torch's `DistributedDataParallel`.
    """

    def __init__(self, device: torch.device) -> None:
        # Fabric takes longer to import than torch, and `import cnf` must not wait for it.
        from lightning_fabric import Fabric

        self.device = device
        self.count = _setting("WORLD_SIZE") if torch.distributed.is_torchelastic_launched() else 1
        if self.count == 1:
            devices = 1 if device.index is None else [device.index]
            self._fabric = Fabric(accelerator=device.type, devices=devices)
        else:
            self._fabric = Fabric(
                accelerator=device.type,
                devices=_setting("LOCAL_WORLD_SIZE"),
                num_nodes=_setting("GROUP_WORLD_SIZE"),
                strategy="ddp",
            )
            self._fabric.launch()
        self.rank: int = self._fabric.global_rank

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, rows: int) -> Tensor:
        """Return the indices of the rows of this process, among so many."""
        return torch.arange(rows).tensor_split(self.count)[self.rank]

    def sums(self, compute: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """Sum the two numbers that `compute` returns over the processes.

        Raises:
            OtherProcessError: If `compute` fails in another process; errors here pass through.
        """
        if self.count == 1:
            return compute()
        error, numbers = None, (0.0, 0.0)
        try:
            numbers = compute()
        except Exception as caught:
            error = caught
        told = torch.tensor([*numbers, error is not None], dtype=torch.float64, device=self.device)
        first, second, failures = self._sum(told).tolist()
        if error is not None:
            raise error
        if failures:
            raise OtherProcessError("another process failed, and its message says why")
        return first, second

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes; a missing one counts as zero."""
        if self.count == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        total = self._sum(torch.cat([gradient.flatten() for gradient in gradients]))
        pieces = total.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def from_first(self, make: Callable[[], Value]) -> Value:
        """Call `make` in the first process, and return its result, or raise its error, in all."""
        if self.count == 1:
            return make()
        told: tuple[Any, Exception | None] = None, None
        if self.is_first:
            try:
                told = make(), None
            except Exception as error:
                told = None, _portable(error)
        value, failure = self._fabric.broadcast(told)
        if failure is not None:
            raise failure
        return cast(Value, value)

    def agree_on(self, module: nn.Module) -> None:
        """Copy the tensors of the first process's module to every process."""
        if self.count > 1:
            state = {name: value.cpu() for name, value in module.state_dict().items()}
            module.load_state_dict(self._fabric.broadcast(state))

    def _sum(self, values: Tensor) -> Tensor:
        return cast(Tensor, self._fabric.all_reduce(values, reduce_op="sum"))


def _setting(name: str) -> int:
    return int(os.environ[name])


def _portable(error: Exception) -> Exception:
    """Return the error, or its text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:
        return RuntimeError(repr(error))
    return error
