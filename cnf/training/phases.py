"""The phases of training: their settings, objectives and checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cnf._checks import check_count, check_number, check_seed, is_positive, reference_tensor
from cnf.flows.flow import Flow
from cnf.objectives import FlowMatching, MaximumLikelihood, Objective
from cnf.objectives.base import HOOKS
from cnf.training.config import TrainingConfig
from cnf.training.data import TrainingData, as_rows
from cnf.training.distributed import Processes

_VALIDATIONS = 5
_MATCHING_STEPS = (50, 12_000)
_LIKELIHOOD_STEPS = (5, 200)
_ROWS_OF_A_LIKELIHOOD_STEP = 60


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Flow matching with an average of the weights, then maximum likelihood at a loose tolerance.

    A step of matching takes one evaluation of the network for each row, and so brings a flow near
    the data soon; likelihood then improves what is judged. Both rates decay to zero. Validation, if
    there are data for it, takes place five times in each phase.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a setting is out of range, or both phases are left out.

    References:
        Lipman et al. (2023), Flow Matching for Generative Modeling.
        https://arxiv.org/abs/2210.02747

    Example:
        >>> [phase.steps for phase in Recipe(likelihood_steps=100).phases(3000)]
        [3000, 100]
    """

    matching_steps: int | None = None
    """Steps of flow matching; 0 to leave it out; None for one for each row, but 50 at least and
    12 000 at most."""
    likelihood_steps: int | None = None
    """Steps of maximum likelihood after them, each of which takes as long as fifty of matching; 0
    to leave it out; None for one for each 60 rows, but 5 at least and 200 at most."""
    batch_size: int = TrainingConfig.batch_size
    """Rows of a minibatch; all rows if there are fewer."""
    learning_rate: float = TrainingConfig.learning_rate
    """Peak learning rate of matching; likelihood has a quarter of it."""
    seed: int = TrainingConfig.seed
    """Seed of the order of the rows and of everything that the objectives draw."""

    def __post_init__(self) -> None:
        for name in ("matching_steps", "likelihood_steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=0)
        if self.matching_steps == self.likelihood_steps == 0:
            raise ValueError("matching_steps and likelihood_steps must not both be 0.")
        check_count("batch_size", self.batch_size)
        check_number("learning_rate", self.learning_rate, "positive and finite", is_positive)
        check_seed("seed", self.seed)

    def phases(
        self, rows: int | None = None, *, patience: int | None = None, progress: bool = True
    ) -> tuple[TrainingConfig, ...]:
        """The phases of training on so many rows; `recipe` documents the arguments."""
        if rows is not None:
            check_count("rows", rows)
        matching, likelihood = self.matching_steps, self.likelihood_steps
        if matching is None:
            matching = _following(rows, _MATCHING_STEPS)
        if likelihood is None:
            likelihood = _following(rows, _LIKELIHOOD_STEPS, _ROWS_OF_A_LIKELIHOOD_STEP)
        phases = (
            (partial(FlowMatching, times="late"), matching, self.learning_rate, 0.999),
            (MaximumLikelihood, likelihood, self.learning_rate / 4, 0.99),
        )
        return tuple(
            TrainingConfig(
                objective=objective,
                steps=steps,
                batch_size=self.batch_size,
                learning_rate=rate,
                ema=ema,
                validate_every=max(1, steps // _VALIDATIONS),
                patience=patience,
                seed=self.seed,
                progress=progress,
            )
            for objective, steps, rate, ema in phases
            if steps
        )


def recipe(
    rows: int | None = None,
    *,
    matching_steps: int | None = Recipe.matching_steps,
    likelihood_steps: int | None = Recipe.likelihood_steps,
    batch_size: int = Recipe.batch_size,
    learning_rate: float = Recipe.learning_rate,
    patience: int | None = None,
    seed: int = Recipe.seed,
    progress: bool = True,
) -> tuple[TrainingConfig, ...]:
    """The phases of a `Recipe`, which documents the settings and errors.

    Args:
        rows: Number of rows to train on, which the numbers of steps follow, because few rows are
            soon learnt by heart; None for many.
        matching_steps: As in `Recipe`.
        likelihood_steps: As in `Recipe`.
        batch_size: As in `Recipe`.
        learning_rate: As in `Recipe`.
        patience: Validations without a new best after which a phase ends early.
        seed: As in `Recipe`.
        progress: Whether to show progress bars.

    Example:
        >>> [phase.steps for phase in recipe()]
        [12000, 200]
        >>> [phase.steps for phase in recipe(3000, likelihood_steps=100)]
        [3000, 100]
    """
    settings = Recipe(
        matching_steps=matching_steps,
        likelihood_steps=likelihood_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    return settings.phases(rows, patience=patience, progress=progress)


def _following(rows: int | None, bounds: tuple[int, int], rows_of_a_step: int = 1) -> int:
    """Steps for a number of rows, within bounds; the upper one if it is not known."""
    least, most = bounds
    return most if rows is None else min(most, max(least, rows // rows_of_a_step))


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
