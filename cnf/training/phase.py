"""Phase of training: optimiser, steps and state."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnf._checks import NotFiniteError
from cnf.flows.flow import Flow
from cnf.objectives import Objective
from cnf.training.checkpoint import check_form
from cnf.training.config import TrainingConfig
from cnf.training.data import Batch, TrainingData
from cnf.training.distributed import Processes
from cnf.training.optimization import Average, Optimization
from cnf.training.sampling import MinibatchSampler, draws
from cnf.vector_fields import count_evaluations


@dataclass(eq=False)
class Phase:
    """Running phase of training: the optimiser, the averaged weights and the progress."""

    objective: Objective
    flow: Flow
    config: TrainingConfig
    number: int
    rows: TrainingData | None
    processes: Processes
    step: int = 0
    stale_validations: int = 0
    seconds: float = 0.0
    """Time from the beginning to the end of the last step, if there is a time budget."""

    def __post_init__(self) -> None:
        config = self.config
        self.good = copy_of_tensors(self.objective)
        self._parameters = list(self.objective.parameters())
        self._now = list(self.objective.state_dict().values())
        self._started = time.perf_counter()
        self.optimization = Optimization(self.objective, config)
        self.averaged = None if config.ema is None else Average(kept_of(self.objective), config.ema)
        self.sampler = None
        if self.rows is not None:
            self.sampler = MinibatchSampler(
                len(self.rows), config.batch_size, seed=config.seed, phase=self.number
            )

    @property
    def result(self) -> nn.Module:
        """Module to validate and keep: the average if there is one."""
        return kept_of(self.objective) if self.averaged is None else self.averaged.module

    @property
    def is_out_of_patience(self) -> bool:
        """Whether early stopping is due."""
        patience = self.config.patience
        return patience is not None and self.stale_validations >= patience

    @property
    def is_over(self) -> bool:
        """Whether the phase has taken its last step."""
        return self._done >= self.config.steps or self.is_out_of_patience

    @property
    def is_validated(self) -> bool:
        """Whether a validation is due after the last step."""
        return self.step % self.config.validate_every == 0 or self._done >= self.config.steps

    @property
    def _done(self) -> float:
        """Number of steps taken, or the same share of them as of the time budget, if larger."""
        part_of_time = self.seconds / (self.config.max_seconds or math.inf)
        return max(self.step, part_of_time * self.config.steps)

    def advance(self) -> dict[str, Any]:
        """Take one step; its initial weights become `good` if loss and gradient are finite.

        Raises:
            NotFiniteError: If the loss or its gradient is not finite.
            ODEError: If a solve fails.
        """
        done = self._done
        self.step += 1
        self.optimization.optimizer.zero_grad()
        loss, nfe = self.processes.sums(self._gradients)
        self.processes.add_gradients(self._parameters)
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.gradient_clip or math.inf)
        check_finite("norm of the gradient", norm.item())
        torch._foreach_copy_(list(self.good.values()), self._now)
        rate = self.optimization.step(done)
        if self.averaged is not None:
            self.averaged.update()
        if self.config.max_seconds is not None:  # by one clock: all processes stop at the same step
            self.seconds = self.processes.from_first(lambda: time.perf_counter() - self._started)
        return {"loss": loss, "learning_rate": rate, "nfe": int(nfe)}

    def fall_back(self) -> None:
        """Restore the last good weights, and drop the average, which may hold bad ones."""
        self.objective.load_state_dict(self.good)
        self.averaged = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the phase, without the objective."""
        return {
            "step": self.step,
            "stale_validations": self.stale_validations,
            "good": self.good,
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            **self.optimization.state_dict(),
            **({} if self.config.max_seconds is None else {"seconds": self.seconds}),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that `state_dict` cannot have returned."""
        expected = self.state_dict()
        apart = dict.fromkeys(self.optimization.state_dict())
        check_form("its phase", {**state, **apart}, {**expected, **apart})
        if not 0 <= state["step"] <= self.config.steps or state["stale_validations"] < 0:
            raise ValueError(f"its step must be from 0 to {self.config.steps}; got {state['step']}")
        if not 0 <= state.get("seconds", 0.0) < math.inf:
            raise ValueError(f"its seconds must be at least 0 and finite; got {state['seconds']}")
        for name, found, form in self.optimization.parts(state):
            check_form(name, found, form)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.step = state["step"]
        self.stale_validations = state["stale_validations"]
        for name, value in state["good"].items():
            self.good[name].copy_(value)
        self.optimization.load_state_dict(state)
        self._started -= state.get("seconds", 0.0)
        self.seconds = state.get("seconds", 0.0)
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])

    def _gradients(self) -> tuple[float, float]:
        """Accumulate gradients over the parts of this process; return their loss and nfe."""
        device, seed = self.processes.device, self.config.seed
        coarse = self.config.precision == "bfloat16"
        total = 0.0
        with count_evaluations(self.flow) as nfe:
            for part, share, (x, context, weight, target), some in self._parts():
                generator = draws(seed, phase=self.number, step=self.step, part=part, device=device)
                with torch.autocast(device.type, torch.bfloat16, enabled=coarse):
                    loss = share * self.objective(
                        x, context, target=target, weight=weight, draws=some, generator=generator
                    )
                check_finite("loss", loss.item())
                loss.backward()
                total += loss.item()
        return total, float(nfe.value)

    def _parts(self) -> Iterator[tuple[int, float, Batch, int | None]]:
        """Yield the number, weight in the loss, rows, and draws without rows, of each part."""
        each, rank = self.config.accumulation_steps, self.processes.rank
        count = each * self.processes.count
        mine = range(rank * each, (rank + 1) * each)
        if self.rows is None or self.sampler is None:
            draws = self.objective.draws
            for number in mine:
                if draws is None or count == 1:
                    yield number, 1 / count, Batch(), None
                else:
                    some = len(range(number, draws, count))
                    yield number, some / draws, Batch(), some
            return
        indices = self.sampler.minibatch(self.step)
        for number in mine:
            rows = indices.tensor_split(count)[number]
            yield number, len(rows) / len(indices), self.rows.take(rows), None


def kept_of(objective: Objective) -> Flow | Objective:
    """Return the part of an objective that is validated, and whose best weights are kept."""
    return objective if objective.is_kept_whole else objective.flow


def check_finite(name: str, value: float) -> None:
    """Raise a NotFiniteError for NaN and infinity."""
    if not math.isfinite(value):
        raise NotFiniteError(f"the {name} is {value}")


def copy_of_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict of a module."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
