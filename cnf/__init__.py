"""Continuous normalizing flows in PyTorch."""

from cnf.divergence import Exact, Hutchinson
from cnf.flow import CNF, Flow
from cnf.ode import ODEError, ODESolver
from cnf.transforms import Affine, ContinuousTransform, Standardize
from cnf.vector_fields import LinearField, MLPField, ModuleField, VectorField, count_evaluations

__all__ = [
    "CNF",
    "Affine",
    "ContinuousTransform",
    "Exact",
    "Flow",
    "Hutchinson",
    "LinearField",
    "MLPField",
    "ModuleField",
    "ODEError",
    "ODESolver",
    "Standardize",
    "VectorField",
    "count_evaluations",
]
