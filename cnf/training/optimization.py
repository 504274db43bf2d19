"""Optimiser, learning-rate scheduler and exponential moving average of the weights."""

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cnf.objectives import Objective
from cnf.training.config import TrainingConfig
from cnf.vector_fields.compiled import compile_alike

_WARM_UP = 0.02


class Optimization:
    """Optimiser of the parameters of an objective, and its learning rates.

    Raises:
        TypeError: If the optimiser or scheduler of the settings is none of torch's.
        ValueError: If it cannot be used here, or if the optimiser lacks a parameter.
    """

    def __init__(self, objective: Objective, config: TrainingConfig) -> None:
        self._objective, self._config = objective, config
        decay, rate = config.weight_decay, config.learning_rate
        self.optimizer: Optimizer
        if config.optimizer is not None:
            self.optimizer = _optimizer_of(config.optimizer, objective, rate)
        # Fused: one call for each weight would take a third of a step of flow matching.
        elif decay:
            parameters = objective.parameters()
            self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
        else:
            self.optimizer = torch.optim.Adam(objective.parameters(), lr=rate, fused=True)
        self.scheduler: LRScheduler | None = None
        if callable(config.schedule):
            self.scheduler = _make_scheduler(config.schedule, self.optimizer)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, done: float) -> float:
        """Take a step after `done` others; return the learning rate, of the first group."""
        groups = self.optimizer.param_groups
        if self.scheduler is None:
            factor = self._factor(done)
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate * factor
        rate = float(groups[0]["lr"])
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return rate

    def settings(self) -> dict[str, object]:
        """Return the initial settings of an optimiser and scheduler of the user, by name."""
        if self._config.optimizer is None and self.scheduler is None:
            return {}
        told: dict[str, object] = {}
        for number, group in enumerate(self.optimizer.param_groups, start=1):
            place = f"group {number} of the optimizer"
            told[f"parameters in {place}"] = len(group["params"])
            told |= {f"{name} of {place}": group[name] for name in group if name != "params"}
        if self.scheduler is not None:
            told["class of the scheduler"] = type(self.scheduler).__qualname__
            for name, value in self.scheduler.state_dict().items():
                if not name.startswith("_"):
                    told[f"{name} of the scheduler"] = value
        # Versions of torch differ in settings that are switched off.
        return {
            name: value for name, value in told.items() if value is not None and value is not False
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the optimiser and, if there is one, the scheduler."""
        state = {"optimizer": _plain("optimizer", self.optimizer.state_dict())}
        if self.scheduler is not None:
            state["scheduler"] = _plain("scheduler", self.scheduler.state_dict())
        return state

    def parts(self, state: dict[str, Any]) -> Iterator[tuple[str, object, object]]:
        """Yield the name of each part of a state, the part, and an example of its form."""
        found, own = state["optimizer"], self.state_dict()
        forms = {i: form for i, form in self._state_after_a_step().items() if i in found["state"]}
        # A parameter without gradient has no state, and an optimiser may add to a state later.
        known = {
            i: {name: value for name, value in part.items() if name in forms.get(i, part)}
            for i, part in found["state"].items()
        }
        yield "the state of its optimizer", known, forms
        groups, own_groups = found["param_groups"], own["optimizer"]["param_groups"]
        yield "the groups of its optimizer", [None] * len(groups), [None] * len(own_groups)
        for group, own_group in zip(groups, own_groups, strict=True):
            yield "the settings of its optimizer", *_in_both(group, own_group)
        if self.scheduler is not None:
            yield "the names in its scheduler", sorted(state["scheduler"]), sorted(own["scheduler"])
            yield "the state of its scheduler", *_in_both(state["scheduler"], own["scheduler"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def _factor(self, done: float) -> float:
        """Return the factor of the learning rates after so many steps."""
        steps = self._config.steps
        warm_up = max(1, round(_WARM_UP * steps))
        if done < warm_up:
            return min(1.0, (done + 1) / warm_up)
        if self._config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / max(1, steps - warm_up)))

    def _state_after_a_step(self) -> dict[int, dict[str, Any]]:
        """Return the state of a new optimiser after a step, and leave the parameters unchanged."""
        before = copy.deepcopy(self._objective.state_dict())
        optimizer = Optimization(self._objective, self._config).optimizer
        for parameter in self._objective.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        self._objective.load_state_dict(before)
        self._objective.zero_grad()
        state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
        return state


class Average:
    """Copy of a module with an exponential moving average of its weights, and its buffers.

    The decay of step n is ``min(decay, (1 + n) / (10 + n))``, so the initial weights are soon
    forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module)
        compile_alike(self.module, module)
        self.decay = decay
        self.steps = 0
        # torch's AveragedModel looks the weights up at each step, noticeably in flow matching.
        self._weights = [weight.detach() for weight in self.module.parameters()]
        self._followed = [weight.detach() for weight in module.parameters()]
        self._buffers = list(zip(self.module.buffers(), module.buffers(), strict=True))

    def update(self) -> None:
        """Average the weights of the module in, and copy its buffers."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._weights, self._followed, 1 - decay)
        for buffer, followed in self._buffers:
            buffer.copy_(followed)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights, and the number of steps."""
        return {"steps": self.steps, "flow": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.steps = state["steps"]
        self.module.load_state_dict(state["flow"])


def _optimizer_of(
    make: Callable[..., Optimizer], objective: Objective, learning_rate: float
) -> Optimizer:
    optimizer = make(list(objective.parameters()), lr=learning_rate)
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer; got {name}.")
    arguments = inspect.signature(optimizer.step).parameters.values()
    if any(each.name == "closure" and each.default is each.empty for each in arguments):
        raise ValueError(
            f"optimizer must take steps without a closure; got {name}. Try torch.optim.AdamW."
        )
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for path, parameter in objective.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise ValueError(
                f"optimizer must hold each parameter of the objective; got one without {path!r}. "
                "Add it to a group, or freeze it with requires_grad_(False)."
            )
    return optimizer


def _make_scheduler(make: Callable[[Optimizer], LRScheduler], optimizer: Optimizer) -> LRScheduler:
    scheduler = make(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "schedule must make a scheduler of the number of steps; got ReduceLROnPlateau, which "
            'needs a loss. Try "cosine", with patience for early stopping.'
        )
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            "schedule must make a torch.optim.lr_scheduler.LRScheduler; got "
            f"{type(scheduler).__name__}."
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(
            "schedule must make a scheduler of the optimizer that it is given; got one of another. "
            "Write a function of the optimizer, such as functools.partial(StepLR, step_size=100)."
        )
    return scheduler


def _plain(name: str, value: Any) -> Any:
    """Return a state as a checkpoint may hold it, without NumPy's numbers; refuse objects."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        plain = {key: _plain(name, each) for key, each in value.items()}
        return Counter(plain) if isinstance(value, Counter) else plain
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(_plain(name, each) for each in value)
    if value is not None and not isinstance(value, bool | int | float | str | Tensor):
        raise TypeError(
            f"the state of the {name} must hold tensors, numbers and text for a checkpoint; got "
            f"{value!r}. Leave it out of its state_dict()."
        )
    return value


def _in_both(found: dict[str, Any], own: dict[str, Any]) -> tuple[object, object]:
    """Return the entries that both states have, where the own one is not empty, with floats."""
    names = [name for name, value in own.items() if name in found and value is not None]
    return tuple(_with_floats({name: each[name] for name in names}) for each in (found, own))


def _with_floats(value: Any) -> Any:
    """Return a state with floats for ints, because a rate of 0 may become one of 0.1."""
    if isinstance(value, dict):
        return {key: _with_floats(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_floats(each) for each in value]
    return float(value) if type(value) is int else value
