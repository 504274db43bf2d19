"""Data as tensors; knows nothing of models."""
