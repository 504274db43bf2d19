"""Jacobian products by autograd, in reverse and forward mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._checks import functions_are_transformed
from cnf._shapes import Rows


def standard_basis(x: Rows) -> Float[Tensor, "features *batch features"]:
    """Return the unit vectors as probes: one for each feature, the same for each row."""
    features = x.shape[-1]
    basis = torch.eye(features, dtype=x.dtype, device=x.device)
    return basis.view(features, *(1,) * (x.ndim - 1), features).expand(features, *x.shape)


def refuse_transformed_functions(what: str) -> None:
    """Raise a RuntimeError within `torch.func` or forward-mode differentiation."""
    if functions_are_transformed():
        raise RuntimeError(
            f"{what} cannot be computed within torch.func (vmap, jvp, ...) or forward-mode "
            "differentiation; call the flow on a batch of rows, and use torch.autograd.grad."
        )


def derivative_along(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], direction: tuple[Tensor, ...]
) -> Tensor:
    """Return the derivative of `function` in a direction of its inputs, by forward mode.

    Reverse mode twice would go through the whole graph behind `inputs` at each evaluation.
    """
    derivative: Tensor = torch.func.jvp(function, inputs, direction)[1]
    return derivative


def vector_jacobian_product(
    value: Tensor, x: Tensor, probe: Tensor, differentiable: bool
) -> Tensor:
    """Return the product of `probe` with the Jacobian of `value` in x; zero if independent."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (product,) = torch.autograd.grad(
        value, x, probe, create_graph=differentiable, retain_graph=True, allow_unused=True
    )
    return torch.zeros_like(x) if product is None else product


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave inference mode, with gradients still off, so that autograd works."""
    grad_enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad_enabled):
        yield


def usable_by_autograd(x: Tensor) -> Tensor:
    """Return a copy of a tensor made in inference mode, which autograd cannot save."""
    return x.clone() if x.is_inference() else x
