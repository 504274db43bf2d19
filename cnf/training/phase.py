"""Phase of training: optimiser, steps and state."""

import math
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
from cnf.training.ema import Average
from cnf.training.sampling import MinibatchSampler, draws
from cnf.vector_fields import count_evaluations

_WARM_UP = 0.02


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

    def __post_init__(self) -> None:
        config = self.config
        self.good = copy_of_tensors(self.objective)
        self._parameters = list(self.objective.parameters())
        self._now = list(self.objective.state_dict().values())
        # One call for all weights: one for each would take a third of a step of flow matching.
        self.optimizer = torch.optim.Adam(self._parameters, lr=config.learning_rate, fused=True)
        self.averaged = None if config.ema is None else Average(self.flow, config.ema)
        self.sampler = None
        if self.rows is not None:
            self.sampler = MinibatchSampler(
                len(self.rows), config.batch_size, seed=config.seed, phase=self.number
            )

    @property
    def result(self) -> Flow:
        """Flow to validate and keep: the averaged flow if there is one."""
        return self.flow if self.averaged is None else self.averaged.flow

    @property
    def is_out_of_patience(self) -> bool:
        """Whether early stopping is due."""
        patience = self.config.patience
        return patience is not None and self.stale_validations >= patience

    @property
    def is_over(self) -> bool:
        """Whether the phase has taken its last step."""
        return self.step >= self.config.steps or self.is_out_of_patience

    @property
    def is_validated(self) -> bool:
        """Whether a validation is due after the last step."""
        return self.step % self.config.validate_every == 0 or self.step == self.config.steps

    def advance(self) -> dict[str, Any]:
        """Take one step; its initial weights become `good` if loss and gradient are finite.

        Raises:
            NotFiniteError: If the loss or its gradient is not finite.
            ODEError: If a solve fails.
        """
        self.step += 1
        self.optimizer.zero_grad()
        loss, nfe = self.processes.sums(self._gradients)
        self.processes.add_gradients(self._parameters)
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.gradient_clip or math.inf)
        check_finite("norm of the gradient", norm.item())
        torch._foreach_copy_(list(self.good.values()), self._now)
        rate = self.config.learning_rate * self._schedule()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update()
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
            "optimizer": self.optimizer.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that `state_dict` cannot have returned."""
        expected = self.state_dict()
        optimizer = expected.pop("optimizer")
        check_form("its phase", {**state, "optimizer": None}, {**expected, "optimizer": None})
        if not 0 <= state["step"] <= self.config.steps or state["stale_validations"] < 0:
            raise ValueError(f"its step must be from 0 to {self.config.steps}; got {state['step']}")
        count = torch.zeros((), dtype=torch.float32)
        moments = {
            i: {"step": count, "exp_avg": weight, "exp_avg_sq": weight}
            for i, weight in enumerate(self._parameters)
            if i in state["optimizer"]["state"]  # a parameter without gradient has none
        }
        check_form("the state of its optimizer", state["optimizer"]["state"], moments)
        groups = state["optimizer"]["param_groups"]
        check_form("the number of its groups", len(groups), len(optimizer["param_groups"]))
        for found, group in zip(groups, optimizer["param_groups"], strict=True):
            known = {name: value for name, value in group.items() if name in found}
            check_form("the settings of its optimizer", {k: found[k] for k in known}, known)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.step = state["step"]
        self.stale_validations = state["stale_validations"]
        for name, value in state["good"].items():
            self.good[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])

    def _gradients(self) -> tuple[float, float]:
        """Accumulate gradients over the parts of this process; return their loss and nfe."""
        device, seed = self.processes.device, self.config.seed
        coarse = self.config.precision == "bfloat16"
        total = 0.0
        with count_evaluations(self.flow) as nfe:
            for part, share, (x, context, weight), some in self._parts():
                generator = draws(seed, phase=self.number, step=self.step, part=part, device=device)
                with torch.autocast(device.type, torch.bfloat16, enabled=coarse):
                    loss = share * self.objective(
                        x, context, weight=weight, draws=some, generator=generator
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

    def _schedule(self) -> float:
        """Return the factor of the learning rate at this step."""
        steps, done = self.config.steps, self.step - 1
        warm_up = max(1, round(_WARM_UP * steps))
        if done < warm_up:
            return (done + 1) / warm_up
        if self.config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / max(1, steps - warm_up)))


def check_finite(name: str, value: float) -> None:
    """Raise a NotFiniteError for NaN and infinity."""
    if not math.isfinite(value):
        raise NotFiniteError(f"the {name} is {value}")


def copy_of_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict of a module."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
