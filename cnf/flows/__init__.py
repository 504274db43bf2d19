"""Density models: a base distribution and a chain of transforms."""

from cnf.flows.as_torch.distribution import FlowDistribution
from cnf.flows.chunks import log_prob_in_chunks, sample_in_chunks
from cnf.flows.cnf import CNF
from cnf.flows.flow import Flow
from cnf.flows.mixture_of_flows import MixtureOfFlows
from cnf.flows.neural_ode import NeuralODE
from cnf.flows.pseudo_invertible import PseudoInvertibleEncoder
from cnf.flows.unnormalized.energy import EnergyModel
from cnf.flows.unnormalized.importance import LogNormalizer, log_normalizer

__all__ = [
    "CNF",
    "EnergyModel",
    "Flow",
    "FlowDistribution",
    "LogNormalizer",
    "MixtureOfFlows",
    "NeuralODE",
    "PseudoInvertibleEncoder",
    "log_normalizer",
    "log_prob_in_chunks",
    "sample_in_chunks",
]
