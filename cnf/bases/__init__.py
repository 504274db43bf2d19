"""Base distributions of flows, at t = 0."""

from cnf.bases.base import Base, Likelihood, weakest
from cnf.bases.gaussian_mixture import GaussianMixtureBase
from cnf.bases.standard_normal import StandardNormal

__all__ = ["Base", "GaussianMixtureBase", "Likelihood", "StandardNormal", "weakest"]
