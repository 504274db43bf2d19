"""Transforms that draw in both directions: Markov kernels."""
