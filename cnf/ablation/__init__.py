"""Ablation of penalties: what each buys in evaluations, and costs in nats, on a user's rows."""

from cnf.ablation.outcome import Outcome, Run
from cnf.ablation.penalties import PENALTIES, find_penalty
from cnf.ablation.report import markdown, tradeoffs
from cnf.ablation.settings import AblationSettings
from cnf.ablation.study import ablate

__all__ = [
    "PENALTIES",
    "AblationSettings",
    "Outcome",
    "Run",
    "ablate",
    "find_penalty",
    "markdown",
    "tradeoffs",
]
