"""Stochastic transforms: drawn in both directions."""
