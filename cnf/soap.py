"""SOAP, an optimiser for regressions by small networks."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnf._checks import check_number, is_positive

_DECAY = 0.95
_EPSILON = 1e-8
_STEPS_OF_A_BASIS = 10
_LARGEST_SIDE = 256
_DAMPING = 0.01


class SOAP(Optimizer):
    r"""SOAP: Adam in the eigenbases of Shampoo's preconditioner.

    A weight counts as a matrix, its first side by all others. With moving averages L of
    :math:`G G^T` and R of :math:`G^T G` for its gradients G, and bases :math:`Q_L, Q_R` of their
    eigenvectors, Adam is applied to :math:`Q_L^T G Q_R`. The decay of all averages is 0.95. Every
    ten steps each basis takes a step of power iteration. A side of more than 256 entries keeps its
    axes; vectors, and matrices of one row or column, are optimised by Adam.

    The bases start as the axes, and before a step of power iteration a diagonal that falls evenly
    to 0, from 0.01 times the mean of the diagonal of L, is added to L, and likewise to R. In the
    paper the bases start as eigenvectors for the first gradient. These matrices are nearly
    singular, so rounding would choose the eigenvectors, and what is learnt would depend on units.

    A step costs more than one of Adam, so it pays for small networks and large minibatches.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.

    Raises:
        TypeError: If `lr` is not a number.
        ValueError: If `lr` is not positive and finite.

    References:
        Vyas et al. (2025), SOAP: Improving and Stabilizing Shampoo using Adam, Algorithm 3.
        https://arxiv.org/abs/2409.11321

    Example:
        >>> weight = nn.Parameter(torch.ones(3, 2))
        >>> optimizer = SOAP([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight[0, 0].item()
        0.8999...
    """

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": check_number("lr", lr, "positive and finite", is_positive)})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step; return the loss of a `closure`, which computes it and the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _step(parameter, parameter.grad, self.state[parameter], group["lr"])
        return loss


def _step(parameter: Tensor, gradient: Tensor, state: dict[str, Any], rate: float) -> None:
    """Take a step of one parameter."""
    # A vector is a row, whose sides keep their axes.
    gradient = gradient.reshape(len(gradient) if gradient.ndim > 1 else 1, -1)
    if not state:
        _start(state, gradient)
    state["step"] += 1
    state["mean"].lerp_(gradient, 1 - _DECAY)
    rotated = _rotate(gradient, *state["bases"])
    state["square"].mul_(_DECAY).addcmul_(rotated, rotated, value=1 - _DECAY)
    unbiased = 1 - _DECAY ** state["step"]
    scale = (state["square"] / unbiased).sqrt_().add_(_EPSILON)
    rows, columns = state["bases"]
    change = _rotate(_rotate(state["mean"], rows, columns) / scale, rows.T, columns.T)
    parameter.add_(change.reshape(parameter.shape), alpha=-rate / unbiased)
    for covariance, factor in zip(state["covariances"], (gradient, gradient.T), strict=True):
        if len(covariance):
            covariance.lerp_(factor @ factor.T, 1 - _DECAY)
    if state["step"] % _STEPS_OF_A_BASIS == 0:
        pairs = zip(state["covariances"], state["bases"], strict=True)
        state["bases"] = [_follow(covariance, basis) for covariance, basis in pairs]


def _start(state: dict[str, Any], gradient: Tensor) -> None:
    """Make the state before the first step; sides that keep their axes have empty matrices."""
    is_matrix = min(gradient.shape) > 1
    sides = [side if is_matrix and side <= _LARGEST_SIDE else 0 for side in gradient.shape]
    state["step"] = 0
    state["mean"] = torch.zeros_like(gradient)
    state["square"] = torch.zeros_like(gradient)
    state["covariances"] = [gradient.new_zeros(side, side) for side in sides]
    state["bases"] = [torch.eye(side).to(gradient) for side in sides]


def _rotate(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the coordinates of a matrix in the bases of its sides."""
    matrix = rows.T @ matrix if len(rows) else matrix
    return matrix @ columns if len(columns) else matrix


def _follow(covariance: Tensor, basis: Tensor) -> Tensor:
    """Return the basis after a step of power iteration."""
    if not len(basis):
        return basis
    axes = torch.linspace(1, 0, len(basis)).to(covariance)
    damped = covariance + torch.diag(_DAMPING * covariance.diagonal().mean() * axes)
    orthonormal: Tensor = torch.linalg.qr(damped @ basis).Q
    return orthonormal
