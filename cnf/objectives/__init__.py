"""Training objectives: modules whose ``forward`` returns the loss."""

from cnf.objectives.base import Objective, weighted_mean
from cnf.objectives.bi_lipschitz import BiLipschitz
from cnf.objectives.energy import EnergyObjective
from cnf.objectives.flow_matching import FlowMatching
from cnf.objectives.hybrid import HybridObjective
from cnf.objectives.manifold_likelihood import ManifoldLikelihood
from cnf.objectives.maximum_likelihood import MaximumLikelihood
from cnf.objectives.pairings import IndependentPairing, OptimalTransport, Pairing
from cnf.objectives.paths import (
    GeodesicPath,
    LinearPath,
    ProbabilityPath,
    SmoothedPath,
    VariancePreservingPath,
)
from cnf.objectives.reverse_kl import ReverseKL
from cnf.objectives.surrogates import ExtendedAutoencoder, PrescribedConditional

__all__ = [
    "BiLipschitz",
    "EnergyObjective",
    "ExtendedAutoencoder",
    "FlowMatching",
    "GeodesicPath",
    "HybridObjective",
    "IndependentPairing",
    "LinearPath",
    "ManifoldLikelihood",
    "MaximumLikelihood",
    "Objective",
    "OptimalTransport",
    "Pairing",
    "PrescribedConditional",
    "ProbabilityPath",
    "ReverseKL",
    "SmoothedPath",
    "VariancePreservingPath",
    "weighted_mean",
]
