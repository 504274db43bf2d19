"""Residual vector field, for deep networks."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from cnf._checks import check_choice, check_count
from cnf._shapes import Context, Rows, Times
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.conditioning import ContextScaling, scaled_context, waves_and_context
from cnf.vector_fields.layers import LAYERS, reset_layers
from cnf.vector_fields.settings import check_activations, check_frequency, check_time_features
from cnf.vector_fields.staged import Activated, LayeredField, Stage, Tangent, applied, linearised


class ResidualField(LayeredField):
    r"""Residual network conditioned on time and context, for fields deeper than an `MLPField`.

    .. math:: h_0 = s_0(W_0 x + b_0), \quad h_{k+1} = h_k + W_k' s(W_k h_k + b_k) + b_k',
        \quad v = W h + b

    where biases (and gates, which scale rows of the weights) depend on t and the context. Jacobian
    products are computed forward with the values; the divergence has no closed form.

    The output layer starts at zero, so that a new field is zero and a new flow the identity.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.
        hidden_features: Width of h and of the inside of each block.
        blocks: Number of blocks, of two layers each.
        layer: Kind of every layer: a name in `cnf.vector_fields.layers.LAYERS`.
        activation: Name in `cnf.vector_fields.activations.ACTIVATIONS`, or one name for the input
            layer and one for the blocks; None for "sin" and "silu".
        frequency: Initial scale of a sinusoidal input layer; see `MLPField`.
        time_features: Number of waves of time; see `MLPField`.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If an argument is out of range, or `time_features` not 0 for the layer "ignore".

    References:
        He et al. (2016), Deep Residual Learning for Image Recognition.
        https://arxiv.org/abs/1512.03385

    Example:
        >>> import torch
        >>> field = ResidualField(features=8, hidden_features=32, blocks=3)
        >>> field(torch.tensor(0.5), torch.zeros(3, 8)).shape
        torch.Size([3, 8])
    """

    shares_times = True

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        *,
        hidden_features: int = 128,
        blocks: int = 2,
        layer: str = "concatsquash",
        activation: str | Sequence[str] | None = None,
        frequency: float | None = None,
        time_features: int = 0,
    ) -> None:
        super().__init__(features, context_features)
        self.hidden_features = check_count("hidden_features", hidden_features)
        self.blocks = check_count("blocks", blocks)
        self.layer = check_choice("layer", layer, LAYERS)
        self.activation = check_activations(activation, 2, "kinds of layer, input and block")
        self.frequency = check_frequency(frequency, features, self.activation[0])
        self.time_features = check_time_features(time_features, layer)
        width, conditions = self.hidden_features, self.context_features + 2 * self.time_features
        sizes = itertools.chain(
            [(self.features, width)],
            itertools.repeat((width, width), 2 * self.blocks),
            [(width, self.features)],
        )
        self.layers = nn.ModuleList(
            LAYERS[layer](inputs, outputs, conditions) for inputs, outputs in sizes
        )
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights: see `cnf.vector_fields.layers.reset_layers`."""
        reset_layers(self.layers, self.frequency)

    def stages(self, t: Times, x: Rows, context: Context | None) -> list[Stage]:
        """Return the input layer, the blocks and the output layer."""
        conditions = waves_and_context(t, scaled_context(self, context), self.time_features)
        first, *inner, output = [layer(t, conditions) for layer in self.layers]
        at_input, in_blocks = (ACTIVATIONS[name] for name in self.activation)
        blocks = zip(inner[::2], inner[1::2], strict=True)
        return [
            Activated(first, at_input),
            *(Residual((Activated(enter, in_blocks), leave)) for enter, leave in blocks),
            output,
        ]

    @property
    def inner_widths(self) -> tuple[int, ...]:
        """Width of h, after the input layer and after each block."""
        return (self.hidden_features,) * (1 + self.blocks)


class Residual(NamedTuple):
    """Residual block: the identity plus a sequence of stages."""

    inner: tuple[Stage, ...]

    def value(self, x: Tensor) -> Tensor:
        """Return the map of `x`."""
        change = x
        for stage in self.inner:
            change = stage.value(change)
        return x + change

    def linearised(self, x: Tensor) -> tuple[Tensor, Tangent]:
        """Return the map of `x`, and its derivative there."""
        change, tangents = linearised(self.inner, x)
        return x + change, lambda dx: dx + applied(tangents, dx)
