"""What functions with a hand-written backward pass share: when they serve, and their second order.

Each does what a plain formula does, with fewer operations. The formula serves in its place where
more than autograd looks on, and gives the derivatives of the backward pass.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def only_autograd_looks_on(x: Tensor) -> bool:
    """Whether no `torch.func`, forward-mode differentiation, autocast or compiler is at work."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled(x.device.type)
    )


def asks_for_more(cotangents: Sequence[Tensor]) -> bool:
    """Whether a backward pass that runs now is to be differentiated, or transformed, itself.

    With ``is_grads_batched=True`` the cotangents are tensors of a kind that few operations know.
    """
    return (
        torch.is_grad_enabled()
        or not only_autograd_looks_on(cotangents[0])
        or any(map(torch._C._functorch.is_legacy_batchedtensor, cotangents))
    )


def gradients_of_formula(
    formula: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """What a backward pass returns, by autograd through the formula: differentiable in turn."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: where an input depends on another, only its own share is asked for.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        values = formula(*views)
    pairs = [pair for pair in zip(values, cotangents, strict=True) if pair[0].requires_grad]
    found = iter(
        torch.autograd.grad(
            [value for value, _ in pairs],
            [view for view in views if view is not None and view.requires_grad],
            [cotangent for _, cotangent in pairs],
            create_graph=differentiable,
            allow_unused=True,
        )
    )
    return [next(found) if view is not None and view.requires_grad else None for view in views]
