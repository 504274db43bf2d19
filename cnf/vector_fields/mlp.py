"""The fully connected vector field, with its divergence in closed form."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from cnf._checks import check_count
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.affine import AffineMap
from cnf.vector_fields.base import VectorField
from cnf.vector_fields.layers import LAYERS, TimeLinear

_CLOSED_FORM_DEPTH = 2


class MLPField(VectorField):
    r"""Multi-layer perceptron conditioned on time and context.

    With :math:`v = W_3 s_2(W_2 s_1(W_1 x + b_1) + b_2) + b_3`, biases (and gates, which scale rows
    of the weights) that depend on t and the context only, the divergence is, for each row,

    .. math:: \nabla \cdot v = s_2'(a_2)^\top \, (W_2 \odot (W_1 W_3)^\top) \, s_1'(a_1)

    with the pre-activations :math:`a_i`: one product more than the velocity takes, in any
    dimension. With one hidden layer it is :math:`\sum_j s_1'(a_1)_j (W_1 W_2)_{jj}`. Deeper
    networks carry tangents forward beside the values. Neither needs a second backward pass in
    training.

    Where rows differ in t, so do the weights of some layers and the gate of an output layer; the
    divergence then falls back on one product for each feature.

    The output layer starts at zero, so that a new field is at rest and a new flow the identity.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.
        hidden_features: Widths of the hidden layers.
        layer: Kind of every layer: a name in `cnf.vector_fields.layers.LAYERS`.
        activation: Name in `cnf.vector_fields.activations.ACTIVATIONS`, for all hidden layers, or
            one name for each; None for "sin" in the first and "silu" in the others.
        frequency: Initial standard deviation of the input weights of a sinusoidal first layer;
            None for ``4 / sqrt(max(1, features - 1))``, which suits standardised data.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size, name or the frequency is out of range.

    References:
        Grathwohl et al. (2019), FFJORD, https://arxiv.org/abs/1810.01367, for the layers.
        Sitzmann et al. (2020), Implicit Neural Representations with Periodic Activation
        Functions, https://arxiv.org/abs/2006.09661, for the sinusoidal layer.

    Example:
        >>> import torch
        >>> field = MLPField(features=64, hidden_features=(256, 256))
        >>> t, x = torch.tensor(0.5), torch.zeros(3, 64)
        >>> velocity, divergence = field.velocity_and_divergence(t, x)
        >>> velocity.shape, divergence.shape
        (torch.Size([3, 64]), torch.Size([3]))
    """

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        *,
        hidden_features: Sequence[int] = (128, 128),
        layer: str = "concatsquash",
        activation: str | Sequence[str] | None = None,
        frequency: float | None = None,
    ) -> None:
        super().__init__(features, context_features)
        self.hidden_features = _check_widths(hidden_features)
        self.layer = check_name("layer", layer, LAYERS)
        self.activation = _check_activations(activation, len(self.hidden_features))
        self.frequency = check_frequency(frequency, features, self.activation[0])
        widths = (self.features, *self.hidden_features, self.features)
        last = len(widths) - 2
        self.layers = nn.ModuleList(
            LAYERS[layer](inputs, outputs, context_features, gate_context=i != last)
            for i, (inputs, outputs) in enumerate(itertools.pairwise(widths))
        )
        self._activations = [ACTIVATIONS[name] for name in self.activation]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights: torch's, but for a sinusoidal first layer and the last."""
        layers = cast("list[TimeLinear]", list(self.layers))
        for layer in layers:
            layer.reset_parameters()
        if self.frequency is not None:
            layers[0].reset_to_waves(self.frequency)
        layers[-1].reset_to_zero()

    def forward(
        self,
        t: Float[Tensor, "*t_batch"],
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> Float[Tensor, "*batch features"]:
        """Velocity at `x`."""
        *hidden, output = self._affine_maps(t, context)
        for affine, activation in zip(hidden, self._activations, strict=True):
            x = activation.value(affine.value(x))
        return output.value(x)

    @property
    def has_closed_form_divergence(self) -> bool:
        """True with one or two hidden layers."""
        return len(self.hidden_features) <= _CLOSED_FORM_DEPTH

    def velocity_and_products(
        self,
        t: Float[Tensor, "*t_batch"],
        x: Float[Tensor, "*batch features"],
        probes: Float[Tensor, "probes *batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "probes *batch features"]]:
        """Velocity and J p for each probe p, carried forward beside the values."""
        self._announce_evaluation(t, x, context)
        *hidden, output = self._affine_maps(t, context)
        for affine, activation in zip(hidden, self._activations, strict=True):
            x, slope = activation.value_and_slope(affine.value(x))
            probes = slope * affine.tangent(probes)
        return output.value(x), output.tangent(probes)

    def velocity_and_divergence(
        self,
        t: Float[Tensor, "*t_batch"],
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "*batch"]]:
        """Velocity and its exact divergence, in closed form with one or two hidden layers."""
        *hidden, output = self._affine_maps(t, context)
        if not self._can_use_closed_form(hidden, output):
            return super().velocity_and_divergence(t, x, context)
        self._announce_evaluation(t, x, context)
        slopes = []
        for affine, activation in zip(hidden, self._activations, strict=True):
            x, slope = activation.value_and_slope(affine.value(x))
            slopes.append(slope if affine.gate is None else slope * affine.gate)
        return output.value(x), _divergence(hidden, output, slopes)

    def _can_use_closed_form(self, hidden: list[AffineMap], output: AffineMap) -> bool:
        return (
            self.has_closed_form_divergence
            and output.is_shared
            and all(affine.weight.ndim == 2 for affine in hidden)
        )

    def _affine_maps(self, t: Tensor, context: Tensor | None) -> list[AffineMap]:
        return [layer(t, context) for layer in self.layers]


def _divergence(hidden: list[AffineMap], output: AffineMap, slopes: list[Tensor]) -> Tensor:
    """The formula of `MLPField`; `slopes` are the derivatives of the activations times gates."""
    if len(hidden) == 1:
        return slopes[0] @ (output.weight.T * hidden[0].weight).sum(-1)
    coupling = hidden[1].weight * (output.weight.T @ hidden[0].weight.T)
    return (slopes[1] * (slopes[0] @ coupling.T)).sum(-1)


def _check_widths(hidden_features: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(hidden_features, Sequence):
        raise TypeError(
            f"hidden_features must be widths such as (128, 128); got {hidden_features!r}."
        )
    if not hidden_features:
        raise ValueError("hidden_features must name at least one hidden layer; got ().")
    return tuple(check_count("each of hidden_features", width) for width in hidden_features)


def check_name(argument: str, name: str, known: Mapping[str, object]) -> str:
    """Refuse a name that is not known."""
    if name not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}; got {name!r}.")
    return name


def _check_activations(activation: str | Sequence[str] | None, depth: int) -> tuple[str, ...]:
    if activation is None:
        return ("sin", *("silu",) * (depth - 1))
    if not isinstance(activation, str | Sequence):
        raise TypeError(f"activation must be a name, or names; got {activation!r}.")
    names = (activation,) * depth if isinstance(activation, str) else tuple(activation)
    if len(names) != depth:
        raise ValueError(
            f"activation must be one name, or one for each of the {depth} hidden layers; "
            f"got {len(names)} names."
        )
    for name in names:
        check_name("activation", name, ACTIVATIONS)
    return names


def check_frequency(frequency: float | None, features: int, activation: str) -> float | None:
    """The initial scale of a first layer; None if it is not sinusoidal."""
    if activation != "sin":
        if frequency is not None:
            raise ValueError(
                "frequency is the scale of a sinusoidal first layer; leave it out with the "
                f"activation {activation!r}; got {frequency}."
            )
        return None
    if frequency is None:
        return 4.0 / math.sqrt(max(1, features - 1))
    if not 0 < frequency < math.inf:
        raise ValueError(f"frequency must be positive and finite; got {frequency}.")
    return float(frequency)
