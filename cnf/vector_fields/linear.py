"""Linear vector field, with a closed-form flow."""

import torch
from torch import Tensor, nn

from cnf._shapes import Context, Rows, Values
from cnf.vector_fields.base import VectorField
from cnf.vector_fields.conditioning import ContextScaling, scaled_context


class LinearField(VectorField):
    """Linear vector field ``A x + b + C c``, constant in time: a fast Gaussian flow.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range.

    Example:
        >>> field = LinearField(features=1)
        >>> _ = torch.nn.init.constant_(field.weight, 2.0)
        >>> x, ladj = field.solution(torch.ones(1), start=0.0, end=1.0)
        >>> ladj
        tensor(2., grad_fn=<ExpandBackward0>)
    """

    has_closed_form_divergence = True

    def __init__(self, features: int, context_features: int = 0) -> None:
        super().__init__(features, context_features)
        self.weight = nn.Parameter(torch.zeros(features, features))
        self.bias = nn.Parameter(torch.zeros(features))
        if context_features:
            self.context_weight = nn.Parameter(torch.zeros(features, context_features))
            self.context_scaling = ContextScaling(context_features)

    def _velocity(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        return x @ self.weight.T + self._offset(context)

    def _velocity_and_products(
        self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._velocity(t, x, context), probes @ self.weight.T

    def _velocity_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        velocity = self._velocity(t, x, context)
        return velocity, self.weight.trace().expand(velocity.shape[:-1])

    def solution(
        self, x: Rows, context: Context | None = None, *, start: float, end: float
    ) -> tuple[Rows, Values]:
        r"""Return the exact solution at `end` from `x` at `start`, and its exact ladj.

        With h = end - start, the state is :math:`e^{hA} x + \int_0^h e^{sA} ds \, (b + C c)` and
        the ladj :math:`h \, \mathrm{tr} A`.
        """
        duration = end - start
        d = self.features
        block = torch.zeros(2 * d, 2 * d, dtype=x.dtype, device=x.device)
        block[:d, :d] = self.weight
        block[:d, d:] = torch.eye(d, dtype=x.dtype, device=x.device)
        exponential = torch.linalg.matrix_exp(duration * block)
        propagator, integral = exponential[:d, :d], exponential[:d, d:]
        moved = x @ propagator.T + self._offset(context) @ integral.T
        return moved, (duration * self.weight.trace()).expand(x.shape[:-1])

    def _offset(self, context: Tensor | None) -> Tensor:
        context = scaled_context(self, context)
        return self.bias if context is None else self.bias + context @ self.context_weight.T
