"""Base distributions of flows, at t = 0."""

from cnf.bases.base import Base, Likelihood, weakest
from cnf.bases.conditional_normal import ConditionalNormal
from cnf.bases.gaussian_mixture import GaussianMixtureBase
from cnf.bases.half_normal import HalfNormal
from cnf.bases.low_dimensional_normal import LowDimensionalNormal
from cnf.bases.narrow_normal import NarrowNormal
from cnf.bases.ordered_normal import OrderedNormal
from cnf.bases.standard_normal import StandardNormal
from cnf.bases.uniform import ProductBase, UniformOnManifold, base_on
from cnf.bases.von_mises_fisher import VonMisesFisherMixture

__all__ = [
    "Base",
    "ConditionalNormal",
    "GaussianMixtureBase",
    "HalfNormal",
    "Likelihood",
    "LowDimensionalNormal",
    "NarrowNormal",
    "OrderedNormal",
    "ProductBase",
    "StandardNormal",
    "UniformOnManifold",
    "VonMisesFisherMixture",
    "base_on",
    "weakest",
]
