"""Memory of tensors: measurement, and sizes in words."""

import os
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cnf._checks import is_hidden

_UNITS = {
    prefix + suffix: base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for suffix, base in (("b", 1000), ("ib", 1024))
    if prefix or suffix == "b"
}
_SIZE = re.compile(r"(\d+(?:\.\d*)?)\s*([a-z]+)")


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of live tensors made in it.

    It observes the operations, on every device: the number is exact and reproducible, unlike the
    memory of a process, whose allocators round and keep freed memory. Temporary memory within an
    operation is not counted.

    Example:
        >>> import torch
        >>> with LiveBytes() as live:
        ...     x = torch.zeros(1000, dtype=torch.float64)
        ...     y = (2 * x)[:500]  # a part keeps the whole
        ...     z = x + 1
        ...     del z
        >>> live.now, live.peak
        (16000, 24000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes now."""
        self.peak = 0
        """Most bytes at any time."""
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # A view, or a tensor changed in place, has no memory of its own.
        given = {storage._cdata for storage in _storages((args, kwargs))}
        made = func(*args, **kwargs)
        for storage in _storages(made):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._alive:
                self._alive[key] = weakref.ref(storage, partial(self._freed, key, size))
                self.now += size
        self.peak = max(self.peak, self.now)
        return made

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch's guard around each operation would import its compiler."""
        return False

    def _freed(self, key: int, size: int, _: object) -> None:
        del self._alive[key]
        self.now -= size


def bytes_in(text: str) -> int | None:
    """Parse a size such as "1 GiB" or "500 MB" to bytes; None if it is no such size.

    Example:
        >>> bytes_in("1.5 KiB"), bytes_in("2 MB"), bytes_in("2")
        (1536, 2000000, None)
    """
    found = _SIZE.fullmatch(text.strip().lower())
    if found is None or found[2] not in _UNITS:
        return None
    return int(float(found[1]) * _UNITS[found[2]])


def in_words(size: int) -> str:
    """Format a number of bytes with a unit.

    Example:
        >>> in_words(1536)
        '1.5 KiB'
    """
    power = min(max(size, 1).bit_length() - 1, 40) // 10
    return f"{size / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def check_fits(name: str, value: object, numbers: int, *, like: Tensor, remedy: str) -> None:
    """Refuse an argument that asks for a tensor larger than all memory of the device.

    The tensor has so many `numbers`, and the dtype and device of `like`.
    """
    if is_hidden(like):
        return  # sizes may be symbolic
    needed, memory = numbers * like.element_size(), _memory_of(like.device)
    if needed > memory:
        raise ValueError(
            f"{name} must be small enough for the memory of {like.device}, {in_words(memory)}; "
            f"got {value}, which takes {in_words(needed)}. {remedy}"
        )


def _memory_of(device: torch.device) -> int:
    """Return the memory of the device in bytes; a huge number if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**63


def _storages(values: Any) -> list[Any]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
