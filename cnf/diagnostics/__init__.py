"""Diagnostics: checks of the likelihood, samples, inverse and gradients of a flow, and of data."""

from cnf.diagnostics.certify import certify
from cnf.diagnostics.gradients import GradientCheck, GradientReport, check_gradients
from cnf.diagnostics.report import Check, LikelihoodReport
from cnf.diagnostics.typicality import TypicalityTest

__all__ = [
    "Check",
    "GradientCheck",
    "GradientReport",
    "LikelihoodReport",
    "TypicalityTest",
    "certify",
    "check_gradients",
]
