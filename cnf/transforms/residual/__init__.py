"""Residual flows: contractive networks, and estimates of the log-determinant of x + g(x)."""

from cnf.transforms.residual.attention import LipschitzAttention
from cnf.transforms.residual.contractions import ContractiveNetwork, LipschitzConv, LipschitzMLP
from cnf.transforms.residual.log_det import ExactLogDet, RussianRoulette, TruncatedSeries
from cnf.transforms.residual.residual_flow import ResidualFlow

__all__ = [
    "ContractiveNetwork",
    "ExactLogDet",
    "LipschitzAttention",
    "LipschitzConv",
    "LipschitzMLP",
    "ResidualFlow",
    "RussianRoulette",
    "TruncatedSeries",
]
