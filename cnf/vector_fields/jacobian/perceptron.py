"""A multi-layer perceptron at one time and context, by differentiable formulas."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from cnf.vector_fields.activations import Activation
from cnf.vector_fields.affine_map import AffineMap
from cnf.vector_fields.chains import trace_chain
from cnf.vector_fields.jacobian.autograd import standard_basis
from cnf.vector_fields.staged import Activated, Stage, applied, linearised


class Perceptron(NamedTuple):
    """Affine maps with activations between them.

    These are the plain formulas, which can be differentiated any number of times and in any mode,
    transformed by `torch.func`, and compiled. `cnf.vector_fields.fused` evaluates the same with
    fewer operations.
    """

    maps: Sequence[AffineMap]
    """Of the hidden layers, and of the output layer."""
    activations: Sequence[Activation]
    """Of the hidden layers."""

    @property
    def stages(self) -> list[Stage]:
        """The hidden layers with their activations, and the output layer."""
        *hidden, output = self.maps
        return [*map(Activated, hidden, self.activations), output]

    def velocity_and_products(
        self, x: Float[Tensor, "*batch features"], probes: Float[Tensor, "probes *batch features"]
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "probes *batch features"]]:
        """The value, and the Jacobian times each probe."""
        velocity, tangents = linearised(self.stages, x)
        return velocity, applied(tangents, probes)

    def velocity_and_divergence(
        self, x: Float[Tensor, "*batch features"]
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "*batch"]]:
        """The value, and the trace of the Jacobian.

        Where rows differ in a weight, or in the gate of the output layer, this is the sum over the
        standard basis.
        """
        *hidden, output = self.maps
        if not output.is_shared or any(affine.weight.ndim > 2 for affine in hidden):
            basis = standard_basis(x)
            velocity, products = self.velocity_and_products(x, basis)
            return velocity, (basis * products).sum(-1).sum(0)
        slopes = []
        for affine, activation in zip(hidden, self.activations, strict=True):
            x, slope = activation.value_and_slope(affine.value(x))
            slopes.append(slope if affine.gate is None else slope * affine.gate)
        divergence, _ = trace_chain([affine.weight for affine in self.maps]).carry(slopes, None)
        return output.value(x), divergence
