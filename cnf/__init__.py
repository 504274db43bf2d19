"""Continuous normalizing flows in PyTorch: a density model whose transform follows an ODE.

From the top: `fit` (`cnf.training`) minimises an objective (`cnf.objectives`) of a `Flow`, such as
a `CNF` (`cnf.flows`). A flow is a base (`cnf.bases`) and a chain of transforms (`cnf.transforms`).
`cnf.transforms.ContinuousTransform` follows a vector field (`cnf.vector_fields`) with its
divergence (`cnf.divergence`) through an `ODESolver` (`cnf.ode`). `save` and `load` (`cnf.saving`)
keep a flow in one file, and `certify` (`cnf.diagnostics`) tells how far its numbers can be trusted.
Beside them stand flows of other libraries (`cnf.adapters`), named discrete flows
(`cnf.baselines`), tables (`cnf.tables`), toy densities with the truth (`cnf.data`), metrics
(`cnf.metrics`) and plots (`cnf.plots`).
"""

from cnf.diagnostics import certify
from cnf.divergence import Exact, Hutchinson
from cnf.flows import CNF, Flow, NeuralODE
from cnf.objectives import FlowMatching, MaximumLikelihood, ReverseKL
from cnf.ode import ODEError, ODESolver
from cnf.saving import load, save
from cnf.training import Checkpoints, History, TrainingConfig, TrainingError, fit, recipe
from cnf.transforms import Standardize
from cnf.vector_fields import MLPField, ModuleField, VectorField, count_evaluations

__all__ = [
    "CNF",
    "Checkpoints",
    "Exact",
    "Flow",
    "FlowMatching",
    "History",
    "Hutchinson",
    "MLPField",
    "MaximumLikelihood",
    "ModuleField",
    "NeuralODE",
    "ODEError",
    "ODESolver",
    "ReverseKL",
    "Standardize",
    "TrainingConfig",
    "TrainingError",
    "VectorField",
    "certify",
    "count_evaluations",
    "fit",
    "load",
    "recipe",
    "save",
]
