"""Continuous normalizing flows in PyTorch: a density model whose transform follows an ODE.

From the top: `fit` (`cnf.training`) minimises an objective (`cnf.objectives`) of a `Flow`
(`cnf.flow`), such as a `CNF` (`cnf.cnf`). A flow is a base (`cnf.bases`) and transforms
(`cnf.transforms`), of which `ContinuousTransform` follows a vector field (`cnf.vector_fields`) with
its divergence (`cnf.divergence`) through an `ODESolver` (`cnf.ode`). `NeuralODE` (`cnf.neural_ode`)
follows a field without density. `save` and `load` (`cnf.saving`) keep a flow in one file. Beside
them stand toy densities with the truth (`cnf.data`), metrics (`cnf.metrics`) and plots
(`cnf.plots`).
"""

from cnf.chunks import log_prob_in_chunks, sample_in_chunks
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
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    Augment,
    ConditionalAffine,
    ContinuousTransform,
    ContractiveNetwork,
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
    glow,
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
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Augment",
    "Check",
    "Checkpoints",
    "ConditionalAffine",
    "ContinuousTransform",
    "ContractiveNetwork",
    "Conv1x1",
    "ConvConditioner",
    "ConvField",
    "Dequantize",
    "EmergingConv",
    "Exact",
    "ExactLipschitz",
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
    "MLPConditioner",
    "MLPField",
    "MaximumLikelihood",
    "ModuleField",
    "NeuralODE",
    "ODEError",
    "ODESolver",
    "OptimalTransport",
    "PeriodicConv",
    "Permute",
    "Planar",
    "PotentialField",
    "Radial",
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
    "WoodburyConv",
    "certify",
    "count_evaluations",
    "fit",
    "glow",
    "load",
    "log_prob_in_chunks",
    "recipe",
    "sample_in_chunks",
    "save",
    "transforms_for",
]
