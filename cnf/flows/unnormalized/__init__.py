"""Densities without a known integral: targets of a user, importance weights, energies."""
