"""Transforms between data and base."""

from cnf.transforms.actnorm import ActNorm
from cnf.transforms.augment import Augment
from cnf.transforms.base import Likelihood, Transform
from cnf.transforms.conditioners import ConvConditioner, MLPConditioner
from cnf.transforms.continuous import ContinuousTransform
from cnf.transforms.convolutions import EmergingConv, PeriodicConv
from cnf.transforms.coupling import AdditiveCoupling, AffineCoupling, Coupling
from cnf.transforms.dequantize import Dequantize, Logit
from cnf.transforms.elementwise import Affine, ConditionalAffine, Standardize
from cnf.transforms.factor_out import FactorOut
from cnf.transforms.glow import glow
from cnf.transforms.lipschitz import ExactLipschitz
from cnf.transforms.mixing import Conv1x1
from cnf.transforms.planar import Planar, Radial
from cnf.transforms.reshape import Flatten, Permute, Squeeze
from cnf.transforms.unconstrain import Unconstrain, transforms_for
from cnf.transforms.woodbury import WoodburyConv

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Augment",
    "ConditionalAffine",
    "ContinuousTransform",
    "Conv1x1",
    "ConvConditioner",
    "Coupling",
    "Dequantize",
    "EmergingConv",
    "ExactLipschitz",
    "FactorOut",
    "Flatten",
    "Likelihood",
    "Logit",
    "MLPConditioner",
    "PeriodicConv",
    "Permute",
    "Planar",
    "Radial",
    "Squeeze",
    "Standardize",
    "Transform",
    "Unconstrain",
    "WoodburyConv",
    "glow",
    "transforms_for",
]
