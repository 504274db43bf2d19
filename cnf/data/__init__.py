"""Data as tensors; knows nothing of models."""

from cnf.data.npy import NpyRows

__all__ = ["NpyRows"]
