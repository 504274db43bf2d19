"""Transforms between data and base."""

from cnf.bases import Likelihood
from cnf.transforms.autoencoder import AutoencoderCoupling
from cnf.transforms.base import Transform
from cnf.transforms.chain import Chain
from cnf.transforms.conditioners import ConvConditioner, MLPConditioner
from cnf.transforms.conformal.embedding import ConformalEmbedding
from cnf.transforms.conformal.maps import PiecewiseConformal, Similarity, SpecialConformal
from cnf.transforms.continuous import ContinuousTransform
from cnf.transforms.coupling import AdditiveCoupling, AffineCoupling, Coupling
from cnf.transforms.elementwise import Affine, ConditionalAffine, LeakyReLU
from cnf.transforms.exact_lipschitz import ExactLipschitz
from cnf.transforms.factor_out import FactorOut, rank_by_contributions
from cnf.transforms.from_data import ActNorm, NormalScores, Standardize, Whiten
from cnf.transforms.inverse import Inverse
from cnf.transforms.linear.conv1x1 import Conv1x1
from cnf.transforms.linear.convolutions import EmergingConv, PeriodicConv
from cnf.transforms.linear.orthogonal import Orthogonal
from cnf.transforms.linear.woodbury import WoodburyConv
from cnf.transforms.planar import Planar, Radial
from cnf.transforms.reshape import Flatten, Permute, Squeeze
from cnf.transforms.residual.attention import LipschitzAttention
from cnf.transforms.residual.contractions import ContractiveNetwork, LipschitzConv, LipschitzMLP
from cnf.transforms.residual.log_det import ExactLogDet, RussianRoulette, TruncatedSeries
from cnf.transforms.residual.residual_flow import ResidualFlow
from cnf.transforms.stochastic.densities import AnnealedDensity
from cnf.transforms.stochastic.diffusion import Diffusion
from cnf.transforms.stochastic.kernels import MarkovKernel, MetropolisHastings
from cnf.transforms.stochastic.langevin import AdjustedLangevin, HamiltonianMonteCarlo, Langevin
from cnf.transforms.stochastic.permutation import StochasticPermutation
from cnf.transforms.stochastic.vae import VAE
from cnf.transforms.support.dequantize import Dequantize, Logit
from cnf.transforms.support.unconstrain import Unconstrain, transforms_for
from cnf.transforms.surjections.absolute import Abs
from cnf.transforms.surjections.augment import Augment
from cnf.transforms.surjections.flowification import FlowifiedConv2d, FlowifiedLinear, flowify
from cnf.transforms.surjections.funnels import ConvFunnel, MLPFunnel
from cnf.transforms.surjections.maximum import Maximum, MaxPool2d
from cnf.transforms.surjections.round import Round
from cnf.transforms.surjections.slice import Slice
from cnf.transforms.surjections.sort import LogGaps, Sort
from cnf.transforms.surjections.transformed_base import TransformedBase
from cnf.transforms.surjections.unfold import Unfold

__all__ = [
    "VAE",
    "Abs",
    "ActNorm",
    "AdditiveCoupling",
    "AdjustedLangevin",
    "Affine",
    "AffineCoupling",
    "AnnealedDensity",
    "Augment",
    "AutoencoderCoupling",
    "Chain",
    "ConditionalAffine",
    "ConformalEmbedding",
    "ContinuousTransform",
    "ContractiveNetwork",
    "Conv1x1",
    "ConvConditioner",
    "ConvFunnel",
    "Coupling",
    "Dequantize",
    "Diffusion",
    "EmergingConv",
    "ExactLipschitz",
    "ExactLogDet",
    "FactorOut",
    "Flatten",
    "FlowifiedConv2d",
    "FlowifiedLinear",
    "HamiltonianMonteCarlo",
    "Inverse",
    "Langevin",
    "LeakyReLU",
    "Likelihood",
    "LipschitzAttention",
    "LipschitzConv",
    "LipschitzMLP",
    "LogGaps",
    "Logit",
    "MLPConditioner",
    "MLPFunnel",
    "MarkovKernel",
    "MaxPool2d",
    "Maximum",
    "MetropolisHastings",
    "NormalScores",
    "Orthogonal",
    "PeriodicConv",
    "Permute",
    "PiecewiseConformal",
    "Planar",
    "Radial",
    "ResidualFlow",
    "Round",
    "RussianRoulette",
    "Similarity",
    "Slice",
    "Sort",
    "SpecialConformal",
    "Squeeze",
    "Standardize",
    "StochasticPermutation",
    "Transform",
    "TransformedBase",
    "TruncatedSeries",
    "Unconstrain",
    "Unfold",
    "Whiten",
    "WoodburyConv",
    "flowify",
    "rank_by_contributions",
    "transforms_for",
]
