"""Objectives whose numbers are no likelihoods of the data."""

from cnf.objectives.surrogates.extended_autoencoder import ExtendedAutoencoder
from cnf.objectives.surrogates.prescribed_conditional import PrescribedConditional

__all__ = ["ExtendedAutoencoder", "PrescribedConditional"]
