"""What a run is to do: its objectives and settings, phase by phase."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cnf._checks import reference_tensor
from cnf.flows.flow import Flow
from cnf.objectives import FlowMatching
from cnf.training.config import TrainingConfig
from cnf.training.data import Rows, as_rows
from cnf.training.distributed import Processes
from cnf.training.recipe import recipe

_PATIENCE = 3

Plan = Sequence[tuple[nn.Module, TrainingConfig]]
"""Objectives and settings, phase by phase."""


def flow_of(objective: Any) -> Flow:
    """The flow that is trained.

    Raises:
        TypeError: If there is none.
    """
    flow = objective if isinstance(objective, Flow) else getattr(objective, "flow", None)
    if not isinstance(flow, Flow):
        raise TypeError(
            "objective must be a cnf.Flow or an objective with a flow; "
            f"got {type(objective).__name__}."
        )
    return flow


def usual_phases(flow: Flow, rows: int, *, validated: bool) -> Sequence[TrainingConfig]:
    """`recipe` where flow matching can train the flow, else maximum likelihood alone."""
    patience = _PATIENCE if validated else None
    try:
        FlowMatching(flow)
    except ValueError:
        return (TrainingConfig(patience=patience),)
    return recipe(rows, patience=patience)


def make_plan(
    objective: nn.Module, config: TrainingConfig | Sequence[TrainingConfig] | None
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


def rows_for(plan: Plan, data: Any, flow: Flow) -> Rows | None:
    """The data as rows, or as contexts for objectives that take no data.

    Raises:
        TypeError: If the data have no form that fits.
        ValueError: If some objectives take data and others do not, or the data do not fit.
    """
    takers = {getattr(objective, "takes_data", True) for objective, _ in plan}
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
    plan: Plan, flow: Flow, rows: Rows | None, validation: Rows | None, processes: Processes
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
        parts = config.accumulate * processes.count
        if rows is not None and min(config.batch_size, len(rows)) < parts:
            raise ValueError(
                f"a minibatch of {min(config.batch_size, len(rows))} rows cannot be cut into "
                f"{parts} parts (accumulate={config.accumulate} in each of {processes.count} "
                "processes); raise batch_size, or lower accumulate."
            )
        draws = getattr(objective, "draws", parts)
        if rows is None and draws < parts:
            raise ValueError(
                f"{draws} draws cannot be cut into {parts} parts (accumulate={config.accumulate} "
                f"in each of {processes.count} processes); raise draws, or lower accumulate."
            )


def _made(config: TrainingConfig, flow: Flow) -> nn.Module:
    objective = config.objective(flow)
    if not isinstance(objective, nn.Module) or getattr(objective, "flow", None) is not flow:
        raise TypeError(
            "the objective of a TrainingConfig must make a module whose flow is the one given; "
            f"got {type(objective).__name__}."
        )
    return objective


def _wrong_config(config: object, expected: str) -> TypeError:
    return TypeError(f"config must be a TrainingConfig {expected}; got {type(config).__name__}.")
