"""What the layers of a field are conditioned on: time, waves of it, and the context."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def time_and_context(
    t: Float[Tensor, "*t_batch"], context: Float[Tensor, "*c_batch context_features"] | None
) -> Float[Tensor, "*batch inputs"]:
    """Time and context side by side."""
    return _beside(t.unsqueeze(-1), context)


def waves_and_context(
    t: Float[Tensor, "*t_batch"],
    context: Float[Tensor, "*c_batch context_features"] | None,
    waves: int,
) -> Float[Tensor, "*batch inputs"] | None:
    """``sin(pi k t)`` and ``cos(pi k t)`` for k = 1 … `waves`, and the context, side by side.

    Half-waves, so that the two ends of time differ. With 0 waves this is the context itself.
    """
    if waves == 0:
        return context
    k = torch.arange(1, waves + 1, dtype=t.dtype, device=t.device)
    angles = math.pi * t.unsqueeze(-1) * k
    return _beside(torch.cat([angles.sin(), angles.cos()], -1), context)


def _beside(first: Tensor, second: Tensor | None) -> Tensor:
    """Both along the last axis; their batch axes broadcast."""
    if second is None:
        return first
    if first.ndim == second.ndim == 1:  # the usual case, made short
        return torch.cat([first, second])
    batch = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in (first, second)], -1)
