"""Base distributions of flows, at t = 0."""

from cnf.bases.base import Base, Likelihood, weakest
from cnf.bases.gaussian_mixture import GaussianMixtureBase
from cnf.bases.standard_normal import StandardNormal
from cnf.bases.uniform import ProductBase, UniformOnManifold, base_on
from cnf.bases.von_mises_fisher import VonMisesFisherMixture

__all__ = [
    "Base",
    "GaussianMixtureBase",
    "Likelihood",
    "ProductBase",
    "StandardNormal",
    "UniformOnManifold",
    "VonMisesFisherMixture",
    "base_on",
    "weakest",
]
