"""Build and validate the training phases."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cnf._checks import check_count, check_number, check_seed, is_positive, reference_tensor
from cnf.flows.flow import Flow
from cnf.objectives import FlowMatching, MaximumLikelihood, Objective
from cnf.soap import SOAP
from cnf.training.config import TrainingConfig
from cnf.training.data import TrainingData, as_rows
from cnf.training.distributed import Processes
from cnf.training.optimization import Optimization

_VALIDATIONS = 5
_MATCHING_STEPS = (50, 6000)
_LIKELIHOOD_STEPS = (5, 100)
_ROWS_OF_A_LIKELIHOOD_STEP = 60


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training in two phases: flow matching with averaged weights, then maximum likelihood.

    A step of flow matching takes one evaluation of the network for each row, so it fits a flow
    roughly in little time; maximum likelihood, at a loose tolerance, then improves the reported
    likelihood. Matching, a regression, is optimised by SOAP, likelihood by Adam. Both learning
    rates decay to zero. There are five validations in each phase, if there are validation data.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a setting is out of range, or both phases have 0 steps.

    References:
        Lipman et al. (2023), Flow Matching for Generative Modeling.
        https://arxiv.org/abs/2210.02747; Vyas et al. (2025), SOAP,
        https://arxiv.org/abs/2409.11321

    Example:
        >>> [phase.steps for phase in Recipe(likelihood_steps=100).phases(3000)]
        [3000, 100]
    """

    matching_steps: int | None = None
    """Steps of flow matching; 0 for none; None for one step for each row, from 50 to 6000."""
    likelihood_steps: int | None = None
    """Steps of maximum likelihood, each as long as about thirty of flow matching; 0 for none; None
    for one step for each 60 rows, from 5 to 100."""
    batch_size: int = 1024
    """Rows of a minibatch; all rows if there are fewer."""
    learning_rate: float = 0.01
    """Peak learning rate of flow matching; maximum likelihood has a twentieth of it."""
    seed: int = TrainingConfig.seed
    """Seed of the order of the rows and of the random numbers of the objectives."""

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
        """Return the phases of training on so many rows; `recipe` documents the arguments."""
        if rows is not None:
            check_count("rows", rows)
        matching, likelihood = self.matching_steps, self.likelihood_steps
        if matching is None:
            matching = _steps_for(rows, _MATCHING_STEPS)
        if likelihood is None:
            likelihood = _steps_for(rows, _LIKELIHOOD_STEPS, _ROWS_OF_A_LIKELIHOOD_STEP)
        phases = (
            (partial(FlowMatching, times="late"), matching, SOAP, self.learning_rate, 0.999),
            (MaximumLikelihood, likelihood, None, self.learning_rate / 20, 0.99),
        )
        return tuple(
            TrainingConfig(
                objective=objective,
                steps=steps,
                batch_size=self.batch_size,
                learning_rate=rate,
                optimizer=optimizer,
                ema=ema,
                validate_every=max(1, steps // _VALIDATIONS),
                patience=patience,
                seed=self.seed,
                progress=progress,
            )
            for objective, steps, optimizer, rate, ema in phases
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
    """Return the phases of a `Recipe`, which documents the other settings and errors.

    Args:
        rows: Number of training rows, which sets the numbers of steps, because a flow soon overfits
            few rows; None for many.
        matching_steps: As in `Recipe`.
        likelihood_steps: As in `Recipe`.
        batch_size: As in `Recipe`.
        learning_rate: As in `Recipe`.
        patience: Validations without a new best before early stopping of a phase.
        seed: As in `Recipe`.
        progress: Whether to show progress bars.

    Example:
        >>> [phase.steps for phase in recipe()]
        [6000, 100]
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


def _steps_for(rows: int | None, bounds: tuple[int, int], rows_of_a_step: int = 1) -> int:
    """Return the steps for a number of rows, within bounds; the upper bound for None."""
    least, most = bounds
    return most if rows is None else min(most, max(least, rows // rows_of_a_step))


_PATIENCE = 3

Plan = Sequence[tuple[Objective, TrainingConfig]]
"""Objectives and settings, phase by phase."""


def usual_phases(flow: Flow, rows: int, *, validated: bool) -> Sequence[TrainingConfig]:
    """Return the default phases: `recipe` if flow matching can train the flow, else likelihood."""
    patience = _PATIENCE if validated else None
    if flow.only_ode is None:
        return (TrainingConfig(patience=patience),)
    return recipe(rows, patience=patience)


def make_plan(
    objective: Flow | Objective, config: TrainingConfig | Sequence[TrainingConfig] | None
) -> Plan:
    """Return the phases in order, with their objectives; None stands for ``TrainingConfig()``."""
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
        plan = []
        for each in configs:
            if not isinstance(each, TrainingConfig):
                raise _wrong_config(each, "or several")
            made = each.objective(objective)
            _check_made(made, objective)
            plan.append((made, each))
    for made, _ in plan:
        if not any(parameter.requires_grad for parameter in made.parameters()):
            raise ValueError("objective must have parameters to train; got none.")
    return plan


def rows_for(plan: Plan, data: Any, flow: Flow) -> TrainingData | None:
    """Return the data as rows, or as contexts for objectives that take no data."""
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
    return as_rows("data", data, flow, contexts=contexts, targets=plan[0][0].takes_targets)


def check_plan(
    plan: Plan,
    flow: Flow,
    rows: TrainingData | None,
    validation: TrainingData | None,
    processes: Processes,
) -> None:
    """Refuse settings that do not fit the flow, the data or the number of processes."""
    dtype = reference_tensor(flow).dtype
    for objective, config in plan:
        Optimization(objective, config)  # before a phase is trained, not after the one before it
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


def _wrong_config(config: object, expected: str) -> TypeError:
    return TypeError(f"config must be a TrainingConfig {expected}; got {type(config).__name__}.")


def _check_made(made: object, flow: Flow) -> None:
    """Refuse an objective of a phase that is none of the flow, or that the user would lose."""
    if not isinstance(made, Objective) or made.flow is not flow:
        raise TypeError(
            "the objective of a TrainingConfig must make a cnf.objectives.Objective whose "
            f"flow is the one given; got {type(made).__name__}."
        )
    if made.is_more_than_its_flow:  # the rest would be lost
        name = type(made).__name__
        has, data = "has parameters of its own", "x"
        if made.takes_targets:
            has, data = "takes targets", "(x, target)"
        raise ValueError(
            f"{name} {has}, and must be given in place of the flow, not in a "
            f"TrainingConfig: fit({name}(flow, ...), {data}, config)."
        )
