"""Training objectives: modules whose ``forward`` returns the loss."""

from cnf.objectives.likelihood import MaximumLikelihood

__all__ = ["MaximumLikelihood"]
