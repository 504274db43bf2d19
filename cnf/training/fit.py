"""Training, from the outside."""

from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch

from cnf._checks import check_flag, check_number, check_trainable, check_type, reference_tensor
from cnf.flows.flow import Flow
from cnf.objectives import Objective
from cnf.training.checkpoint import Checkpoints
from cnf.training.config import TrainingConfig
from cnf.training.data import Data, TrainingData, as_rows, held_out_of
from cnf.training.distributed import Processes
from cnf.training.history import Callback, History
from cnf.training.initialization import (
    check_sample,
    initialize,
    sample_of,
    warn_if_far_from_standard,
)
from cnf.training.phases import check_plan, flow_of, make_plan, rows_for, usual_phases
from cnf.training.run import Run


def fit(
    objective: Flow | Objective,
    data: Data | None,
    config: TrainingConfig | Sequence[TrainingConfig] | None = None,
    *,
    validation: Data | float | None = 0.1,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> History:
    """Train a flow in place, from the weights that it has.

    Under ``torchrun`` the processes train one flow together, and all end with the same weights;
    `batch_size` counts the rows of all of them.

    Args:
        objective: A flow, trained in the phases of `config`, or an `Objective`, whose own
            parameters are trained too. One whose `takes_data` is False is not given rows, but data,
            if any, as contexts; if it is given none and has `draws`, each part of a step is called
            with its share of them.
        data: What to train on, at any scale; `Data` lists the forms. What a flow sets from data,
            such as a `Standardize`, is set from 10 000 of these rows at most. Weights are scaled
            to a mean of 1, in a `Dataset` over 10 000 rows at most: it is read as needed, and so
            may be larger than memory, but for torch's `TensorDataset` and `StackDataset` of
            tensors, which are taken as these. None for an objective that takes no data.
        config: Settings; for a flow perhaps several, phase by phase. A phase starts from the
            weights, averaged if they were, that the one before ended with, or from the best so far
            if that one ran out of `patience`. None is for the phases of `recipe` for a flow that
            `FlowMatching` can train, and for one of ``TrainingConfig()`` otherwise, each ending
            after three validations without a new best.
        validation: Held-out data of the same form, or the share of the rows to hold out, at random
            and 1000 rows at most; None or 0 trains on all, and keeps the last weights. The flow
            ends with the weights whose negative log-likelihood of these rows, as `log_prob` gives
            it, is lowest over all phases, also when training is interrupted from the keyboard.
        checkpoints: Where the run is kept, if at all.
        resume: Whether to go on with the run kept there, if there is one: to the same weights and
            record as without the interruption, bit for bit on a CPU. A finished run is
            given back at once. It must be the same run: settings, flow and every number of the data
            are compared, but of a `Dataset` other than `NpyRows`, torch's `TensorDataset` and a
            `StackDataset` of these the number of rows alone.
        callbacks: Called after each step; see `Callback`.

    Returns:
        The record of the run.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the data do not fit the flow, or hold NaN or inf; if settings do not fit
            together; or if the checkpoints are of another run.
        FileExistsError: If the folder of the checkpoints holds a run, and `resume` is false.
        TrainingError: If training cannot go on; the flow keeps the best or last good weights.

    Example:
        >>> from cnf import CNF
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> history = fit(CNF(2), x, TrainingConfig(steps=3, progress=False))
        >>> len(history.loss)
        3
    """
    if check_flag("resume", resume) and checkpoints is None:
        raise ValueError("resume=True needs checkpoints=Checkpoints(folder=...); got None.")
    if checkpoints is not None:
        check_type("checkpoints", checkpoints, Checkpoints, "use Checkpoints(folder=...)")
    if callable(callbacks):
        raise TypeError("callbacks must be a sequence; put the single callback in brackets.")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks must be a list of callables; got {callbacks!r}.")
    flow = flow_of(objective)
    with torch.inference_mode(False), torch.enable_grad():
        check_trainable("objective", objective)
        plan = None if config is None and objective is flow else make_plan(objective, config)
        all_rows = as_rows("data", data, flow) if plan is None else rows_for(plan, data, flow)
        rows, held_out = _parted(all_rows, validation, flow)
        if plan is None:
            count = 0 if rows is None else len(rows)
            plan = make_plan(flow, usual_phases(flow, count, validated=held_out is not None))
        processes = Processes(reference_tensor(flow).device)
        check_plan(plan, flow, rows, held_out, processes)
        sample = sample_of(rows)
        check_sample("data", flow, sample)
        for each, _ in plan:
            processes.agree_on(each)
        run = Run(plan, flow, rows, held_out, processes, callbacks)
        if checkpoints is not None:
            run.keep_in(checkpoints, resume=resume)
        initialize(flow, sample)
        warn_if_far_from_standard(flow, sample)
        run.go()
    return run.history


def _parted(
    rows: TrainingData | None, validation: Data | float | None, flow: Flow
) -> tuple[TrainingData | None, TrainingData | None]:
    """Rows to train on, and rows to validate on.

    Raises:
        TypeError: If `validation` is True or False.
        ValueError: If it is a share out of range, or does not fit the flow.
    """
    if validation is None:
        return rows, None
    if isinstance(validation, bool | np.bool_):
        raise TypeError(
            f"validation must be data, or a share of the rows such as 0.1; got {validation}. "
            "Leave it out for a tenth of the rows, and say None for none."
        )
    if not isinstance(validation, Real) and getattr(validation, "ndim", None) != 0:
        return rows, as_rows("validation", validation, flow)
    expected = "data, or a share of the rows in [0, 1)"
    share = check_number("validation", validation, expected, lambda share: 0 <= share < 1)
    return (rows, None) if rows is None or rows.contexts else held_out_of(rows, share)
