"""Flows of other libraries as ours, and ours as theirs."""

from cnf.adapters.bases import NormflowsBase, TorchBase
from cnf.adapters.ours import to_nflows_transform, to_normflows_flow, to_pyro, to_zuko
from cnf.adapters.theirs import from_nflows, from_normflows, from_torch, from_zuko

__all__ = [
    "NormflowsBase",
    "TorchBase",
    "from_nflows",
    "from_normflows",
    "from_torch",
    "from_zuko",
    "to_nflows_transform",
    "to_normflows_flow",
    "to_pyro",
    "to_zuko",
]
