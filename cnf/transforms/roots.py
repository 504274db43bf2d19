"""Root finding for increasing functions, for inverses without a closed form."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cnf._shapes import Values


def increasing_root(
    value_and_slope: Callable[[Tensor], tuple[Tensor, Tensor]], low: Values, high: Values
) -> Values:
    """Return the root of each of many increasing functions, to round-off and with its gradient.

    Bisection, one step for each digit of the dtype, then a Newton step. Only the Newton step is
    differentiated: at a root it has the gradient of the implicit function. Its second derivatives
    are wrong.

    Args:
        value_and_slope: Returns the functions and their derivatives, at one point for each.
        low: Points at or below the roots.
        high: Points at or above the roots.

    Example:
        >>> target = torch.tensor([1.0, 8.0], requires_grad=True)
        >>> root = increasing_root(
        ...     lambda x: (x**3 - target, 3 * x**2), torch.zeros(2), target.detach()
        ... )
        >>> root.sum().backward()
        >>> target.grad
        tensor([0.3333, 0.0833])
    """
    with torch.no_grad():
        for _ in range(math.ceil(-math.log2(torch.finfo(low.dtype).eps))):
            middle = low / 2 + high / 2  # low + high might overflow
            is_below = value_and_slope(middle)[0] < 0
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        root = low / 2 + high / 2
    value, slope = value_and_slope(root)
    return root - value / slope
