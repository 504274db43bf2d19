"""The negative log-likelihood of held-out rows."""

import torch

from cnf._checks import reference_tensor
from cnf.flow import Flow
from cnf.training.processes import Processes
from cnf.training.randomness import validation_draws
from cnf.training.rows import Rows

_ROWS = 8192


@torch.no_grad()
def negative_log_likelihood(flow: Flow, rows: Rows, processes: Processes) -> float:
    """Weighted mean of ``-flow.log_prob(x, context)``, in nats, in chunks shared by the processes.

    Raises:
        ODEError: If a solve fails.
    """
    generator = validation_draws(processes.rank, reference_tensor(flow).device)

    def of_share() -> tuple[float, float]:
        total, weights = 0.0, 0.0
        for chunk in processes.share(len(rows)).split(_ROWS):
            if len(chunk):
                (x, context), weight = rows.take(chunk)
                nll = -flow.log_prob(x, context, generator=generator).double()
                weight = torch.ones_like(nll) if weight is None else weight.double()
                total += (weight * nll).sum().item()
                weights += weight.sum().item()
        return total, weights

    total, weights = processes.sums(of_share)
    return total / weights
