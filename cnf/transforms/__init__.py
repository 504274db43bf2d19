"""Transforms between data and base."""

from cnf.transforms.base import Likelihood, Transform
from cnf.transforms.continuous import ContinuousTransform
from cnf.transforms.elementwise import Affine, Standardize

__all__ = ["Affine", "ContinuousTransform", "Likelihood", "Standardize", "Transform"]
