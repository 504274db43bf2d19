"""The flows of this package that are timed: trained for a moment, and solved in several ways."""

import copy
import typing

import torch
from torch import Tensor, nn

from benchmarks.mixture import Mixture, train
from benchmarks.solves import Density
from cnf import Flow, MLPField, ModuleField, ODESolver, VectorField
from cnf.divergence import Divergence
from cnf.ode import Gradient
from cnf.transforms import ContinuousTransform

_ROWS = 256


def ffjord_field(features: int, hidden_features: tuple[int, ...]) -> MLPField:
    """FFJORD's network for its toy sets: concatsquash layers and tanh."""
    return MLPField(
        features,
        hidden_features=hidden_features,
        layer="concatsquash",
        activation="tanh",
        time_features=0,
    )


def trained(field: MLPField, *, steps: int, seed: int) -> tuple[MLPField, Mixture]:
    """The field after so many steps of flow matching to a mixture, and that mixture."""
    mixture = Mixture(field.features, torch.Generator().manual_seed(seed))
    train(field, field.parameters(), mixture, steps=steps, rows=_ROWS)
    return field, mixture


def gradients() -> tuple[str, ...]:
    """The ways to a gradient that this version of `ODESolver` knows."""
    return typing.get_args(typing.get_type_hints(ODESolver)["gradient"])


def solver_of(tolerance: float, gradient: Gradient = "backprop") -> ODESolver:
    """dopri5 with both tolerances so, and torchdiffeq's error norm, a root mean square."""
    return ODESolver(
        rtol=tolerance, atol=tolerance, error_norm="points_and_ladj", gradient=gradient
    )


def following(field: VectorField, divergence: Divergence, solver: ODESolver) -> Flow:
    """A flow from a standard normal along the field."""
    return Flow([ContinuousTransform(field, divergence=divergence, solver=solver)])


def compiled(flow: Flow) -> Flow | None:
    """A compiled copy; None if this version of `Flow` has no `compile` of its own."""
    if Flow.compile is nn.Module.compile:
        return None
    flow = copy.deepcopy(flow)
    flow.compile()
    return flow


def density(flow: Flow) -> Density:
    """The log-density of a flow along one field, with the same probes in every call."""
    transform = flow.chain[-1]
    field = transform.vector_field

    def log_prob(x: Tensor) -> Tensor:
        return flow.log_prob(x, generator=torch.Generator().manual_seed(0))

    return Density(log_prob=log_prob, network=getattr(field, "network", field))


def by_reverse_mode(field: VectorField) -> ModuleField:
    """The field as a network of which nothing is known: FFJORD's way, for any network."""
    return ModuleField(field, field.features)


def as_ffjord(field: MLPField) -> ModuleField:
    """The field of `ffjord_field` as FFJORD would have it, network and all."""
    return ModuleField(AsFFJORD(field), field.features)


class AsFFJORD(nn.Module):
    """The network of `ffjord_field`, with its weights, as FFJORD's code writes it: layer by layer.

    A gate and a shift are made of the time for each layer, and applied to rows.
    """

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.layers = field.layers

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Velocity at `x`."""
        time = t.view(1, 1)
        for i, layer in enumerate(self.layers):
            x = layer.linear(x if i == 0 else x.tanh())
            x = x * layer.gate(time).sigmoid() + layer.shift(time)
        return x


class OverTheBasis(VectorField):
    """The field without its closed form: the exact divergence over the basis, carried forward."""

    def __init__(self, network: VectorField) -> None:
        super().__init__(network.features)
        self.network = network

    def _velocity(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        return self.network(t, x, context)

    def _velocity_and_products(
        self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.network.velocity_and_products(t, x, probes, context)
