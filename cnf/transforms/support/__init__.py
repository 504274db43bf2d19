"""Transforms of bounded, periodic and discrete data to the real numbers."""

from cnf.transforms.support.dequantize import Dequantize, Logit
from cnf.transforms.support.unconstrain import Unconstrain, transforms_for

__all__ = ["Dequantize", "Logit", "Unconstrain", "transforms_for"]
