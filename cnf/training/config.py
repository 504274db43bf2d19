"""Settings of a phase of training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cnf._checks import check_choice, check_count, check_flag, check_number, check_seed, is_positive
from cnf.flows.flow import Flow
from cnf.objectives import MaximumLikelihood, Objective

_SCHEDULES = ("cosine", "constant")
_PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a phase of training.

    Raises:
        TypeError: If a count is not an int, or `objective` or `optimizer` not callable.
        ValueError: If a setting is out of range, or `optimizer` and `weight_decay` are both given.

    Example:
        >>> TrainingConfig(steps=100).batch_size
        512
    """

    objective: Callable[[Flow], Objective] = MaximumLikelihood
    """Objective, if `fit` is given a flow: a class of `cnf.objectives`, perhaps with settings, such
    as ``functools.partial(MaximumLikelihood, random_end_time=0.1)``."""
    steps: int = 2000
    """Number of minibatches."""
    batch_size: int = 512
    """Rows of a minibatch, over all processes; all rows if there are fewer."""
    learning_rate: float = 4e-3
    """Peak learning rate, the `lr` of the optimiser."""
    optimizer: Callable[..., Optimizer] | None = None
    """Optimiser: a class of `torch.optim`, or a function that makes a new optimiser from the list
    of all parameters, perhaps in groups, and the keyword `lr`. None for Adam, or for AdamW with
    `weight_decay`."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the default optimiser: each step multiplies the weights by
    ``1 - learning_rate * weight_decay``."""
    schedule: Literal["cosine", "constant"] | Callable[[Optimizer], LRScheduler] = "cosine"
    """Learning rate after a linear warm-up over the first 2 % of the steps: "cosine" decays to
    zero as a half cosine, "constant" does not decay. Or a function of the optimiser, without
    warm-up, that makes a scheduler of `torch.optim.lr_scheduler`, which takes each step too."""
    max_seconds: float | None = None
    """Time budget of the phase in seconds, validations included: the step that passes it is the
    last one. "cosine" follows the larger of the fractions of steps taken and time spent. None for
    no budget."""
    gradient_clip: float | None = 10.0
    """Largest norm of the gradient; None for no limit."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is validated and kept; None for
    no average."""
    validate_every: int = 200
    """Steps between validations, if there are validation data; the last step is validated too."""
    patience: int | None = None
    """Validations without a new best before early stopping; None to take all steps."""
    accumulation_steps: int = 1
    """Number of parts of the minibatch of each process whose gradients are accumulated: less
    memory, and the same step up to rounding and random numbers."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's matrix products in training. With "bfloat16", the ODE state and
    the log-density stay in the dtype of the flow, which must be float32."""
    seed: int = 0
    """Seed of the order of the rows and of the random numbers of the objective."""
    progress: bool = True
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        if not callable(self.objective):
            raise TypeError(
                "objective must be callable and make an objective of a flow, such as "
                f"MaximumLikelihood; got {self.objective!r}."
            )
        for name in ("steps", "batch_size", "validate_every", "accumulation_steps", "patience"):
            if name != "patience" or self.patience is not None:
                self._keep(name, check_count(name, getattr(self, name)))
        self._keep("seed", check_seed("seed", self.seed))
        rate = check_number("learning_rate", self.learning_rate, "positive and finite", is_positive)
        self._keep("learning_rate", rate)
        self._check_optimizer()
        if not callable(self.schedule):
            check_choice("schedule", self.schedule, _SCHEDULES)
        if self.max_seconds is not None:
            expected = "positive and finite, or None"
            self._keep(
                "max_seconds", check_number("max_seconds", self.max_seconds, expected, is_positive)
            )
        check_choice("precision", self.precision, _PRECISIONS)
        if self.gradient_clip is not None:
            clip = self.gradient_clip
            clip = check_number("gradient_clip", clip, "positive or None", lambda norm: norm > 0)
            self._keep("gradient_clip", clip)
        if self.ema is not None:
            expected = "between 0 and 1, or None"
            self._keep("ema", check_number("ema", self.ema, expected, lambda part: 0 < part < 1))
        check_flag("progress", self.progress)

    def _check_optimizer(self) -> None:
        if self.optimizer is not None and not callable(self.optimizer):
            raise TypeError(
                "optimizer must be callable and make an optimizer of parameters and lr, such as "
                f"torch.optim.AdamW; got {type(self.optimizer).__name__}."
            )
        expected = "at least 0 and finite"
        decay = check_number(
            "weight_decay", self.weight_decay, expected, lambda decay: 0 <= decay < math.inf
        )
        if decay and self.optimizer is not None:
            raise ValueError(
                f"weight_decay must be 0 with an optimizer of your own; got {decay}. Give it to "
                f"the optimizer: functools.partial(torch.optim.AdamW, weight_decay={decay})."
            )
        self._keep("weight_decay", decay)

    def _keep(self, name: str, value: int | float) -> None:
        """Store a setting as a Python number, as the fingerprint of a run compares it."""
        object.__setattr__(self, name, value)
