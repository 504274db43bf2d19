"""Fingerprint of a run: descriptions of its settings, data and flow."""

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import StackDataset, TensorDataset

from cnf.data.memmap import NpyRows
from cnf.flows.calibration import before_calibration
from cnf.flows.flow import Flow
from cnf.ode import ODESolver
from cnf.training.data import Batch, DatasetRows, PartOfRows, TrainingData
from cnf.training.distributed import Processes
from cnf.training.optimization import Optimization
from cnf.training.phases import Plan
from cnf.transforms import Chain

_ROWS_AT_ONCE = 2**14
_ONCE_HASHED = 1000
_DIFFERENCES_NAMED = 5
_FREE = ("progress", "accumulation_steps")
"""Settings that may change when a run resumes; the number of parts of a minibatch may not."""
_LATER = ("optimizer", "weight_decay", "max_seconds")
"""Settings that runs of older versions, which resume here, do not have: named unless default."""
_NEW_NAMES = {
    "accumulate times": "accumulation_steps times",
    "control=": "error_norm=",
    "kept of": "mask of",
}
"""New names of settings, by the old names in the runs of older versions."""


def fingerprint(
    plan: Plan,
    flow: Flow,
    rows: TrainingData | None,
    validation: TrainingData | None,
    processes: Processes,
) -> dict[str, str]:
    """Describe everything that a run depends on, by name."""
    told = {"number of phases": str(len(plan))}
    parts_of_flow = set(flow.modules())
    for number, (objective, config) in enumerate(plan, start=1):
        for path, part in objective.named_modules():
            if part not in parts_of_flow:
                place = f"{path or 'objective'} of phase {number}"
                told |= _settings(place, part)
        parts = str(config.accumulation_steps * processes.count)
        told[f"parts of a minibatch (accumulation_steps times processes) in phase {number}"] = parts
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name not in _FREE and not (field.name in _LATER and value == field.default):
                told[f"{field.name} of phase {number}"] = _stable(value)
        for name, value in Optimization(objective, config).settings().items():
            told[f"{name} of phase {number}"] = _stable(value)
    for name, data in (("data", rows), ("validation", validation)):
        told[name] = "none" if data is None else _describe(data)
    for path, part in flow.named_modules():
        told |= _settings(f"{path} of the flow" if path else "the flow", part)
    for name, value in flow.state_dict().items():
        told[f"tensor {name!r} of the flow"] = f"{value.dtype} {tuple(value.shape)}"
    return told


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """List the descriptions that differ, for a message; empty if none does."""
    there, here = _in_new_names(there), _in_new_names(here)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    listed = "; ".join(
        f"{name}: {there.get(name, 'none')} there, {here.get(name, 'none')} here"
        for name in names[:_DIFFERENCES_NAMED]
    )
    more = len(names) - _DIFFERENCES_NAMED
    return f"{listed}; and {more} more" if more > 0 else listed


def _in_new_names(told: Mapping[str, str]) -> Mapping[str, str]:
    for old, new in _NEW_NAMES.items():
        told = {name.replace(old, new): text.replace(old, new) for name, text in told.items()}
    return told


def _settings(place: str, part: nn.Module) -> dict[str, str]:
    """Describe the class of a module, and the constructor arguments that are attributes."""
    if isinstance(part, Chain):  # runs of older versions, which resume here, held a list
        return {place: nn.ModuleList.__qualname__}
    told = {place: type(part).__qualname__}
    for name in inspect.signature(type(part)).parameters:
        value = vars(part).get(name)
        if isinstance(value, ODESolver):
            value = before_calibration(value)  # a calibration is the end of a run
        if value is not None and not isinstance(value, Tensor | nn.Module):
            told[f"{name} of {place}"] = _stable(value)
    return told


def _stable(value: object) -> str:
    """Return the repr without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _describe(rows: TrainingData) -> str:
    """Return the number of rows, with a hash of them if they are in arrays."""
    whole = rows.rows if isinstance(rows, PartOfRows) else rows
    content = hashlib.sha256()
    if isinstance(whole, DatasetRows):
        arrays = _arrays_of(whole.dataset)
        if arrays is None:
            return f"{len(rows)} rows of a Dataset"
        if isinstance(rows, PartOfRows):
            content.update(rows.places.numpy().tobytes())
        for array in arrays:
            content.update(f"{array.dtype} {tuple(array.shape)}".encode())
            for start in range(0, len(array), _ROWS_AT_ONCE):
                content.update(_bytes_of(array[start : start + _ROWS_AT_ONCE]))
        return f"{len(rows)} rows of a Dataset with the hash {content.hexdigest()[:16]}"
    for number in range(len(Batch._fields)):  # in the order of older versions, which had three
        for indices in torch.arange(len(rows)).split(_ROWS_AT_ONCE):
            column = rows.take(indices)[number]
            content.update(b"" if column is None else _bytes_of(column))
    of_all = f" of all (older versions: of {_ONCE_HASHED})" if len(rows) > _ONCE_HASHED else ""
    return f"{len(rows)} rows with the hash {content.hexdigest()[:8]}{of_all}"


def _arrays_of(dataset: object) -> list[Any] | None:
    """Return the arrays that a dataset reads its rows from, or None if they are unknown."""
    if isinstance(dataset, Tensor):
        return [dataset]
    if type(dataset) is NpyRows:
        return [dataset.array]
    if type(dataset) is TensorDataset:
        return list(dataset.tensors)
    if type(dataset) is StackDataset:
        parts = dataset.datasets
        found = list(map(_arrays_of, parts.values() if isinstance(parts, dict) else parts))
        return None if None in found else [array for arrays in found for array in arrays or ()]
    return None


def _bytes_of(rows: Any) -> bytes:
    array = rows.numpy(force=True) if isinstance(rows, Tensor) else rows
    return bytes(array.tobytes())
