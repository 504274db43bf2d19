"""Transforms between data and base."""

from cnf.transforms.actnorm import ActNorm
from cnf.transforms.adapters import FromNflows, FromNormflows, FromTorch, FromZuko
from cnf.transforms.augment import Augment
from cnf.transforms.base import Likelihood, Transform
from cnf.transforms.continuous import ContinuousTransform
from cnf.transforms.dequantize import Dequantize, Logit
from cnf.transforms.elementwise import Affine, Standardize
from cnf.transforms.factor_out import FactorOut
from cnf.transforms.reshape import Flatten, Permute, Squeeze
from cnf.transforms.unconstrain import Unconstrain, transforms_for

__all__ = [
    "ActNorm",
    "Affine",
    "Augment",
    "ContinuousTransform",
    "Dequantize",
    "FactorOut",
    "Flatten",
    "FromNflows",
    "FromNormflows",
    "FromTorch",
    "FromZuko",
    "Likelihood",
    "Logit",
    "Permute",
    "Squeeze",
    "Standardize",
    "Transform",
    "Unconstrain",
    "transforms_for",
]
