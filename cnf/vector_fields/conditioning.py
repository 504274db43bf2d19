"""Conditioning of layers: time, its Fourier features, and the scaled context."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cnf._moments import column_moments
from cnf._shapes import Context, Times
from cnf._warnings import warn


class ContextScaling(nn.Module):
    """Standardisation of the context: mean 0 and standard deviation 1 over the training rows.

    The identity until `initialize` sets it, once. Each conditional module with layers holds one as
    its `context_scaling`, where `Transform.initialize` finds it.

    Args:
        context_features: Size of the context, at least 1.
    """

    def __init__(self, context_features: int) -> None:
        super().__init__()
        self.context_features = context_features
        self.register_buffer("mean", torch.zeros(context_features))
        self.register_buffer("log_std", torch.zeros(context_features))
        self.register_buffer("is_initialized", torch.zeros((), dtype=torch.bool))
        self.mean: Tensor
        self.log_std: Tensor
        self.is_initialized: Tensor

    def forward(self, context: Context) -> Context:
        """Return the scaled context."""
        return (context - self.mean) * (-self.log_std).exp()

    @property
    def needs_initialization(self) -> bool:
        """Whether mean and standard deviation are not yet set."""
        return not self.is_initialized

    @torch.no_grad()
    def initialize(
        self, context: Context | None, weight: Float[Tensor, " rows"] | None = None
    ) -> None:
        """Set mean and standard deviation from these rows, once; each row has a `weight`.

        A constant column keeps the scale 1, with a warning.

        Raises:
            ValueError: If the dtype of the context cannot hold the spread of a column.
        """
        if context is None or not self.needs_initialization:
            return
        rows = context.reshape(-1, self.context_features)
        mean, std = (
            column_moments("context", rows, weight) if len(rows) > 1 else (rows[0], 0 * rows[0])
        )
        constant = (std == 0).nonzero().flatten().tolist()
        if constant:
            warn(
                f"context is constant over the training rows in column {constant}: the density "
                "cannot be learnt to depend on it, and other values have no meaning there. "
                "Drop the column."
            )
        self.set(mean, std.where(std > 0, 1.0))

    @torch.no_grad()
    def set(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation, each ``(context_features,)``."""
        self.mean.copy_(mean)
        self.log_std.copy_(std.log())
        self.is_initialized.fill_(True)

    def keep_identity(self) -> None:
        """Stay the identity if not yet initialised."""
        if self.needs_initialization:
            self.is_initialized.fill_(True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # State dicts from before scalings existed have none of these names; a part is an error.
        names = ("mean", "log_std", "is_initialized")
        if not any(f"{prefix}{name}" in state_dict for name in names):
            for name in names:
                state_dict[f"{prefix}{name}"] = torch.zeros_like(getattr(self, name))
            state_dict[f"{prefix}is_initialized"].fill_(True)
        super()._load_from_state_dict(state_dict, prefix, *args)


def scaled_context(module: nn.Module, context: Context | None) -> Context | None:
    """Return the context scaled by the `context_scaling` of a module, if it holds one.

    A module without context holds none, nor does one pickled before scalings existed.
    """
    scaling: ContextScaling | None = getattr(module, "context_scaling", None)
    return context if context is None or scaling is None else scaling(context)


def context_scalings(module: nn.Module) -> list[ContextScaling]:
    """Return the scalings of the context in a module and its parts."""
    return [part for part in module.modules() if isinstance(part, ContextScaling)]


def waves_and_context(
    t: Times, context: Context | None, waves: int
) -> Float[Tensor, "*batch inputs"] | None:
    """Concatenate ``sin(pi k t)`` and ``cos(pi k t)`` for k = 1 … `waves`, and the context.

    Half-waves, so that the two ends of time differ. With 0 waves this is the context itself.
    """
    if waves == 0:
        return context
    k = torch.arange(1, waves + 1, dtype=t.dtype, device=t.device)
    angles = math.pi * t.unsqueeze(-1) * k
    return beside(torch.cat([angles.sin(), angles.cos()], -1), context)


def beside(first: Tensor, second: Tensor | None) -> Tensor:
    """Concatenate two tensors along the last axis; their batch axes broadcast."""
    if second is None:
        return first
    if first.ndim == second.ndim == 1:  # the usual case, made fast
        return torch.cat([first, second])
    batch = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in (first, second)], -1)
