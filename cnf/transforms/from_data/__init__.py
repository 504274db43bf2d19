"""Transforms that are set from rows of data."""

from cnf.transforms.from_data.actnorm import ActNorm
from cnf.transforms.from_data.normal_scores import NormalScores
from cnf.transforms.from_data.standardize import Standardize
from cnf.transforms.from_data.whiten import Whiten

__all__ = ["ActNorm", "NormalScores", "Standardize", "Whiten"]
