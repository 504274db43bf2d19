"""Saving a flow to one file, and building it again from that file alone.

The file is safetensors: the tensors, and in its metadata a JSON description of the parts and
settings. It holds data, never code: only classes of this package are built from it.
"""

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from cnf._files import write_atomically
from cnf.baselines import NamedMixture, NamedTransform
from cnf.bases import StandardNormal
from cnf.cnf import CNF
from cnf.divergence import Exact, Hutchinson
from cnf.flow import Flow
from cnf.ode import ODESolver
from cnf.transforms import (
    ActNorm,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    Augment,
    ConditionalAffine,
    ContinuousTransform,
    Conv1x1,
    ConvConditioner,
    Dequantize,
    EmergingConv,
    ExactLipschitz,
    ExactLogDet,
    FactorOut,
    Flatten,
    LipschitzAttention,
    LipschitzConv,
    LipschitzMLP,
    Logit,
    MLPConditioner,
    PeriodicConv,
    Permute,
    Planar,
    Radial,
    ResidualFlow,
    RussianRoulette,
    Squeeze,
    Standardize,
    TruncatedSeries,
    Unconstrain,
    WoodburyConv,
)
from cnf.vector_fields import ConvField, LinearField, MLPField, PotentialField, ResidualField

FORMAT_VERSION = 1

_REMEDY = "Restore it from a copy, or save the flow again."

_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(CNF, Flow, StandardNormal),
        *(NamedMixture, NamedTransform),
        *(ActNorm, Affine, Augment, ContinuousTransform, Dequantize, FactorOut, Flatten),
        *(Logit, Permute, Squeeze, Standardize, Unconstrain),
        *(AdditiveCoupling, AffineCoupling, ConditionalAffine, Conv1x1),
        *(ConvConditioner, MLPConditioner),
        *(EmergingConv, ExactLipschitz, PeriodicConv, Planar, Radial, WoodburyConv),
        *(ConvField, LinearField, MLPField, PotentialField, ResidualField),
        *(ResidualFlow, LipschitzAttention, LipschitzConv, LipschitzMLP),
        *(ExactLogDet, RussianRoulette, TruncatedSeries),
        *(Exact, Hutchinson, ODESolver),
    )
}


def save(flow: Flow, path: str | os.PathLike[str]) -> None:
    """Write a flow to `path`, atomically: the file is complete or as it was before.

    Values are kept, not which of them are frozen: each parameter of a loaded flow is trainable.

    Args:
        flow: A flow made of parts of this package.
        path: Where to; the folder must exist. The custom is the suffix ``.safetensors``.

    Raises:
        TypeError: If `flow` is not a flow, or has a part that this package did not define. Save
            the ``state_dict()`` of such a flow instead, and rebuild it in your own code.
        ValueError: If parts of the flow share tensors, which the file could not keep shared, or
            have more than one dtype.
        OSError: If the file cannot be written.

    Example:
        >>> flow = CNF(2)
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> save(flow, f"{folder}/flow.safetensors")
        >>> load(f"{folder}/flow.safetensors").features
        2
    """
    if not isinstance(flow, Flow):
        raise TypeError(
            f"flow must be a cnf.Flow; got {type(flow).__name__}. "
            "Save the state_dict() of any other module with torch.save."
        )
    description = {"format": FORMAT_VERSION, "flow": _describe(flow)}
    _refuse_what_a_file_cannot_keep(flow)
    tensors = {name: value.detach().contiguous() for name, value in flow.state_dict().items()}
    write_atomically(path, to_safetensors(tensors, metadata={"cnf": json.dumps(description)}))


@torch.inference_mode(False)  # whose tensors could not be trained
def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Flow:
    """Read a flow that `save` wrote.

    Args:
        path: The file.
        device: Where the flow shall be.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, was not written by `save`, or by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r} to load a flow from. Check the path, or save a flow."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is not a safetensors file, or is cut short ({error}). {_REMEDY}"
        ) from error
    if "cnf" not in metadata:
        raise ValueError(
            f"{str(path)!r} was not written by cnf.save; it describes no flow. Build the flow in "
            "your own code, and give it these tensors by load_state_dict."
        )
    return _build(_read_description(path, metadata["cnf"]), tensors, path).to(device)


def _read_description(path: Path, text: str) -> Any:
    try:
        description = json.loads(text)
        version, newer = description["format"], description["format"] > FORMAT_VERSION
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} holds a garbled description of a flow ({error!r}). {_REMEDY}"
        ) from error
    if newer:
        raise ValueError(
            f"{str(path)!r} has format {version}, newer than the {FORMAT_VERSION} that this "
            "version of cnf reads. Upgrade cnf-flows."
        )
    return description.get("flow")


def _build(description: Any, tensors: dict[str, torch.Tensor], path: Path) -> Flow:
    try:
        with torch.random.fork_rng(devices=[]):  # the initial weights are not kept
            flow = _rebuild(description)
        if not isinstance(flow, Flow):
            raise TypeError(f"its description is of a {type(flow).__name__}")
        for value in tensors.values():
            if value.is_floating_point():
                flow.to(value.dtype)
        _refuse_other_dtypes(flow.state_dict(), tensors)
        flow.load_state_dict(tensors)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{str(path)!r} does not describe a flow of this version of cnf "
            f"({str(error).rstrip('.')}). Load it with the version that saved it. {_REMEDY}"
        ) from error
    return flow


def _refuse_other_dtypes(
    expected: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> None:
    """Refuse what `load_state_dict` would convert, such as integers for weights."""
    for name, value in tensors.items():
        if name in expected and value.dtype != expected[name].dtype:
            raise TypeError(f"its tensor {name!r} is {value.dtype}, not {expected[name].dtype}")


def _refuse_what_a_file_cannot_keep(flow: Flow) -> None:
    tensors = flow.state_dict(keep_vars=True)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(
            f"flow must have one dtype; got {sorted(map(str, dtypes))}. "
            "Convert it with flow.to(torch.float32) or another."
        )
    if len({id(tensor) for tensor in tensors.values()}) < len(tensors):
        raise ValueError(
            "flow must not share tensors between its parts; a file cannot keep them shared. "
            "Save flow.state_dict() instead, and rebuild the flow in your own code."
        )


def _describe(value: Any) -> Any:
    """JSON for a setting or part: a part is its class and its constructor's arguments."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | nn.ModuleList):
        return [_describe(item) for item in value]
    name = type(value).__name__
    if _CLASSES.get(name) is not type(value):
        raise TypeError(
            f"only parts of cnf can be saved with their settings; got {type(value).__qualname__}. "
            "Save flow.state_dict() instead, and rebuild the flow in your own code."
        )
    return {
        "class": name,
        **{key: _describe(getattr(value, key)) for key in _settings(type(value))},
    }


def _rebuild(description: Any) -> Any:
    if isinstance(description, list):
        return [_rebuild(item) for item in description]
    if not isinstance(description, dict):
        return description
    if description["class"] not in _CLASSES:
        raise ValueError(f"it names the class {description['class']!r}")
    cls = _CLASSES[description["class"]]
    settings = {key: _rebuild(value) for key, value in description.items() if key != "class"}
    if issubclass(cls, Flow):
        return cls._with_parts(settings["transforms"], settings["base"])
    return cls(**settings)


def _settings(cls: type) -> list[str]:
    """Names of the settings that a part is rebuilt from, each also an attribute."""
    if issubclass(cls, Flow):
        return ["transforms", "base"]
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(inspect.signature(cls).parameters)
