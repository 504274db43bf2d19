"""Files as older versions wrote them."""

import json

from safetensors import safe_open
from safetensors.torch import save_file


def without_digest(path, change=lambda tensors: tensors, flow=None):
    """The file as a version wrote it that knew no digest."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["cnf"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del description["sha256"]
    if flow is not None:
        description["flow"] = flow
    save_file(change(tensors), path, metadata={"cnf": json.dumps(description)})
