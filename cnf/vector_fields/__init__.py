"""Vector fields v(t, x | context)."""

from cnf.vector_fields.base import VectorField, count_evaluations
from cnf.vector_fields.conditioning import ContextScaling
from cnf.vector_fields.conv import ConvField
from cnf.vector_fields.linear import LinearField
from cnf.vector_fields.mlp import MLPField
from cnf.vector_fields.module import ModuleField
from cnf.vector_fields.potential import PotentialField
from cnf.vector_fields.residual import ResidualField
from cnf.vector_fields.tangent import TangentField

__all__ = [
    "ContextScaling",
    "ConvField",
    "LinearField",
    "MLPField",
    "ModuleField",
    "PotentialField",
    "ResidualField",
    "TangentField",
    "VectorField",
    "count_evaluations",
]
