"""How parts are built whose weights come from elsewhere: privately, and within a budget."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class OverBudgetError(ValueError):
    """What is built takes more calls or memory than it may."""


class Building(TorchDispatchMode):
    """Within, all that this thread draws from torch comes from generators of its own.

    Torch's global generators are neither read nor set, so that other threads draw from them as if
    nothing were built.

    Args:
        seed: The seed of what is drawn: as after ``torch.manual_seed`` with it.
        most_bytes: Memory that all new tensors together may take; None for any.
        most_calls: Number of torch operations; None for any.

    Raises:
        OverBudgetError: Within, before an operation that would go beyond either.
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
        """One operation of torch."""
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
        """That of the device of an operation."""
        devices = (leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        device = kwargs.get("device") or next(devices, torch.device("cpu"))
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


def _bytes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Size of what an operation gives, found without memory."""
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    try:
        made = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # its size depends on values, or there is no rule
        return 0
    return sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor))


def _with_generator(func: Any) -> Any:
    """The variant of an operation that takes a generator."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    name = func._overloadname
    variant = "generator" if name == "default" else f"{name}_generator"
    return getattr(func.overloadpacket, variant)
