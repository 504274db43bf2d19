"""Train a flow, with validation and resuming."""

from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from cnf._checks import (
    check_flag,
    check_number,
    check_trainable,
    check_type,
    is_positive,
    reference_tensor,
)
from cnf._warnings import warn
from cnf.flows.calibration import has_solver_by_hand, obstacle_to_calibration
from cnf.flows.cnf import CNF
from cnf.flows.flow import Flow
from cnf.flows.mixture_start import WeightedRows, become_mixture_if_better
from cnf.flows.references import LARGEST_ERROR, by_reference
from cnf.objectives import HybridObjective, MaximumLikelihood, Objective
from cnf.objectives.base import HOOKS
from cnf.objectives.solving import for_training, training_solver
from cnf.ode import ODEError
from cnf.training.checkpoint import Checkpoints
from cnf.training.config import TrainingConfig
from cnf.training.data import Data, TrainingData, as_rows, hold_out
from cnf.training.distributed import Processes
from cnf.training.history import Callback, History
from cnf.training.initialization import Sample, check_sample, initialize, sample_of
from cnf.training.phase import copy_of_tensors
from cnf.training.phases import Plan, check_plan, make_plan, rows_for, usual_phases
from cnf.training.run import Run

_MOST_ROWS = 10_000
"""Most rows that a Gaussian mixture is fitted to, and compared by."""
_COMPARED_ROWS = 128


