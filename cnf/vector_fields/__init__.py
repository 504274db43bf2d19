"""Vector fields v(t, x | context)."""

from cnf.vector_fields.base import ModuleField, VectorField, count_evaluations
from cnf.vector_fields.linear import LinearField
from cnf.vector_fields.mlp import MLPField
from cnf.vector_fields.potential import PotentialField

__all__ = [
    "LinearField",
    "MLPField",
    "ModuleField",
    "PotentialField",
    "VectorField",
    "count_evaluations",
]
