"""Settings of a training run."""

import math
from dataclasses import dataclass
from typing import Literal

from cnf._checks import check_count

_SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a flow is trained.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a setting is out of range.

    Example:
        >>> TrainingConfig(steps=100).batch_size
        512
    """

    steps: int = 2000
    """Number of minibatches."""
    batch_size: int = 512
    """Rows of a minibatch; all rows if there are fewer."""
    learning_rate: float = 4e-3
    """Peak learning rate of Adam."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the rate does after its rise over the first 2 % of the steps; with "cosine" it falls to
    zero as a half cosine, with "constant" it stays."""
    gradient_clip: float | None = 10.0
    """Largest norm of the gradient; None for no limit."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which then is what is validated and
    kept; None for no average."""
    validate_every: int = 200
    """Steps between validations, if there are validation data; the last step is validated too."""
    seed: int = 0
    """Seed of the order of the rows and of the probes."""
    progress: bool = True
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every"):
            check_count(name, getattr(self, name))
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}.")
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {_SCHEDULES}; got {self.schedule!r}.")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip must be positive or None; got {self.gradient_clip}.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be between 0 and 1, or None; got {self.ema}.")
