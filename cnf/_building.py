"""Construction of modules with private random numbers, and within a budget."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class OverBudgetError(ValueError):
    """Construction takes more calls or memory than its budget."""


class Building(TorchDispatchMode):
    """Context in which random numbers of this thread come from private generators.

    Torch's global generators are neither read nor set, so that other threads are not affected. An
    operation beyond the budget raises an `OverBudgetError`.

    Args:
        seed: Seed of the generators; draws are as after ``torch.manual_seed`` with it.
        most_bytes: Largest memory of all new tensors together; None for any.
        most_calls: Largest number of torch operations; None for any.
    """

    def __init__(
        self, *, seed: int = 0, most_bytes: int | None = None, most_calls: int | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self.most_bytes = most_bytes
        self.most_calls = most_calls
        self.generators: dict[torch.device, torch.Generator] = {}
        self.bytes = 0
        self.calls = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation of torch."""
        kwargs = dict(kwargs or {})
        self.count_call()
        if self.most_bytes is not None and not (func._schema.is_mutable or func.is_view):
            self.bytes += _bytes_of(func, args, kwargs)
            if self.bytes > self.most_bytes:
                raise OverBudgetError(f"it asks for more than {self.most_bytes:,} bytes of memory")
        if torch.Tag.nondeterministic_seeded in func.tags:
            kwargs["generator"] = kwargs.get("generator") or self._generator(args, kwargs)
            return _with_generator(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def count_call(self) -> None:
        """Count one operation, or one part."""
        self.calls += 1
        if self.most_calls is not None and self.calls > self.most_calls:
            raise OverBudgetError(f"it takes more than {self.most_calls:,} operations to build")

    def _generator(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator:
        """Return the generator for the device of an operation."""
        devices = (leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        device = kwargs.get("device") or next(devices, torch.device("cpu"))
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


def _bytes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the size of the result of an operation, computed on the device meta."""
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    try:
        made = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # its size depends on values, or there is no rule
        return 0
    return sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor))


def _with_generator(func: Any) -> Any:
    """Return the variant of an operation that takes a generator."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    name = func._overloadname
    variant = "generator" if name == "default" else f"{name}_generator"
    return getattr(func.overloadpacket, variant)
