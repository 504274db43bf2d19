"""Transforms between data and base."""

from cnf.transforms.actnorm import ActNorm
from cnf.transforms.attention import LipschitzAttention
from cnf.transforms.augment import Augment
from cnf.transforms.base import Likelihood, Transform
from cnf.transforms.continuous import ContinuousTransform
from cnf.transforms.contractive import ContractiveNetwork, LipschitzConv, LipschitzMLP
from cnf.transforms.dequantize import Dequantize, Logit
from cnf.transforms.elementwise import Affine, Standardize
from cnf.transforms.factor_out import FactorOut
from cnf.transforms.log_det import ExactLogDet, RussianRoulette, TruncatedSeries
from cnf.transforms.reshape import Flatten, Permute, Squeeze
from cnf.transforms.residual_flow import ResidualFlow
from cnf.transforms.unconstrain import Unconstrain, transforms_for

__all__ = [
    "ActNorm",
    "Affine",
    "Augment",
    "ContinuousTransform",
    "ContractiveNetwork",
    "Dequantize",
    "ExactLogDet",
    "FactorOut",
    "Flatten",
    "Likelihood",
    "LipschitzAttention",
    "LipschitzConv",
    "LipschitzMLP",
    "Logit",
    "Permute",
    "ResidualFlow",
    "RussianRoulette",
    "Squeeze",
    "Standardize",
    "Transform",
    "TruncatedSeries",
    "Unconstrain",
    "transforms_for",
]
