"""Diagnostics: checks of the likelihood, samples, inverse and gradients of a flow."""

from cnf.diagnostics.certify import certify
from cnf.diagnostics.gradients import GradientCheck, GradientReport, check_gradients
from cnf.diagnostics.report import Check, LikelihoodReport

__all__ = [
    "Check",
    "GradientCheck",
    "GradientReport",
    "LikelihoodReport",
    "certify",
    "check_gradients",
]
