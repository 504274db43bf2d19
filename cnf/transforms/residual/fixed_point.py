"""Fixed-point iteration of contractions."""

import torch
from torch import Tensor

from cnf._row_names import name_rows
from cnf._shapes import Rows
from cnf.transforms.residual.spectral_layers import Map


def fixed_point(update: Map, start: Rows, *, coefficient: float, tolerance: float) -> Rows:
    r"""Return the fixed point ``x = update(x)`` of a contraction of rows.

    The iteration ends when the error of each row is proven to be at most `tolerance` times the sum
    of the norms of x and `start`, or as small as rounding allows.

    Args:
        update: The contraction.
        start: First iterate; its norm is part of the scale of errors.
        coefficient: Bound L of the Lipschitz constant of `update`, less than 1. The k-th step is
            then at most :math:`L^k` times the first, and the error after it at most
            L / (1 - L) times the step.
        tolerance: Largest relative error.

    Raises:
        RuntimeError: If the steps of a row shrink more slowly, or are not finite.
    """
    precision = max((1 - coefficient) * tolerance, 10 * torch.finfo(start.dtype).eps)
    before, x = start, update(start)
    longest = _norm(x - before)
    while True:
        step, allowed = _norm(x - before), precision * (_norm(x) + _norm(start))
        arrived = step <= allowed
        if arrived.all():
            return x
        # A contraction would have converged by now; the other half of `allowed` is for rounding.
        late = ~arrived & ~(longest > allowed / 2)
        if late.any():
            raise RuntimeError(
                "the fixed-point iteration of a ResidualFlow did not converge in "
                f"{name_rows(late)}. Either values are not finite, or the network is no "
                f"contraction with the coefficient {coefficient:.6g}."
            )
        before, x = x, update(x)
        longest = coefficient * longest


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm
