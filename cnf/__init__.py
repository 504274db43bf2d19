"""Continuous normalizing flows in PyTorch: a density model whose transform follows an ODE.

From the top: `fit` (`cnf.training`) minimises an objective (`cnf.objectives`) of a `Flow`
(`cnf.flow`), such as a `CNF` (`cnf.cnf`). A flow is a base (`cnf.bases`) and transforms
(`cnf.transforms`), of which `ContinuousTransform` follows a vector field (`cnf.vector_fields`) with
its divergence (`cnf.divergence`) through an `ODESolver` (`cnf.ode`). `NeuralODE` (`cnf.neural_ode`)
follows a field without density. `save` and `load` (`cnf.saving`) keep a flow in one file. Beside
them stand toy densities with the truth (`cnf.data`), metrics (`cnf.metrics`) and plots
(`cnf.plots`).
"""

from cnf.cnf import CNF
from cnf.diagnostics import Check, LikelihoodReport, certify
from cnf.divergence import Exact, Hutchinson
from cnf.flow import Flow
from cnf.neural_ode import NeuralODE
from cnf.objectives import (
    FlowMatching,
    IndependentPairing,
    LinearPath,
    MaximumLikelihood,
    OptimalTransport,
    ReverseKL,
    SmoothedPath,
    VariancePreservingPath,
)
from cnf.ode import ODEError, ODESolver
from cnf.saving import load, save
from cnf.training import Checkpoints, History, TrainingConfig, TrainingError, fit, recipe
from cnf.transforms import (
    ActNorm,
    Affine,
    Augment,
    ContinuousTransform,
    ContractiveNetwork,
    Dequantize,
    ExactLogDet,
    FactorOut,
    Flatten,
    LipschitzAttention,
    LipschitzConv,
    LipschitzMLP,
    Logit,
    Permute,
    ResidualFlow,
    RussianRoulette,
    Squeeze,
    Standardize,
    TruncatedSeries,
    Unconstrain,
    transforms_for,
)
from cnf.vector_fields import (
    ConvField,
    LinearField,
    MLPField,
    ModuleField,
    PotentialField,
    ResidualField,
    VectorField,
    count_evaluations,
)

__all__ = [
    "CNF",
    "ActNorm",
    "Affine",
    "Augment",
    "Check",
    "Checkpoints",
    "ContinuousTransform",
    "ContractiveNetwork",
    "ConvField",
    "Dequantize",
    "Exact",
    "ExactLogDet",
    "FactorOut",
    "Flatten",
    "Flow",
    "FlowMatching",
    "History",
    "Hutchinson",
    "IndependentPairing",
    "LikelihoodReport",
    "LinearField",
    "LinearPath",
    "LipschitzAttention",
    "LipschitzConv",
    "LipschitzMLP",
    "Logit",
    "MLPField",
    "MaximumLikelihood",
    "ModuleField",
    "NeuralODE",
    "ODEError",
    "ODESolver",
    "OptimalTransport",
    "Permute",
    "PotentialField",
    "ResidualField",
    "ResidualFlow",
    "ReverseKL",
    "RussianRoulette",
    "SmoothedPath",
    "Squeeze",
    "Standardize",
    "TrainingConfig",
    "TrainingError",
    "TruncatedSeries",
    "Unconstrain",
    "VariancePreservingPath",
    "VectorField",
    "certify",
    "count_evaluations",
    "fit",
    "load",
    "recipe",
    "save",
    "transforms_for",
]
