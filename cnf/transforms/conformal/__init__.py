"""Conformal maps, and surfaces embedded by them."""

from cnf.transforms.conformal.embedding import ConformalEmbedding
from cnf.transforms.conformal.maps import PiecewiseConformal, Similarity, SpecialConformal

__all__ = ["ConformalEmbedding", "PiecewiseConformal", "Similarity", "SpecialConformal"]
