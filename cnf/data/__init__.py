"""Data as tensors; knows nothing of models."""

from cnf.data.memmap import NpyRows

__all__ = ["NpyRows"]
