"""Transforms between data and base."""

from cnf.transforms.actnorm import ActNorm
from cnf.transforms.adapters import FromNflows, FromNormflows, FromTorch, FromZuko
from cnf.transforms.attention import LipschitzAttention
from cnf.transforms.augment import Augment
from cnf.transforms.base import Likelihood, Transform
from cnf.transforms.chain import Chain
from cnf.transforms.conditioners import ConvConditioner, MLPConditioner
from cnf.transforms.continuous import ContinuousTransform
from cnf.transforms.contractive import ContractiveNetwork, LipschitzConv, LipschitzMLP
from cnf.transforms.convolutions import EmergingConv, PeriodicConv
from cnf.transforms.coupling import AdditiveCoupling, AffineCoupling, Coupling
from cnf.transforms.dequantize import Dequantize, Logit
from cnf.transforms.elementwise import Affine, ConditionalAffine, Standardize
from cnf.transforms.factor_out import FactorOut
from cnf.transforms.glow import glow
from cnf.transforms.lipschitz import ExactLipschitz
from cnf.transforms.log_det import ExactLogDet, RussianRoulette, TruncatedSeries
from cnf.transforms.mixing import Conv1x1
from cnf.transforms.planar import Planar, Radial
from cnf.transforms.reshape import Flatten, Permute, Squeeze
from cnf.transforms.residual_flow import ResidualFlow
from cnf.transforms.unconstrain import Unconstrain, transforms_for
from cnf.transforms.woodbury import WoodburyConv

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Augment",
    "Chain",
    "ConditionalAffine",
    "ContinuousTransform",
    "ContractiveNetwork",
    "Conv1x1",
    "ConvConditioner",
    "Coupling",
    "Dequantize",
    "EmergingConv",
    "ExactLipschitz",
    "ExactLogDet",
    "FactorOut",
    "Flatten",
    "FromNflows",
    "FromNormflows",
    "FromTorch",
    "FromZuko",
    "Likelihood",
    "LipschitzAttention",
    "LipschitzConv",
    "LipschitzMLP",
    "Logit",
    "MLPConditioner",
    "PeriodicConv",
    "Permute",
    "Planar",
    "Radial",
    "ResidualFlow",
    "RussianRoulette",
    "Squeeze",
    "Standardize",
    "Transform",
    "TruncatedSeries",
    "Unconstrain",
    "WoodburyConv",
    "glow",
    "transforms_for",
]