def fit(
    objective: Flow | Objective,
    data: Data | None,
    config: TrainingConfig | Sequence[TrainingConfig] | None = None,
    *,
    validation: Data | float | None = 0.1,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    accuracy: float | None = 1e-3,
) -> History:
    """Train a flow in place, from its present weights.

    Under ``torchrun`` the processes train one flow together, and all end with the same weights;
    `batch_size` counts the rows of all processes.

    Args:
        objective: A flow, trained in the phases of `config`, or an `Objective`, whose own
            parameters are trained too. If its `takes_data` is False, `data` are contexts; without
            contexts, each part of a step gets its part of the `draws` of the objective. If its
            `takes_targets` is True, `data` have targets. If its `is_kept_whole` is True, as with
            targets or own parameters, the objective as a whole is averaged, validated by its own
            loss, and left with its best weights; otherwise the flow is, by its log-density.
        data: Training data, at any scale; `Data` lists the forms. `Standardize` and the like are
            initialised from at most 10 000 rows. Weights are scaled to a mean of 1, in a `Dataset`
            over at most 10 000 rows. A `Dataset` is read as needed, and may be larger than memory;
            torch's `TensorDataset` and `StackDataset` of tensors count as tensors. None for an
            objective that takes no data.
        config: Settings; for a flow perhaps several, phase by phase. A phase starts from the final
            weights of the phase before, averaged if it has `ema`, or from the best weights so far
            after early stopping. None for the phases of `recipe` if `FlowMatching` can train the
            flow, else for ``TrainingConfig()``, with a `patience` of 3. Then a `CNF` with a default
            base and without a context becomes a `GaussianMixtureBase` with a zero field, unless the
            validation rows show that the flow is the better density.
        validation: Validation data of the same form, or the fraction of the rows to hold out, at
            random and 1000 rows at most; None or 0 trains on all rows, and keeps the last weights.
            The flow ends with the weights that have the lowest negative log-likelihood of these
            rows, by `log_prob`, over all phases, also after an interruption from the keyboard. A
            mixture that they choose is fitted to them too, if they are a fraction of the rows.
        checkpoints: Folder and frequency of checkpoints; None for none.
        resume: Whether to resume the run in the folder, if there is one: with the same weights and
            history as without the interruption, bit for bit on a CPU. A finished run returns at
            once. Settings, flow and all data must be the same; only the number of rows is compared
            for a `Dataset` other than `NpyRows`, `TensorDataset` and a `StackDataset` of these.
        callbacks: Called after each step; see `Callback`.
        accuracy: Largest estimated error of `log_prob`, in nats for each ODE, for which
            `Flow.calibrate` chooses the steps of the solves after training, from training rows.
            The weights in the folder of the checkpoints are not calibrated. Solvers other than the
            default one, and a flow that cannot be calibrated, stay; None for all flows. A solver
            chosen by hand is compared with one of another kind after maximum likelihood, on 128
            training rows: a warning gives both numbers if `log_prob` of a row, or the mean in the
            loss, is wrong by more than 0.05 nats.

    Returns:
        The history of the run.

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
    if accuracy is not None:
        accuracy = check_number("accuracy", accuracy, "positive and finite", is_positive)
    flow = _flow_of(objective)
    with torch.inference_mode(False), torch.enable_grad():
        check_trainable("objective", objective)
        plan = None if config is None and objective is flow else make_plan(objective, config)
        all_rows = as_rows("data", data, flow) if plan is None else rows_for(plan, data, flow)
        rows, held_out = _split(all_rows, validation, flow)
        if plan is None:
            plan = _usual_plan(flow, rows, held_out)
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
        run.go()
        if config is None:
            _exchange(objective, rows, held_out, validation)
    _calibrate(flow, sample, accuracy)
    _check_solvers(plan, flow, sample, processes)
    return run.history


def _usual_plan(flow: Flow, rows: TrainingData | None, held_out: TrainingData | None) -> Plan:
    """Return the phases of a flow without settings; a mixture is left, to be chosen again."""
    if isinstance(flow, CNF):
        flow.forget_mixture()
    count = 0 if rows is None else len(rows)
    return make_plan(flow, usual_phases(flow, count, validated=held_out is not None))


def _flow_of(objective: object) -> Flow:
    if isinstance(objective, Flow):
        return objective
    if isinstance(objective, Objective):
        return objective.flow
    raise TypeError(
        "objective must be a cnf.Flow or a cnf.objectives.Objective; got "
        f"{type(objective).__name__}. Make one of your own by subclassing Objective: call "
        f"super().__init__(flow), and write {HOOKS['forward']}."
    )


def _exchange(
    flow: Flow | Objective,
    rows: TrainingData | None,
    held_out: TrainingData | None,
    validation: Data | float | None,
) -> None:
    """Make the flow a Gaussian mixture, unless it is the better density or is not validated."""
    is_part = isinstance(validation, Real) and validation > 0
    # Too few rows to hold any out are too few for a flow.
    if not isinstance(flow, CNF) or rows is None or (held_out is None and not is_part):
        return

    def weighted(rows: TrainingData) -> WeightedRows:
        some = rows.some(_MOST_ROWS)
        return WeightedRows(some.x, some.weight)

    others = None if held_out is None else weighted(held_out)
    become_mixture_if_better(flow, weighted(rows), others, refit=is_part)


def _calibrate(flow: Flow, sample: Sample, accuracy: float | None) -> None:
    """Calibrate a flow with default solvers for training rows; None leaves it as it is."""
    transforms = flow.transforms
    if (
        accuracy is None
        or sample.x is None
        or has_solver_by_hand(transforms)
        or obstacle_to_calibration(transforms, flow.base)
    ):
        return
    generator = torch.Generator(sample.x.device).manual_seed(0)
    try:
        flow.calibrate(sample.x, sample.context, accuracy=accuracy, generator=generator)
    except (ODEError, ValueError) as error:
        warn(f"the flow keeps its solver after training: {error}")


@torch.no_grad()
def _check_solvers(plan: Plan, flow: Flow, sample: Sample, processes: Processes) -> None:
    """Warn if maximum likelihood was reached by the error of a solver chosen by hand."""
    parts = [part for objective, _ in plan for part in objective.modules()]
    objectives = [part for part in parts if isinstance(part, MaximumLikelihood | HybridObjective)]
    if sample.x is None or not objectives or not processes.is_first:
        return
    every = -(-len(sample.x) // _COMPARED_ROWS)
    context = None if sample.context is None else sample.context[::every]
    kept = copy_of_tensors(flow)
    try:
        message = _error_of_solvers(objectives[-1], flow, sample.x[::every], context)
    except (ODEError, ValueError) as error:
        message = f"a solver chosen by hand could not be compared with another one: {error}"
    finally:
        flow.load_state_dict(kept)  # a network of a user may count its calls in a buffer
    if message is not None:
        warn(message)


def _error_of_solvers(
    objective: MaximumLikelihood | HybridObjective, flow: Flow, x: Tensor, context: Tensor | None
) -> str | None:
    """Return the error by the solver of the flow or of the objective in words, if too large."""
    by_hand = has_solver_by_hand(flow.transforms)
    if not by_hand and objective.solver == training_solver(None):
        return None

    def log_prob(by: Flow) -> Tensor:
        """Return log-densities, by the cheaper divergence of training."""
        cheap = by.map_continuous(
            lambda part: for_training(part, solver=part.solver, divergence=objective.divergence)
        )
        generator = torch.Generator(x.device).manual_seed(0)
        return cheap.log_prob(x, context, generator=generator).double()

    found = true = log_prob(flow)
    if by_hand:
        true = log_prob(by_reference(flow))
    what, error = "log_prob of the trained flow is wrong by up to", (found - true).abs().max()
    if error <= LARGEST_ERROR and objective.solver != training_solver(None):
        # A user sees only its mean.
        found = log_prob(flow.using(solver=objective.solver))
        what, error = (
            "the mean in the loss of training is wrong by",
            (found.mean() - true.mean()).abs(),
        )
    if error <= LARGEST_ERROR:
        return None
    return (
        f"{what} {error:.3g} nats, because its solver is too coarse for the "
        f"trained field: on {len(x)} training rows the mean log-density is {found.mean():.4g} "
        f"nats, and {true.mean():.4g} by a solver of another kind. Train with more steps or "
        "tighter tolerances, in the solvers of the flow and of MaximumLikelihood; or leave both "
        "solvers out, and fit chooses steps for a stated accuracy. See also certify."
    )


def _split(
    rows: TrainingData | None, validation: Data | float | None, flow: Flow
) -> tuple[TrainingData | None, TrainingData | None]:
    """Return training rows and validation rows."""
    if validation is None:
        return rows, None
    if isinstance(validation, bool | np.bool_):
        raise TypeError(
            f"validation must be data, or a fraction of the rows such as 0.1; got {validation}. "
            "Leave it out for a tenth of the rows, or set None for no validation."
        )
    if not isinstance(validation, Real) and getattr(validation, "ndim", None) != 0:
        targets = rows is not None and rows.targets
        return rows, as_rows("validation", validation, flow, targets=targets)
    expected = "data, or a fraction of the rows in [0, 1)"
    fraction = check_number("validation", validation, expected, lambda part: 0 <= part < 1)
    return (rows, None) if rows is None or rows.contexts else hold_out(rows, fraction)
