"""Training, from the outside."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from cnf._checks import check_type, reference_tensor
from cnf.training.callbacks import Callback
from cnf.training.checkpoint import Checkpoints
from cnf.training.config import TrainingConfig
from cnf.training.history import History
from cnf.training.plan import check_plan, flow_of, make_plan, rows_for, usual_phases
from cnf.training.processes import Processes
from cnf.training.rows import Data, Rows, as_rows, held_out_of
from cnf.training.run import Run
from cnf.training.scale import initialize, standardised_first, warn_if_far_from_standard


def fit(
    objective: nn.Module,
    data: Data | None,
    config: TrainingConfig | Sequence[TrainingConfig] | None = None,
    *,
    validation: Data | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> History:
    """Train a flow in place, from the weights that it has.

    Under ``torchrun`` the processes train one flow together, and all end with the same weights;
    `batch_size` counts the rows of all of them.

    Args:
        objective: A flow, trained in the phases of `config`, or an objective: a module with a
            `flow`, whose ``forward(x, context, generator=...)`` returns the loss and takes a
            `weight` if the data have one. Its own parameters are trained too. An objective whose
            attribute `takes_data` is False is not given rows, but data, if any, as contexts; if it
            is given none and has an attribute `draws`, each part of a step is called with its
            share, `draws`.
        data: What to train on; `Data` lists the forms. Weights are scaled to a mean of 1, but for
            those of a `Dataset`. A `Dataset` is read as needed, so that it may be larger than
            memory. None for an objective that takes no data.
        config: Settings; for a flow perhaps several, phase by phase. A phase starts from the
            weights, averaged if they were, that the one before ended with, or from the best so far
            if that one ran out of `patience`. None is for the phases of `recipe` for a flow that
            `FlowMatching` can train, and for one of ``TrainingConfig()`` otherwise, and of three
            validations without a new best. The data of a flow are then standardised first, if it is
            one of vectors that begins with an ODE (by a `Standardize` of 100 000 rows at most, put
            into the flow), and without `validation` a tenth of them is held out for it, 1000 rows
            at most.
        validation: Held-out data of the same form. The flow ends with the weights whose
            negative log-likelihood of them, as `log_prob` gives it, is lowest over all phases,
            also when training is interrupted from the keyboard.
        checkpoints: Where the run is kept, if at all.
        resume: Whether to go on with the run kept there, if there is one: to the same weights and
            record as without the interruption, bit for bit on a CPU. A finished run is
            given back at once.
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
    if resume and checkpoints is None:
        raise ValueError("resume=True needs checkpoints=Checkpoints(folder=...); got None.")
    if checkpoints is not None:
        check_type("checkpoints", checkpoints, Checkpoints, "use Checkpoints(folder=...)")
    if callable(callbacks):
        raise TypeError("callbacks must be a sequence; put the single callback in brackets.")
    flow = flow_of(objective)
    with torch.inference_mode(False), torch.enable_grad():
        held_out = None if validation is None else as_rows("validation", validation, flow)
        scaled: AbstractContextManager[None] = nullcontext()
        rows: Rows | None = None
        if config is None and objective is flow:
            rows = as_rows("data", data, flow)
            scaled = standardised_first(flow, rows)
            if held_out is None:
                rows, held_out = held_out_of(rows)
            config = usual_phases(flow, len(rows), validated=held_out is not None)
        with scaled:
            plan = make_plan(objective, TrainingConfig() if config is None else config)
            rows = rows_for(plan, data, flow) if rows is None else rows
            processes = Processes(reference_tensor(flow).device)
            check_plan(plan, flow, rows, held_out, processes)
            for each, _ in plan:
                processes.agree_on(each)
            run = Run(plan, flow, rows, held_out, processes, callbacks)
            if checkpoints is not None:
                run.keep_in(checkpoints, resume=resume)
            initialize(flow, rows)
            warn_if_far_from_standard(flow, rows)
        run.go()
    return run.history
