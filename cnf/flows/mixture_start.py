"""Choice between a trained flow and a Gaussian mixture, by held-out rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from cnf.bases import GaussianMixtureBase, StandardNormal
from cnf.flows.calibration import has_solver_by_hand
from cnf.flows.flow import Flow
from cnf.ode import ODESolver
from cnf.vector_fields import MLPField

_ERRORS = 2.0
"""Standard errors by which a flow must be better than the mixture to be kept."""
_LEAST_ROWS = 5
"""Held-out rows by which the two densities can be compared."""


class WeightedRows(NamedTuple):
    """Rows ``(rows, features)``, and their weights if there are any."""

    x: Tensor
    weight: Tensor | None = None


@torch.no_grad()
def become_mixture_if_better(
    flow: Flow,
    rows: WeightedRows,
    held_out: WeightedRows | None,
    accuracy: float | None,
    *,
    refit: bool,
) -> None:
    """Give a flow a `GaussianMixtureBase` and a zero field, unless it is better by held-out rows.

    Only an unconditional flow is exchanged that ends in an `MLPField` and a standard normal, behind
    bijections of vectors. The mixture is of the rows where the ODE starts. It is compared with the
    flow by the held-out rows, without which it was fitted. The flow stays if its mean log-density
    is higher by two standard errors of the difference.

    Args:
        flow: A trained flow.
        rows: Training rows.
        held_out: Rows that the flow was not trained on; None or less than five for no comparison.
        accuracy: Accuracy of the solver that replaces a default one; None for no other solver.
        refit: Whether a mixture that wins is fitted to the held-out rows too.
    """
    ode = flow.only_ode
    if ode is None or not _is_exchangeable(flow) or not isinstance(ode.vector_field, MLPField):
        return
    before = flow.transforms[:-1]
    z, weight = before.to_base(rows.x), rows.weight
    mixture = GaussianMixtureBase.from_data(z, weight=weight)
    if held_out is not None:
        others, ladj = before.to_base_and_ladj(held_out.x)
        gain = flow.log_prob(held_out.x) - ladj - mixture.log_prob(others)
        if len(others) >= _LEAST_ROWS and _is_positive(gain.double(), held_out.weight):
            return
        if refit:
            weights = [part for part in (weight, held_out.weight) if part is not None]
            weight = torch.cat(weights) if len(weights) == 2 else None
            mixture = GaussianMixtureBase.from_data(torch.cat([z, others]), weight=weight)
    flow.base = mixture
    ode.vector_field.zero_()
    if accuracy is not None and not has_solver_by_hand(flow.transforms):
        ode.solver = ODESolver(
            method="rk4", times=(0.0, 0.5, 1.0), accuracy=accuracy, gradient=ode.solver.gradient
        )


def _is_exchangeable(flow: Flow) -> bool:
    return (
        flow.transforms[-1] is flow.only_ode
        and isinstance(flow.base, StandardNormal)
        and all(part.is_bijective for part in flow.transforms)
        and flow.context_features == 0
        and len(flow.event_shape) == 1
    )


def _is_positive(gain: Tensor, weight: Tensor | None) -> bool:
    """Return whether the mean is positive by more than its standard errors."""
    share = torch.ones_like(gain) if weight is None else weight.to(gain)
    share = share / share.sum()
    mean = share @ gain
    error = (share.square() @ (gain - mean).square()).sqrt()
    return bool(mean > _ERRORS * error)
