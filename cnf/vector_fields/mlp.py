"""Fully connected vector field, with a closed-form divergence."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnf._checks import check_choice, check_flag, check_widths
from cnf._shapes import Context, Rows, Times
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.conditioning import ContextScaling, scaled_context, waves_and_context
from cnf.vector_fields.jacobian.perceptron import Perceptron
from cnf.vector_fields.layers import LAYERS, make_zero, reset_layers
from cnf.vector_fields.settings import check_activations, check_frequency, check_time_features
from cnf.vector_fields.staged import LayeredField, Stage, bottleneck_products

_CLOSED_FORM_DEPTH = 2
_WAVES = 8


class MLPField(LayeredField):
    r"""Multi-layer perceptron conditioned on time and context.

    With :math:`v = W_3 s_2(W_2 s_1(W_1 x + b_1) + b_2) + b_3`, biases (and gates, which scale rows
    of the weights) that depend on t and the context only, the divergence is, for each row,

    .. math:: \nabla \cdot v = s_2'(a_2)^\top \, (W_2 \odot (W_1 W_3)^\top) \, s_1'(a_1)

    with the pre-activations :math:`a_i`: one matrix product more than the velocity, in any
    dimension. With one hidden layer it is :math:`\sum_j s_1'(a_1)_j (W_1 W_2)_{jj}`. For deeper
    networks see `cnf.vector_fields.jacobian.perceptron`. Training takes no second backward pass.

    Where each row has its own t, some layers have weights, and the output layer a gate, for each
    row; the divergence then costs one product for each feature.

    The output layer starts at zero, so that a new field is zero and a new flow the identity. With
    a skip, :math:`g x (2 t - 1) / (t^2 + (1 - t)^2)` is added to the velocity, with a gate g for
    each feature that starts at 1: the mean velocity of straight paths between two independent
    standard normal samples, whose flow from t = 0 to 1 is the identity. Flow matching then learns
    only how the data differ from a normal distribution.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.
        hidden_features: Widths of the hidden layers.
        layer: Kind of every layer: a name in `cnf.vector_fields.layers.LAYERS`.
        activation: Name in `cnf.vector_fields.activations.ACTIVATIONS`, for all hidden layers, or
            one name for each; None for "sin" in the first and "silu" in the others.
        frequency: Initial standard deviation of the input weights of a sinusoidal first layer;
            None for ``2 / sqrt(max(1, features - 1))``, which suits standardised data.
        time_features: Number m of waves; None for 8, or for 0 with the layer "ignore". Layers get
            ``sin(pi k t)`` and ``cos(pi k t)`` for k = 1 … m beside t, as part of the context. They
            shift the output of a layer, and scale it if its gate depends on the context; the gate
            of the output layer depends on t alone.
        skip: Whether the velocity has a multiple of x, as above.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If an argument is out of range, or `time_features` or `skip` is given for the
            layer "ignore", which does not depend on time.

    References:
        Grathwohl et al. (2019), FFJORD, https://arxiv.org/abs/1810.01367, for the layers.
        Sitzmann et al. (2020), Implicit Neural Representations with Periodic Activation
        Functions, https://arxiv.org/abs/2006.09661, for the sinusoidal layer.
        Lipman et al. (2023), https://arxiv.org/abs/2210.02747, for the paths of the skip.
        Vaswani et al. (2017), Attention Is All You Need, https://arxiv.org/abs/1706.03762, for
        waves as features of a position.

    Example:
        >>> import torch
        >>> field = MLPField(features=64, hidden_features=(256, 256))
        >>> t, x = torch.tensor(0.5), torch.zeros(3, 64)
        >>> velocity, divergence = field.velocity_and_divergence(t, x)
        >>> velocity.shape, divergence.shape
        (torch.Size([3, 64]), torch.Size([3]))
    """

    shares_times = True
    skip = False

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        *,
        hidden_features: Sequence[int] = (128, 128),
        layer: str = "film",
        activation: str | Sequence[str] | None = None,
        frequency: float | None = None,
        time_features: int | None = None,
        skip: bool = False,
    ) -> None:
        super().__init__(features, context_features)
        self.hidden_features = check_widths("hidden_features", hidden_features)
        self.layer = check_choice("layer", layer, LAYERS)
        self.activation = check_activations(activation, len(self.hidden_features))
        self.frequency = check_frequency(frequency, features, self.activation[0])
        if time_features is None:
            time_features = 0 if layer == "ignore" else _WAVES
        self.time_features = check_time_features(time_features, layer)
        widths = (self.features, *self.hidden_features, self.features)
        conditions = self.context_features + 2 * self.time_features
        last = len(widths) - 2
        self.layers = nn.ModuleList(
            LAYERS[layer](inputs, outputs, conditions, gate_context=i != last)
            for i, (inputs, outputs) in enumerate(itertools.pairwise(widths))
        )
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)
        self.skip = check_flag("skip", skip)
        if self.skip and layer == "ignore":
            raise ValueError('skip must be False for the layer "ignore", which has no time.')
        if self.skip:
            self.skip_gate = nn.Parameter(torch.ones(self.features))
        self._activations = [ACTIVATIONS[name] for name in self.activation]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights: see `cnf.vector_fields.layers.reset_layers`."""
        reset_layers(self.layers, self.frequency)
        if self.skip:
            nn.init.ones_(self.skip_gate)

    def zero_(self) -> None:
        """Make the field zero at every time and context; the hidden layers stay as they are."""
        make_zero(self.layers)
        if self.skip:
            nn.init.zeros_(self.skip_gate)

    def stages(self, t: Times, x: Rows, context: Context | None) -> list[Stage]:
        """Return the hidden layers with their activations, and the output layer."""
        return self._network(t, context).stages

    @property
    def inner_widths(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return self.hidden_features

    @property
    def has_closed_form_divergence(self) -> bool:
        """True with one or two hidden layers."""
        return len(self.hidden_features) <= _CLOSED_FORM_DEPTH

    def _velocity_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._network(t, context).velocity_and_divergence(x)

    def _velocity_and_bottleneck_products(
        self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        network = self._network(t, context)
        stages = network._replace(skip=None).stages
        velocity, products = bottleneck_products(stages, self.inner_widths, x, probes)
        if network.skip is None:
            return velocity, products
        # A multiple of the identity, with the trace of the skip.
        part = network.skip.sum(-1, keepdim=True) / probes.shape[-1]
        return torch.addcmul(velocity, network.skip, x), products + part * probes

    def _network(self, t: Tensor, context: Tensor | None) -> Perceptron:
        """Return the network at one time and context."""
        if context is not None:
            context = scaled_context(self, context)
        conditions = waves_and_context(t, context, self.time_features)
        maps = [layer(t, conditions) for layer in self.layers]
        if not self.skip:
            return Perceptron(maps, self._activations)
        rate = (2 * t - 1) / (t.square() + (1 - t).square())
        return Perceptron(maps, self._activations, rate.unsqueeze(-1) * self.skip_gate)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A CNF saved before it had a skip.
        if self.skip and f"{prefix}layers.0.linear.weight" in state_dict:
            state_dict.setdefault(f"{prefix}skip_gate", torch.zeros_like(self.skip_gate))
        super()._load_from_state_dict(state_dict, prefix, *args)
