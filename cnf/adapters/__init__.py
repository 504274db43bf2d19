"""Adapters: flows of zuko, nflows, normflows, Pyro and torch as flows of cnf, and the reverse."""

from cnf.adapters.bases import NormflowsBase, TorchBase
from cnf.adapters.from_libraries import from_nflows, from_normflows, from_torch, from_zuko
from cnf.adapters.to_libraries import to_nflows_transform, to_normflows_flow, to_pyro, to_zuko
from cnf.adapters.transforms import FromNflows, FromNormflows, FromTorch, FromZuko

__all__ = [
    "FromNflows",
    "FromNormflows",
    "FromTorch",
    "FromZuko",
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
