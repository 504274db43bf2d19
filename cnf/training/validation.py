"""Negative log-likelihood of validation rows."""

import math

import torch

from cnf._checks import reference_tensor
from cnf._row_names import counted_from, rows_of_caller
from cnf.flows.flow import Flow
from cnf.training.data import TrainingData
from cnf.training.distributed import Processes
from cnf.training.sampling import validation_draws

_ROWS = 8192


@torch.no_grad()
def negative_log_likelihood(flow: Flow, rows: TrainingData, processes: Processes) -> float:
    """Return the weighted mean of ``-flow.log_prob(x, context)`` in nats, over all processes.

    The chunks, and their random numbers, are the same for any number of processes.
    """
    device = reference_tensor(flow).device
    chunks = torch.arange(len(rows)).tensor_split(math.ceil(len(rows) / _ROWS))

    def sums_of_chunks() -> tuple[float, float]:
        total, weights = 0.0, 0.0
        for number in processes.share(len(chunks)).tolist():
            x, context, weight = rows.take(chunks[number])
            generator = validation_draws(number, device)
            with rows_of_caller(counted_from(int(chunks[number][0]))):
                nll = -flow.log_prob(x, context, generator=generator).double()
            weight = torch.ones_like(nll) if weight is None else weight.double()
            total += (weight * nll).sum().item()
            weights += weight.sum().item()
        return total, weights

    total, weights = processes.sums(sums_of_chunks)
    if not weights > 0:
        raise ValueError(f"the weights of {rows.name} must not all be 0.")
    return total / weights
