"""Loss of validation rows."""

import math
from typing import cast

import torch
from torch import Generator, nn

from cnf._checks import reference_tensor
from cnf._row_names import counted_from, rows_of_caller
from cnf.flows.flow import Flow
from cnf.objectives import Objective
from cnf.training.data import Batch, TrainingData
from cnf.training.distributed import Processes
from cnf.training.sampling import validation_draws

_ROWS = 8192


@torch.no_grad()
def validation_loss(kept: nn.Module, rows: TrainingData, processes: Processes) -> float:
    """Return the weighted mean of the loss of each row, over all processes.

    It is ``-flow.log_prob(x, context)`` in nats of a flow, and the loss of an `Objective` itself.
    The chunks, and their random numbers, are the same for any number of processes.
    """
    device = reference_tensor(kept).device
    chunks = torch.arange(len(rows)).tensor_split(math.ceil(len(rows) / _ROWS))

    def sums_of_chunks() -> tuple[float, float]:
        total, weights = 0.0, 0.0
        for number in processes.share(len(chunks)).tolist():
            batch = rows.take(chunks[number])
            generator = validation_draws(number, device)
            with rows_of_caller(counted_from(int(chunks[number][0]))):
                total += _sum_of_losses(kept, batch, generator)
            weights += len(batch.x) if batch.weight is None else batch.weight.double().sum().item()
        return total, weights

    total, weights = processes.sums(sums_of_chunks)
    if not weights > 0:
        raise ValueError(f"the weights of {rows.name} must not all be 0.")
    return total / weights


def _sum_of_losses(kept: nn.Module, batch: Batch, generator: Generator) -> float:
    x, context, weight, target = batch
    if isinstance(kept, Objective):
        loss = kept(x, context, target=target, weight=weight, generator=generator)
        return len(x) * float(loss)
    nll = -cast(Flow, kept).log_prob(x, context, generator=generator).double()
    return float((nll if weight is None else weight.double() * nll).sum())
