"""One small specimen of everything that the laws hold for, with weights away from their start."""

import itertools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from cnf import (
    CNF,
    Affine,
    ContinuousTransform,
    ConvField,
    Flow,
    LinearField,
    MLPField,
    ModuleField,
    NeuralODE,
    ODESolver,
    PotentialField,
    ResidualField,
    Standardize,
    VectorField,
)
from cnf.transforms import Transform
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.layers import LAYERS

PRECISE = ODESolver(rtol=1e-9, atol=1e-9, gradient="backprop")
"""For laws that hold up to solver tolerance."""

Module = TypeVar("Module", bound=nn.Module)


def perturbed(module: Module, scale: float = 0.3) -> Module:
    """The module after normal noise is added to every parameter: far from the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


class UserNetwork(nn.Module):
    """A network as a user might bring it."""

    def __init__(self, features: int, context_features: int = 0) -> None:
        super().__init__()
        self.inner = nn.Linear(1 + features + context_features, 8)
        self.outer = nn.Linear(8, features)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        inputs = [t.unsqueeze(-1).expand(*x.shape[:-1], 1), x]
        if context is not None:
            inputs.append(context.expand(*x.shape[:-1], context.shape[-1]))
        return self.outer(torch.tanh(self.inner(torch.cat(inputs, -1))))


def mlp(features: int = 2, context_features: int = 0, **settings: object) -> MLPField:
    """A small, smooth MLP field."""
    settings = {"hidden_features": (8, 8), **settings}
    if settings.get("activation", "sin") in ("sin", ("sin", "silu")):
        settings.setdefault("frequency", 1.0)
    return perturbed(MLPField(features, context_features, **settings))


def residual(features: int = 2, context_features: int = 0, **settings: object) -> ResidualField:
    """A small residual field."""
    settings = {"hidden_features": 6, "activation": "silu", **settings}
    return perturbed(ResidualField(features, context_features, **settings))


def conv(
    shape: tuple[int, int, int] = (1, 2, 3), context_features: int = 0, **settings: object
) -> ConvField:
    """A small convolutional field."""
    return perturbed(ConvField(shape, context_features, **{"hidden_channels": (4, 3), **settings}))


MLP_FIELDS: dict[str, Callable[[], MLPField]] = {
    **{
        f"{layer}-{activation}": lambda layer=layer, activation=activation: mlp(
            layer=layer, activation=activation
        )
        for layer, activation in itertools.product(LAYERS, ACTIVATIONS)
    },
    "sin then silu": lambda: mlp(activation=("sin", "silu")),
    "one hidden layer": lambda: mlp(hidden_features=(8,), activation="tanh"),
    "three hidden layers": lambda: mlp(hidden_features=(8, 7, 6), activation="silu"),
    "one feature": lambda: mlp(1),
    "five features": lambda: mlp(5),
    **{f"{layer} with context": lambda layer=layer: mlp(2, 3, layer=layer) for layer in LAYERS},
    "three hidden layers with context": lambda: mlp(
        2, 3, hidden_features=(8, 7, 6), activation="tanh"
    ),
    "time features": lambda: mlp(time_features=2),
    "time features with context": lambda: mlp(2, 3, time_features=2),
}

BOTTLENECKS: dict[str, Callable[[], VectorField]] = {
    "bottleneck": lambda: mlp(5, hidden_features=(8, 3)),
    "bottleneck of one": lambda: mlp(4, hidden_features=(1,)),
    "deep bottleneck with context": lambda: mlp(
        5, 3, hidden_features=(8, 3, 7), activation="tanh", time_features=1
    ),
    "bottleneck of a blend": lambda: mlp(4, hidden_features=(3, 8), layer="blend"),
    "residual bottleneck with context": lambda: residual(5, 3, hidden_features=3),
}


def potential(features: int = 2, context_features: int = 0, **settings: object) -> PotentialField:
    """A small, smooth potential field."""
    settings = {"hidden_features": 8, **settings}
    if settings.get("activation", "sin") == "sin":
        settings.setdefault("frequency", 1.0)
    return perturbed(PotentialField(features, context_features, **settings))


POTENTIAL_FIELDS: dict[str, Callable[[], PotentialField]] = {
    **{f"potential {layer}": lambda layer=layer: potential(layer=layer) for layer in LAYERS},
    **{
        f"potential {layer} with context": lambda layer=layer: potential(3, 2, layer=layer)
        for layer in LAYERS
    },
    "potential tanh": lambda: potential(activation="tanh"),
    "potential of one feature": lambda: potential(1),
}

FIELDS: dict[str, Callable[[], VectorField]] = {
    **MLP_FIELDS,
    **POTENTIAL_FIELDS,
    **BOTTLENECKS,
    "residual": lambda: residual(activation=None, frequency=1.0),
    "residual with context": lambda: residual(2, 3, blocks=1, time_features=1),
    "blending residual with context": lambda: residual(2, 3, layer="blend"),
    "conv": lambda: conv((2, 2, 2)),
    "conv with context": lambda: conv((1, 2, 3), 3),
    "blending conv with context": lambda: conv((1, 3, 2), 3, layer="blend"),
    "linear": lambda: perturbed(LinearField(3)),
    "linear with context": lambda: perturbed(LinearField(2, 3)),
    "user": lambda: perturbed(ModuleField(UserNetwork(2), 2)),
    "user with context": lambda: perturbed(ModuleField(UserNetwork(2, 3), 2, 3)),
}

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "affine": lambda: perturbed(Affine(2)),
    "standardize": lambda: Standardize.from_data(3 + 2 * torch.randn(50, 2)),
    "continuous": lambda: ContinuousTransform(mlp(), solver=PRECISE),
    "continuous with context": lambda: ContinuousTransform(mlp(2, 3), solver=PRECISE),
    "continuous user": lambda: ContinuousTransform(
        perturbed(ModuleField(UserNetwork(2), 2)), solver=PRECISE
    ),
    "continuous with learnt end time": lambda: ContinuousTransform(
        mlp(), solver=PRECISE, end_time=0.7, learn_end_time=True
    ),
    "continuous between other times": lambda: ContinuousTransform(
        potential(), solver=PRECISE, start_time=-0.3, end_time=0.8
    ),
    "continuous rk4": lambda: ContinuousTransform(mlp(), solver=ODESolver(method="rk4", steps=40)),
}


def cnf(features: int = 2, context_features: int = 0, **settings: object) -> CNF:
    """A small, smooth CNF, solved precisely."""
    settings = {"hidden_features": (8, 8), "frequency": 1.0, "solver": PRECISE, **settings}
    return perturbed(CNF(features, context_features, **settings))


FLOWS: dict[str, Callable[[], Flow]] = {
    "cnf": cnf,
    "cnf with context": lambda: cnf(2, 3),
    "two blocks": lambda: cnf(blocks=2),
    "standardized": lambda: cnf(transforms=[Standardize.from_data(3 + 2 * torch.randn(50, 2))]),
    "learnt affine with context": lambda: cnf(2, 3, transforms=[Affine(2)]),
    "linear": lambda: Flow([ContinuousTransform(perturbed(LinearField(2)), solver=PRECISE)]),
    "time features": lambda: Flow([ContinuousTransform(mlp(time_features=2), solver=PRECISE)]),
    "residual": lambda: Flow([ContinuousTransform(residual(), solver=PRECISE)]),
    "conv with context": lambda: Flow([ContinuousTransform(conv((1, 1, 2), 3), solver=PRECISE)]),
    "learnt end time": lambda: Flow(
        [ContinuousTransform(mlp(), solver=PRECISE, end_time=1.4, learn_end_time=True)]
    ),
    "potential with context": lambda: Flow([ContinuousTransform(potential(2, 3), solver=PRECISE)]),
    "user": lambda: Flow(
        [ContinuousTransform(perturbed(ModuleField(UserNetwork(2), 2)), solver=PRECISE)]
    ),
}

NEURAL_ODES: dict[str, Callable[[], NeuralODE]] = {
    "plain": lambda: NeuralODE(mlp(), solver=PRECISE),
    "augmented": lambda: NeuralODE(mlp(3), augment=1, solver=PRECISE),
    "with context": lambda: NeuralODE(mlp(2, 3), solver=PRECISE),
    "augmented with context": lambda: NeuralODE(mlp(4, 3), augment=2, solver=PRECISE),
    "augmented user": lambda: NeuralODE(
        perturbed(ModuleField(UserNetwork(3, 1), 3, 1)), augment=2, solver=PRECISE
    ),
    "augmented rk4": lambda: NeuralODE(
        mlp(3), augment=1, solver=ODESolver(method="rk4", steps=40, gradient="backprop")
    ),
}


def rows_for(
    module: VectorField | Transform | Flow | NeuralODE, *batch: int
) -> tuple[Tensor, Tensor | None]:
    """Random rows of batch shape `batch` for a specimen, and contexts if it takes them."""
    x = torch.randn(*batch, module.features)
    size = module.context_features
    return x, torch.randn(*batch, size) if size else None
