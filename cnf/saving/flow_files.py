"""Saving of a flow to one file, and loading from that file alone.

The file is safetensors: the tensors, and in its metadata a JSON description of the parts and
settings, with a digest of the whole file. It holds data, never code: loading builds classes of this
package, and classes that the caller passes, only.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from cnf._building import Building
from cnf._files import BLANK_DIGEST, as_path, check_path, is_intact, seal, write_atomically
from cnf._warnings import warn
from cnf.flows.flow import Flow
from cnf.saving.description import MissingClassError, by_name, describe, rebuild

FORMAT_VERSION = 1

_REMEDY = "Restore it from a copy, or save the flow again."

_LEAST_BYTES, _BYTES_PER_BYTE = 2**26, 16
_LEAST_CALLS, _CALLS_PER_TENSOR = 20_000, 100
"""Limits of memory and operations of building a flow, by the bytes and tensors of the file.
Building takes up to 3 bytes for a byte, and 8 operations for a tensor."""


def save(flow: Flow, path: str | os.PathLike[str]) -> None:
    """Write a flow to a file, atomically.

    All parameters of a loaded flow are trainable, also frozen ones.

    A part of your own, a subclass of `VectorField`, `Transform`, `Base` or `Divergence` or a
    network in a `ModuleField`, is stored by its class's name and its constructor's arguments. Each
    argument must be an attribute of the same name: a number, a text, another part, or a list of
    these, which `load` returns as Python's numbers and lists.

    Args:
        flow: The flow.
        path: The file; its folder must exist. The usual suffix is ``.safetensors``.

    Raises:
        TypeError: If `flow` is not a flow, or has a part or a setting that the file cannot
            describe; or if `path` is no path. Save the ``state_dict()`` of such a flow instead, and
            rebuild it in your own code.
        ValueError: If parts of the flow share tensors, or have more than one dtype; if a tensor
            holds NaN or inf; or if `path` is a folder.
        OSError: If the file cannot be written.

    Example:
        >>> from cnf import CNF
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
    check_path("path", path)
    description = {"sha256": BLANK_DIGEST, "format": FORMAT_VERSION, "flow": describe(flow)}
    _check_tensors(flow)
    tensors = {
        name: value.detach().resolve_neg().contiguous() for name, value in flow.state_dict().items()
    }
    content = to_safetensors(tensors, metadata={"cnf": json.dumps(description)})
    write_atomically(path, seal(content))


@torch.inference_mode(False)  # its tensors cannot be trained
def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    classes: Iterable[type] = (),
) -> Flow:
    """Read a flow that `save` wrote.

    A digest of all bytes detects damage. The memory that the file asks for is checked against its
    size before it is spent, and torch's random state is not changed.

    Args:
        path: The file.
        device: Device of the flow.
        classes: Your classes that the flow has parts of, as ``classes=[Mine]``. They are found by
            name; classes of cnf are known.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If `path` is no path, `device` no device, or one of `classes` no class of a part.
        ValueError: If the file is damaged, was not written by `save`, or by a newer version; if a
            class is missing; or if there is no such device.

    Warns:
        UserWarning: If an old file has no digest.
    """
    path, device, own = as_path("path", path), _check_device(device), by_name(classes)
    if path.is_dir():
        raise ValueError(
            f"path must be a file; {str(path)!r} is a folder. Name a file in it: "
            "model.safetensors in a folder of cnf fit, best.safetensors in one of Checkpoints."
        )
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
            f"{str(path)!r} is not a safetensors file, or is cut short or damaged ({error}). "
            f"{_REMEDY}"
        ) from error
    if "cnf" not in metadata:
        raise ValueError(
            f"{str(path)!r} was not written by cnf.save; it describes no flow. Build the flow in "
            "your own code, and give it these tensors by load_state_dict."
        )
    description = _read_description(path, metadata["cnf"])
    _refuse_damage(path, description, tensors)
    return _build(description["flow"], tensors, own, path).to(device)


def _check_device(device: Any) -> torch.device:
    """Return the device; refuse a device that is missing or holds no numbers."""
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a torch.device or a str such as 'cpu'; got {device!r}.")
    try:
        found = torch.device(device)
        torch.empty(0, device=found).to("cpu")
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"device must be available and hold numbers, such as 'cpu'; got "
            f"{str(device)!r} ({(str(error) or repr(error)).splitlines()[0]})."
        ) from error
    return found


def _read_description(path: Path, text: str) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads(text)
        version, newer = description["format"], description["format"] > FORMAT_VERSION
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: it holds a garbled description of a flow ({error!r}). "
            f"{_REMEDY}"
        ) from error
    if newer:
        raise ValueError(
            f"{str(path)!r} has format {version}, newer than the {FORMAT_VERSION} that this "
            "version of cnf reads. Upgrade cnf-flows."
        )
    return description


def _refuse_damage(path: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuse a file with damaged bytes, or with NaN or inf.

    All keys must be known, because a damaged "sha256" would look like an old file without digest.
    """
    known = description.keys() - {"sha256"} == {"format", "flow"}
    if not known or ("sha256" in description and not is_intact(path, description["sha256"])):
        raise ValueError(f"{str(path)!r} is damaged: its bytes do not match its digest. {_REMEDY}")
    _refuse_not_finite(f"{str(path)!r} must hold finite numbers", tensors, _REMEDY)
    if "sha256" not in description:
        warn(
            f"{str(path)!r} is from a version of cnf that wrote no digest, so that damage cannot "
            "be detected. Save the flow again: save(load(path), path)."
        )


def _build(
    description: Any, tensors: dict[str, Tensor], classes: dict[str, type], path: Path
) -> Flow:
    size = sum(value.nbytes for value in tensors.values())
    building = Building(
        most_bytes=_LEAST_BYTES + _BYTES_PER_BYTE * size,
        most_calls=_LEAST_CALLS + _CALLS_PER_TENSOR * len(tensors),
    )
    try:
        with torch.device("cpu"), building:
            flow = rebuild(description, classes, building.count_call)
        if not isinstance(flow, Flow):
            raise TypeError(f"its description is of a {type(flow).__name__}")
        for value in tensors.values():
            if value.is_floating_point():
                flow.to(value.dtype)
        expected = flow.state_dict()
        for name, value in tensors.items():  # load_state_dict would convert integers to weights
            if name in expected and value.dtype != expected[name].dtype:
                raise TypeError(f"its tensor {name!r} is {value.dtype}, not {expected[name].dtype}")
        flow.load_state_dict(tensors)
    except MissingClassError as error:
        raise ValueError(f"{str(path)!r} needs a class of your own: {error}.") from error
    except Exception as error:  # constructors may raise anything
        raise ValueError(
            f"{str(path)!r} does not describe a flow of this version of cnf "
            f"({str(error).rstrip('.')}). Load it with the version that saved it. {_REMEDY}"
        ) from error
    return flow


def _refuse_not_finite(what: str, tensors: dict[str, Tensor], remedy: str) -> None:
    bad = [name for name, value in tensors.items() if not value.detach().isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"{what}; got NaN or inf in the tensor {bad[0]!r}{more}. {remedy}")


def _check_tensors(flow: Flow) -> None:
    """Refuse shared tensors, several dtypes, NaN and inf."""
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
    _refuse_not_finite(
        "flow must have finite weights", tensors, "Train it again, with a lower learning_rate."
    )
