"""Choice between a trained flow and a Gaussian mixture, by held-out rows."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.bases import GaussianMixtureBase, StandardNormal
from cnf.flows.calibration import is_by_hand
from cnf.flows.flow import Flow
from cnf.ode import ODESolver
from cnf.vector_fields import MLPField

_ERRORS = 2.0
"""Standard errors by which a flow must be better than the mixture to be kept."""
_TIE = 0.01
"""Nats by which it may be worse all the same: many rows show that the two are as good."""
_LEAST_COMPARED = 5
"""Held-out rows by which the two densities can be compared."""
_LEAST_ROWS = 10
"""Rows, by weight, for a mixture."""
_FEW_ROWS = 50
"""Rows too few for a flow, if no comparison says otherwise."""


class WeightedRows(NamedTuple):
    """Rows ``(rows, features)``, and their weights if there are any."""

    x: Tensor
    weight: Tensor | None = None


@functools.cache  # and not when imported: it loads torchdiffeq
def solver_of_a_mixture() -> ODESolver:
    """Return the solver of a flow that became a mixture.

    It takes one step for a field of zero, and is precise if the field is trained further: narrow
    components have large gradients of their log-density.
    """
    return ODESolver(rtol=1e-5, atol=1e-5, first_step=1.0)


@torch.no_grad()
def become_mixture_if_better(
    flow: Flow, rows: WeightedRows, held_out: WeightedRows | None, *, refit: bool
) -> None:
    """Give a flow a `GaussianMixtureBase` and a zero field, unless it is better by held-out rows.

    Only an unconditional flow is exchanged that ends in an `MLPField` and a standard normal, behind
    bijections of vectors. The mixture is of the rows where the ODE starts. It is compared with the
    flow by the held-out rows, without which it was fitted. The flow stays if its mean log-density
    is higher by two standard errors of the difference, less 0.01 nats. With less than five held-out
    rows, it stays if there are 50 rows; and in any case if there are less than 10, by weight.

    Args:
        flow: A trained flow.
        rows: Training rows.
        held_out: Rows that the flow was not trained on, or None.
        refit: Whether a mixture that wins is fitted to the held-out rows too.
    """
    ode = flow.only_ode
    if ode is None or not _is_exchangeable(flow) or not isinstance(ode.vector_field, MLPField):
        return
    before = flow.transforms[:-1]
    z, weight = before.to_base(rows.x), rows.weight
    compared = held_out is not None and len(held_out.x) >= _LEAST_COMPARED
    if _effective_rows(rows) < _LEAST_ROWS or not (compared or len(z) < _FEW_ROWS):
        return
    mixture = GaussianMixtureBase.from_data(z, weight=weight)
    if held_out is not None:
        others, ladj = before.to_base_and_ladj(held_out.x)
        gain = flow.log_prob(held_out.x) - ladj - mixture.log_prob(others)
        if compared and _is_better(gain.double(), held_out.weight):
            return
        if refit:
            weights = [part for part in (weight, held_out.weight) if part is not None]
            weight = torch.cat(weights) if len(weights) == 2 else None
            mixture = _refitted(mixture, torch.cat([z, others]), weight)
    flow.base = mixture
    ode.vector_field.zero_()
    if not is_by_hand(ode.solver):
        ode.solver = solver_of_a_mixture()


def _refitted(
    mixture: GaussianMixtureBase, z: Tensor, weight: Tensor | None
) -> GaussianMixtureBase:
    """Return the mixture fitted to more rows, unless this finds a worse maximum."""
    again = GaussianMixtureBase.from_data(z, weight=weight)
    share = torch.ones_like(z[:, 0]) if weight is None else weight.to(z)
    gain = again.log_prob(z) - mixture.log_prob(z)
    return again if float(share @ gain) >= 0 else mixture


def _is_exchangeable(flow: Flow) -> bool:
    return (
        flow.transforms[-1] is flow.only_ode
        and isinstance(flow.base, StandardNormal)
        and all(part.is_bijective for part in flow.transforms)
        and flow.context_features == 0
        and len(flow.event_shape) == 1
    )


def _effective_rows(rows: WeightedRows) -> float:
    if rows.weight is None:
        return len(rows.x)
    share = rows.weight.double() / rows.weight.max()
    return float(share.sum().square() / share.square().sum())


def _is_better(gain: Tensor, weight: Tensor | None) -> bool:
    """Return whether the mean gain of the flow is positive by its standard errors, or a tie."""
    share = torch.ones_like(gain) if weight is None else weight.to(gain)
    share = share / share.sum()
    mean = share @ gain
    error = (share.square() @ (gain - mean).square()).sqrt()
    return bool(mean > _ERRORS * error - _TIE)
