"""Unnormalised target densities that a user gives."""

from collections.abc import Callable

import torch
from torch import Tensor

from cnf._row_names import name_rows


class TargetError(ValueError):
    """The log-density of a target is not finite at draws of the flow."""


def log_density_of_target(
    log_density: Callable[..., Tensor],
    x: Tensor,
    context: Tensor | None,
    batch: torch.Size,
    *,
    name: str = "log_density",
) -> Tensor:
    """Return the log-density of a target at points of this batch shape; messages name it.

    Raises:
        TypeError: If the result is no tensor.
        ValueError: If it has another shape.
        TargetError: If it is NaN or inf.
    """
    given = () if context is None else (context.expand(*batch, context.shape[-1]),)
    # A network may be coarse in training; the target may not.
    with torch.autocast(x.device.type, enabled=False):
        value = log_density(x, *given)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a tensor; got {type(value).__name__}.")
    if value.shape != batch:
        raise ValueError(
            f"{name} must return shape {tuple(batch)} for x of shape {tuple(x.shape)}; got "
            f"{tuple(value.shape)}."
        )
    found = value.detach()
    refuse_targets(found.isnan() | found.isposinf(), "finite or -inf", name=name)
    return value


def refuse_targets(bad: Tensor, expected: str, *, name: str = "log_density") -> None:
    """Raise a TargetError that names the points of a mask, if there are any."""
    if bad.any():
        raise TargetError(
            f"{name} must be {expected} at every point; got other values in {name_rows(bad)}. If "
            "it has bounded support, put a transform such as Logit first in the flow, so that its "
            "draws lie inside."
        )
