"""Data that are not all of the real numbers: bounds, whole numbers, and the maps off them."""

from cnf.transforms.support.dequantize import Dequantize, Logit
from cnf.transforms.support.unconstrain import Unconstrain, transforms_for

__all__ = ["Dequantize", "Logit", "Unconstrain", "transforms_for"]
