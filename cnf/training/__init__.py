"""Training, on Lightning Fabric."""

from cnf.training.config import TrainingConfig
from cnf.training.history import History
from cnf.training.loop import TrainingError, fit

__all__ = ["History", "TrainingConfig", "TrainingError", "fit"]
