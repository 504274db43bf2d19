"""Outcome of one training of an ablation: nats and evaluations at held-out rows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cnf.ablation.settings import Training
from cnf.flows.flow import Flow
from cnf.ode import ODESolver
from cnf.regularizers import CostRate
from cnf.tables.fit import TableRows
from cnf.vector_fields import VectorField, count_evaluations
from cnf.vector_fields.base import EvaluationCount

_CALIBRATION_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of an ablation."""

    training: Training
    """Name of the training."""
    penalty: str = ""
    """Name of the penalty; "" for none."""
    strength: float = 0.0
    """Weight of the penalty."""

    def __str__(self) -> str:
        penalty = f"{self.penalty} {self.strength:g}" if self.penalty else "none"
        return f"{self.training}, {penalty}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Nats and evaluations of a trained flow at held-out rows."""

    run: Run
    """The training."""
    log_prob: list[float] = field(default_factory=list)
    """Log-density of each held-out row in nats."""
    evaluations: float = 0.0
    """Evaluations of the field that a held-out row takes on average, at the stated accuracy;
    0 after a failure."""
    adaptive_evaluations: int = 0
    """Evaluations of one adaptive solve of all held-out rows, by dopri5 at a tolerance of 1e-5."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """Mean cost of the path of a held-out row, by penalty."""
    seconds: float = 0.0
    """CPU time of the training in seconds; of matching too."""
    failure: str | None = None
    """Why training or calibration failed; None if they did not."""


@contextmanager
def count_rows(flow: Flow) -> Iterator[EvaluationCount]:
    """Count the evaluations of every vector field in a flow, each once for each of its rows."""
    count = EvaluationCount()

    def add(_: object, inputs: tuple[Tensor, Tensor, object]) -> None:
        count.value += inputs[1].shape[:-1].numel()

    fields = [part for part in flow.modules() if isinstance(part, VectorField)]
    handles = [field.register_forward_pre_hook(add) for field in fields]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(
    run: Run,
    flow: Flow,
    rows: TableRows,
    held_out: TableRows,
    penalties: Mapping[str, CostRate],
    *,
    accuracy: float,
    seconds: float,
) -> Outcome:
    """Calibrate a flow for training rows, in place, and measure it at held-out rows.

    Raises:
        ODEError: If the accuracy is out of reach.
    """
    some = rows.take(slice(_CALIBRATION_ROWS))
    flow.calibrate(some.x, some.context, accuracy=accuracy)
    with count_rows(flow) as by_row:
        log_prob = flow.log_prob(held_out.x, held_out.context)
    adaptive_solver = ODESolver(rtol=1e-5, atol=1e-5, error_norm="points_and_ladj")
    with count_evaluations(flow) as adaptive:
        flow.using(solver=adaptive_solver).log_prob(held_out.x, held_out.context)
    *_, costs = flow.transforms.to_base_with_costs(
        held_out.x, held_out.context, regularizers=list(penalties.values())
    )
    return Outcome(
        run=run,
        log_prob=log_prob.tolist(),
        evaluations=by_row.value / len(held_out.x),
        adaptive_evaluations=adaptive.value,
        costs=dict(zip(penalties, costs.mean(-1).tolist(), strict=True)),
        seconds=seconds,
    )
