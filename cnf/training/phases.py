"""What a run is to do: its objectives and settings, phase by phase."""

from collections.abc import Sequence
from typing import Any

import torch

from cnf._checks import reference_tensor
from cnf.flows.flow import Flow
from cnf.objectives import Objective
from cnf.objectives.base import HOOKS
from cnf.training.config import TrainingConfig
from cnf.training.data import TrainingData, as_rows
from cnf.training.distributed import Processes
from cnf.training.recipe import recipe

_PATIENCE = 3

Plan = Sequence[tuple[Objective, TrainingConfig]]
"""Objectives and settings, phase by phase."""


def flow_of(objective: Flow | Objective) -> Flow:
    """The flow that is trained.

    Raises:
        TypeError: If there is none.
    """
    if not isinstance(objective, Flow | Objective):
        raise TypeError(
            "objective must be a cnf.Flow or a cnf.objectives.Objective; got "
            f"{type(objective).__name__}. Make one of your own by subclassing Objective: call "
            f"super().__init__(flow), and write {HOOKS['forward']}."
        )
    return objective if isinstance(objective, Flow) else objective.flow


def usual_phases(flow: Flow, rows: int, *, validated: bool) -> Sequence[TrainingConfig]:
    """`recipe` where flow matching can train the flow, else maximum likelihood alone."""
    patience = _PATIENCE if validated else None
    if flow.only_ode is None:
        return (TrainingConfig(patience=patience),)
    return recipe(rows, patience=patience)


def make_plan(
    objective: Flow | Objective, config: TrainingConfig | Sequence[TrainingConfig] | None
) -> Plan:
    """The phases in order; for a flow, with the objectives that the settings name.

    None stands for ``TrainingConfig()``.

    Raises:
        TypeError: If something has the wrong type.
        ValueError: If there is nothing to train, or there are several phases for one objective.
    """
    if config is None:
        config = TrainingConfig()
    if not isinstance(objective, Flow):
        if not isinstance(config, TrainingConfig):
            raise _wrong_config(config, "for an objective")
        plan: Plan = [(objective, config)]
    else:
        configs = (config,) if isinstance(config, TrainingConfig) else config
        if not isinstance(configs, Sequence) or len(configs) == 0:
            raise _wrong_config(configs, "or several")
        for each in configs:
            if not isinstance(each, TrainingConfig):
                raise _wrong_config(each, "or several")
        plan = [(_made(each, objective), each) for each in configs]
    for made, _ in plan:
        if not any(parameter.requires_grad for parameter in made.parameters()):
            raise ValueError("objective must have parameters to train; got none.")
    return plan


def rows_for(plan: Plan, data: Any, flow: Flow) -> TrainingData | None:
    """The data as rows, or as contexts for objectives that take no data.

    Raises:
        TypeError: If the data have no form that fits.
        ValueError: If some objectives take data and others do not, or the data do not fit.
    """
    takers = {objective.takes_data for objective, _ in plan}
    if len(takers) > 1:
        raise ValueError("phases must all take data, or none may; train in two calls of fit.")
    contexts = takers == {False}
    if data is None and contexts:
        if flow.context_features:
            raise ValueError(
                "data must be contexts of shape (rows, "
                f"{flow.context_features}), because the flow is conditional; got None."
            )
        return None
    return as_rows("data", data, flow, contexts=contexts)


def check_plan(
    plan: Plan,
    flow: Flow,
    rows: TrainingData | None,
    validation: TrainingData | None,
    processes: Processes,
) -> None:
    """Refuse settings that do not fit the flow, the data or the number of processes.

    Raises:
        ValueError: If there are any.
    """
    dtype = reference_tensor(flow).dtype
    for objective, config in plan:
        if config.patience is not None and validation is None:
            raise ValueError(f"patience={config.patience} needs validation data; got None.")
        if config.precision == "bfloat16" and dtype != torch.float32:
            raise ValueError(
                f"precision='bfloat16' needs a flow in torch.float32; got {dtype}. "
                "Convert flow and data with .float()."
            )
        parts = config.accumulation_steps * processes.count
        how = (
            f"{parts} parts (accumulation_steps={config.accumulation_steps} in each of "
            f"{processes.count} processes)"
        )
        if rows is not None and min(config.batch_size, len(rows)) < parts:
            raise ValueError(
                f"a minibatch of {min(config.batch_size, len(rows))} rows cannot be cut into "
                f"{how}; raise batch_size, or lower accumulation_steps."
            )
        draws = objective.draws
        if rows is None and draws is not None and draws < parts:
            raise ValueError(
                f"{draws} draws cannot be cut into {how}; raise draws, or lower accumulation_steps."
            )


def _made(config: TrainingConfig, flow: Flow) -> Objective:
    objective = config.objective(flow)
    if not isinstance(objective, Objective) or objective.flow is not flow:
        raise TypeError(
            "the objective of a TrainingConfig must make a cnf.objectives.Objective whose flow is "
            f"the one given; got {type(objective).__name__}."
        )
    return objective


def _wrong_config(config: object, expected: str) -> TypeError:
    return TypeError(f"config must be a TrainingConfig {expected}; got {type(config).__name__}.")
