"""Potential vector field: minus the gradient of a potential."""

from typing import cast

import torch
from torch import Tensor, nn

from cnf._checks import check_choice, check_count
from cnf._shapes import Context, Rows, Times, Values
from cnf.vector_fields.activations import ACTIVATIONS, ANTIDERIVATIVES
from cnf.vector_fields.base import VectorField
from cnf.vector_fields.conditioning import ContextScaling, beside, scaled_context
from cnf.vector_fields.jacobian.affine_map import AffineMap
from cnf.vector_fields.jacobian.autograd import derivative_along
from cnf.vector_fields.layers import LAYERS
from cnf.vector_fields.settings import check_frequency

_CONDITIONER_WIDTH = 32


class PotentialField(VectorField):
    r"""Irrotational vector field, minus the gradient of a scalar network: ``v = -∇Φ``.

    With a time-conditioned layer :math:`a = W x + b` (W and b depend on t and the context) and the
    antiderivative S of the activation s, the potential is

    .. math:: \Phi(t, x) = w^\top S(a) + \tfrac{g}{2} x^\top A x + u^\top x

    where a small network computes w, u and g from t and the context, and A is symmetric. Then

    .. math:: v = -W^\top (w \odot s(a)) - g A x - u, \qquad
        \nabla \cdot v = -\sum_j w_j \, s'(a_j) \, \|W_j\|^2 - g \, \mathrm{tr} A

    so that the divergence costs less than the velocity, in any dimension. (OT-Flow's network has
    further layers in S; its divergence takes a matrix product for each row and feature.) A new
    field is zero.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.
        hidden_features: Number of units.
        layer: Kind of the layer: a name in `cnf.vector_fields.layers.LAYERS`.
        activation: Activation of the velocity, "sin" or "tanh".
        frequency: Initial standard deviation of the weights of a sinusoidal layer; None for
            ``2 / sqrt(max(1, features - 1))``, which suits standardised data.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If an argument is out of range.

    References:
        Onken et al. (2021), OT-Flow: Fast and Accurate Continuous Normalizing Flows via Optimal
        Transport. https://arxiv.org/abs/2006.00104

    Example:
        >>> import torch
        >>> field = PotentialField(features=64)
        >>> t, x = torch.tensor(0.5), torch.zeros(3, 64)
        >>> velocity, divergence = field.velocity_and_divergence(t, x)
        >>> velocity.shape, divergence.shape
        (torch.Size([3, 64]), torch.Size([3]))
    """

    shares_times = True
    has_closed_form_divergence = True

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        *,
        hidden_features: int = 256,
        layer: str = "concatsquash",
        activation: str = "sin",
        frequency: float | None = None,
    ) -> None:
        super().__init__(features, context_features)
        self.hidden_features = check_count("hidden_features", hidden_features)
        self.layer = check_choice("layer", layer, LAYERS)
        self.activation = check_choice("activation", activation, ANTIDERIVATIVES)
        self.frequency = check_frequency(frequency, features, activation)
        self.units = LAYERS[layer](features, self.hidden_features, context_features)
        self.quadratic = nn.Parameter(torch.zeros(features, features))
        self.conditioner = nn.Sequential(
            nn.Linear(1 + context_features, _CONDITIONER_WIDTH),
            nn.SiLU(),
            nn.Linear(_CONDITIONER_WIDTH, self.hidden_features + features + 1),
        )
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)
        self._activation = ACTIVATIONS[activation]
        self._antiderivative = ANTIDERIVATIVES[activation]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights: torch's, or sinusoidal; w, u and A start at zero."""
        self.units.reset_parameters()
        if self.frequency is not None:
            self.units.reset_to_waves(self.frequency)
        first, _, last = cast("list[nn.Linear]", list(self.conditioner))
        first.reset_parameters()
        for zero in (self.quadratic, *last.parameters()):
            nn.init.zeros_(zero)

    def _velocity(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        units, (w, u, g) = self._parts(t, context)
        value = self._activation.value(units.value(x))
        return -_pulled_back(units, w, value) - self._linear(x, u, g)

    def potential(self, t: Times, x: Rows, context: Context | None = None) -> Values:
        """Return the potential Φ at `x`."""
        units, (w, u, g) = self._parts(t, context)
        waves = (w * self._antiderivative(units.value(x))).sum(-1)
        return waves + ((0.5 * g * self._curvature(x) + u) * x).sum(-1)

    def potential_rate(self, t: Times, x: Rows, context: Context | None = None) -> Values:
        """Return ∂Φ/∂t at `x`."""
        return derivative_along(
            lambda t: self.potential(t, x, context), (t,), (torch.ones_like(t),)
        )

    def _velocity_and_products(
        self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        units, (w, u, g) = self._parts(t, context)
        value, slope = self._activation.value_and_slope(units.value(x))
        bent = _pulled_back(units, w, slope * units.tangent(probes))
        velocity = -_pulled_back(units, w, value) - self._linear(x, u, g)
        return velocity, -bent - g * self._curvature(probes)

    def _velocity_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        units, (w, u, g) = self._parts(t, context)
        value, slope = self._activation.value_and_slope(units.value(x))
        norms = units.weight.square().sum(-1)
        if units.gate is not None:
            norms = norms * units.gate.square()
        velocity = -_pulled_back(units, w, value) - self._linear(x, u, g)
        curvature = _weighted_sum(slope, w * norms) + g.squeeze(-1) * self.quadratic.trace()
        return velocity, -curvature

    def _parts(
        self, t: Tensor, context: Tensor | None
    ) -> tuple[AffineMap, tuple[Tensor, Tensor, Tensor]]:
        """Return the layer, and w, u and g, at one time and context."""
        context = scaled_context(self, context)
        outputs = self.conditioner(beside(t.unsqueeze(-1), context))
        w, u, g = outputs.split([self.hidden_features, self.features, 1], -1)
        # The gradient of a wave grows with its frequency, and learning would start too fast.
        return self.units(t, context), (w / (self.frequency or 1.0), u, 1 + g)

    def _linear(self, x: Tensor, u: Tensor, g: Tensor) -> Tensor:
        if g.ndim == u.ndim == 1:  # the same for each row: cheaper on A than on every row
            return nn.functional.linear(x, g * self._symmetric(), u)
        return g * self._curvature(x) + u

    def _curvature(self, x: Tensor) -> Tensor:
        """Return A x, where A is the symmetric part of a matrix."""
        return x @ self._symmetric()

    def _symmetric(self) -> Tensor:
        return 0.5 * (self.quadratic + self.quadratic.T)


def _pulled_back(units: AffineMap, w: Tensor, y: Tensor) -> Tensor:
    """Return ``W^T (w * y)``; where rows share w, it scales the weight, which is cheaper."""
    if w.ndim == 1 and units.is_shared:
        return y @ (w.unsqueeze(-1) * units.weight)
    return units.cotangent(w * y)


def _weighted_sum(y: Tensor, weights: Tensor) -> Tensor:
    return y @ weights if weights.ndim == 1 else (y * weights).sum(-1)
