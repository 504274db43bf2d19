"""How far the numbers of a flow can be trusted: each measured, judged, and with a remedy."""

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
