"""What makes two runs the same: settings, data and flow, in words that can be compared."""

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Mapping

from torch import Tensor, nn

from cnf.flow import Flow
from cnf.training.plan import Plan
from cnf.training.processes import Processes
from cnf.training.rows import PartOfRows, Rows, TensorRows

_ROWS_HASHED = 1000
_DIFFERENCES_NAMED = 5
_FREE = ("progress", "accumulate")
"""Settings that may change when a run resumes; the parts of a minibatch are compared instead."""


def fingerprint(
    plan: Plan, flow: Flow, rows: Rows | None, validation: Rows | None, processes: Processes
) -> dict[str, str]:
    """What a run depends on: a name and a short description of each."""
    told = {"number of phases": str(len(plan))}
    parts_of_flow = set(flow.modules())
    for number, (objective, config) in enumerate(plan, start=1):
        for path, part in objective.named_modules():
            if part not in parts_of_flow:
                place = f"{path or 'objective'} of phase {number}"
                told |= _settings(place, part)
        parts = config.accumulate * processes.count
        told[f"parts of a minibatch (accumulate times processes) in phase {number}"] = str(parts)
        for field in dataclasses.fields(config):
            if field.name not in _FREE:
                told[f"{field.name} of phase {number}"] = _stable(getattr(config, field.name))
    for name, data in (("data", rows), ("validation", validation)):
        told[name] = "none" if data is None else _describe(data)
    for path, part in flow.named_modules():
        told |= _settings(f"{path} of the flow" if path else "the flow", part)
    for name, value in flow.state_dict().items():
        told[f"tensor {name!r} of the flow"] = f"{value.dtype} {tuple(value.shape)}"
    return told


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Which descriptions differ, for a message; empty if none does."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    listed = "; ".join(
        f"{name}: {there.get(name, 'none')} there, {here.get(name, 'none')} here"
        for name in names[:_DIFFERENCES_NAMED]
    )
    more = len(names) - _DIFFERENCES_NAMED
    return f"{listed}; and {more} more" if more > 0 else listed


def _settings(place: str, part: nn.Module) -> dict[str, str]:
    """The class of a module, and its constructor's arguments, if they are attributes."""
    told = {place: type(part).__qualname__}
    for name in inspect.signature(type(part)).parameters:
        value = vars(part).get(name)
        if value is not None and not isinstance(value, Tensor | nn.Module):
            told[f"{name} of {place}"] = _stable(value)
    return told


def _stable(value: object) -> str:
    """The representation without addresses, which differ from one process to the next."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _describe(rows: Rows) -> str:
    whole = rows.rows if isinstance(rows, PartOfRows) else rows
    if not isinstance(whole, TensorRows):
        return f"{len(rows)} rows of a Dataset"
    inputs, weight = rows.some(_ROWS_HASHED)
    tensors = [tensor for tensor in (*inputs, weight) if tensor is not None]
    content = b"".join(tensor.cpu().resolve_neg().numpy().tobytes() for tensor in tensors)
    return f"{len(rows)} rows with the hash {hashlib.sha256(content).hexdigest()[:8]}"
