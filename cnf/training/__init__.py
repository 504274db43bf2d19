"""Training, on Lightning Fabric."""

from cnf.training.checkpoint import Checkpoints
from cnf.training.config import TrainingConfig
from cnf.training.fit import fit
from cnf.training.history import Callback, History, StepReport
from cnf.training.phases import Recipe, recipe
from cnf.training.run import TrainingError

__all__ = [
    "Callback",
    "Checkpoints",
    "History",
    "Recipe",
    "StepReport",
    "TrainingConfig",
    "TrainingError",
    "fit",
    "recipe",
]
