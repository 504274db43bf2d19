"""One small specimen of everything that the laws hold for, with weights away from their start."""

import itertools
from collections.abc import Callable, Iterable
from typing import TypeVar

import nflows.transforms
import normflows
import torch
import zuko
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    Gamma,
    Independent,
    Poisson,
)
from torch.distributions.constraints import Constraint

from cnf import CNF, Flow, MLPField, ModuleField, NeuralODE, ODESolver, Standardize, VectorField
from cnf.adapters import FromNflows, FromNormflows, FromTorch, FromZuko, NormflowsBase, TorchBase
from cnf.baselines import build, glow
from cnf.bases import (
    Base,
    ConditionalNormal,
    GaussianMixtureBase,
    HalfNormal,
    LowDimensionalNormal,
    NarrowNormal,
    OrderedNormal,
    ProductBase,
    StandardNormal,
    UniformOnManifold,
    VonMisesFisherMixture,
)
from cnf.bases.ordered_normal import OrderedVector, sorted_points
from cnf.flows import MixtureOfFlows, PseudoInvertibleEncoder
from cnf.manifolds import Euclidean, Manifold, Product, Sphere, Torus
from cnf.transforms import (
    VAE,
    Abs,
    ActNorm,
    AdditiveCoupling,
    AdjustedLangevin,
    Affine,
    AffineCoupling,
    AnnealedDensity,
    Augment,
    AutoencoderCoupling,
    Chain,
    ConditionalAffine,
    ConformalEmbedding,
    ContinuousTransform,
    ContractiveNetwork,
    Conv1x1,
    ConvConditioner,
    ConvFunnel,
    Dequantize,
    Diffusion,
    EmergingConv,
    ExactLipschitz,
    ExactLogDet,
    FactorOut,
    Flatten,
    FlowifiedConv2d,
    FlowifiedLinear,
    HamiltonianMonteCarlo,
    Inverse,
    Langevin,
    LeakyReLU,
    LipschitzAttention,
    LipschitzConv,
    LipschitzMLP,
    LogGaps,
    Logit,
    Maximum,
    MaxPool2d,
    MetropolisHastings,
    MLPConditioner,
    MLPFunnel,
    NormalScores,
    Orthogonal,
    PeriodicConv,
    Permute,
    PiecewiseConformal,
    Planar,
    Radial,
    ResidualFlow,
    Round,
    RussianRoulette,
    Similarity,
    Slice,
    Sort,
    SpecialConformal,
    Squeeze,
    StochasticPermutation,
    Transform,
    TransformedBase,
    TruncatedSeries,
    Unconstrain,
    Unfold,
    Whiten,
    WoodburyConv,
)
from cnf.vector_fields import ConvField, LinearField, PotentialField, ResidualField, TangentField
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.layers import LAYERS

PRECISE = ODESolver(method="dopri8", rtol=1e-8, atol=1e-8, gradient="backprop")
"""For laws that hold up to solver tolerance."""

COARSE = ODESolver(method="rk4", steps=2, gradient="backprop")
"""For laws that hold on any grid."""

Module = TypeVar("Module", bound=nn.Module)


def in_turn(*factors: Iterable[object]) -> list[tuple[object, ...]]:
    """Each value of each factor, beside the others' in turn: their sum, and not their product."""
    factors = tuple(list(values) for values in factors)
    longest = max(map(len, factors))
    return list(zip(*(itertools.islice(itertools.cycle(f), longest) for f in factors), strict=True))


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
        self.features = features
        self.context_features = context_features
        self.inner = nn.Linear(1 + features + context_features, 8)
        self.outer = nn.Linear(8, features)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        inputs = [t.unsqueeze(-1).expand(*x.shape[:-1], 1), x]
        if context is not None:
            inputs.append(context.expand(*x.shape[:-1], context.shape[-1]))
        return self.outer(torch.tanh(self.inner(torch.cat(inputs, -1))))


def mlp(features: int = 2, context_features: int = 0, **settings: object) -> MLPField:
    """A small, smooth MLP field, also after its weights are perturbed."""
    settings = {"hidden_features": (8, 8), "layer": "concatsquash", "time_features": 0, **settings}
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


LAYERED: dict[str, Callable[[], MLPField]] = {
    f"{layer}-{activation}": lambda layer=layer, activation=activation: mlp(
        layer=layer, activation=activation
    )
    for layer, activation in in_turn(LAYERS, ACTIVATIONS)
}
"""Every layer and every activation. The laws about both at once make each pair."""

MLP_FIELDS: dict[str, Callable[[], MLPField]] = {
    **LAYERED,
    "sin then silu": lambda: mlp(activation=("sin", "silu")),
    "one hidden layer": lambda: mlp(hidden_features=(8,), activation="tanh"),
    "three hidden layers": lambda: mlp(hidden_features=(8, 7, 6), activation="silu"),
    "one feature": lambda: mlp(1),
    "five features": lambda: mlp(5),
    **{f"{layer} with context": lambda layer=layer: mlp(2, 3, layer=layer) for layer in LAYERS},
    "three hidden layers with context": lambda: mlp(
        2, 3, hidden_features=(8, 7, 6), activation="tanh"
    ),
    "default layers": lambda: perturbed(MLPField(2, hidden_features=(8, 8)), 0.1),
    "skip": lambda: mlp(3, skip=True),
    "skip by layers without gates with context": lambda: mlp(2, 3, layer="concat", skip=True),
    "time features": lambda: mlp(time_features=2),
    "time features with context": lambda: mlp(2, 3, time_features=2),
}

BOTTLENECKS: dict[str, Callable[[], VectorField]] = {
    "bottleneck": lambda: mlp(5, hidden_features=(8, 3)),
    "bottleneck of one": lambda: mlp(4, hidden_features=(1,)),
    "bottleneck with a skip": lambda: mlp(5, hidden_features=(8, 3), layer="concat", skip=True),
    "bottleneck of gates with a skip": lambda: mlp(4, hidden_features=(3,), skip=True),
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

MANIFOLDS: dict[str, Manifold] = {
    "circle": Torus(1),
    "torus": Torus(2),
    "sphere": Sphere(3),
    "sphere in four dimensions": Sphere(4),
    "sphere, circle and line": Product([Sphere(3), Torus(1), Euclidean(1)]),
}


def tangent(manifold: Manifold, context_features: int = 0, **settings: object) -> TangentField:
    """A small field tangent to a manifold."""
    return TangentField(mlp(manifold.embedded_features, context_features, **settings), manifold)


FIELDS: dict[str, Callable[[], VectorField]] = {
    **MLP_FIELDS,
    **POTENTIAL_FIELDS,
    **BOTTLENECKS,
    "residual": lambda: residual(activation=None, frequency=1.0),
    "residual with context": lambda: residual(2, 3, blocks=1, time_features=1),
    "blending residual with context": lambda: residual(2, 3, layer="blend"),
    **{
        f"tangent to the {name}": lambda manifold=manifold: tangent(manifold)
        for name, manifold in MANIFOLDS.items()
    },
    "tangent to the sphere with context": lambda: tangent(Sphere(3), 2, hidden_features=(8, 7, 6)),
    "tangent to the plane": lambda: tangent(Euclidean(2)),
    "user on the sphere": lambda: TangentField(
        perturbed(ModuleField(UserNetwork(3), 3)), Sphere(3)
    ),
    "conv": lambda: conv((2, 2, 2)),
    "conv with context": lambda: conv((1, 2, 3), 3),
    "blending conv with context": lambda: conv((1, 3, 2), 3, layer="blend"),
    "linear": lambda: perturbed(LinearField(3)),
    "linear with context": lambda: perturbed(LinearField(2, 3)),
    "user": lambda: perturbed(ModuleField(UserNetwork(2), 2)),
    "user with context": lambda: perturbed(ModuleField(UserNetwork(2, 3), 2, 3)),
}


def lipschitz(features: int, context_features: int = 0, **settings: object) -> ExactLipschitz:
    """A small exact-Lipschitz transform."""
    settings = {"units": 3, "hidden_features": (8,), **settings}
    return perturbed(ExactLipschitz(features, context_features, **settings))


class LinearContraction(ContractiveNetwork):
    """A multiplication by a given matrix, with a spectral norm less than 1."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), coefficient=float(torch.linalg.matrix_norm(matrix, 2)))
        self.matrix = nn.Parameter(matrix)

    def given(self, context: Tensor | None) -> Callable[[Tensor], Tensor]:
        return lambda x: x @ self.matrix.T


def lipschitz_mlp(features: int = 2, context_features: int = 0, **settings: object) -> LipschitzMLP:
    """A small contraction."""
    settings = {"hidden_features": (6, 5), **settings}
    return perturbed(LipschitzMLP(features, context_features, **settings))


def lipschitz_conv(context_features: int = 0, **settings: object) -> LipschitzConv:
    """A small contraction of images."""
    settings = {"hidden_channels": (2,), **settings}
    return perturbed(LipschitzConv((1, 3, 3), context_features, **settings))


def lipschitz_attention(tokens: int = 3, width: int = 2, **settings: object) -> LipschitzAttention:
    """A small contraction of tokens."""
    return perturbed(LipschitzAttention(tokens, width, **settings))


def normal_scores(x: Tensor) -> NormalScores:
    """Few knots, for a density without fine features."""
    transform = NormalScores(x.shape[-1], knots=4)
    transform.initialize(x)
    return transform


def residual_flow(network: ContractiveNetwork, **settings: object) -> ResidualFlow:
    """A residual flow, solved precisely."""
    return ResidualFlow(network, **{"tolerance": 1e-11, **settings})


CONFORMAL_MAPS: dict[str, Callable[[], Transform]] = {
    "similarity": lambda: perturbed(Similarity(3)),
    "special conformal": lambda: perturbed(SpecialConformal(3), 0.1),
    "piecewise conformal": lambda: perturbed(PiecewiseConformal(3)),
}
"""Conformal maps, beside `Orthogonal` and `Permute`."""


def autoencoder() -> AutoencoderCoupling:
    """A small autoencoder that is a bijection."""
    sizes = {"encoder": (3, 4), "decoder": (2, 6)}
    networks = {name: MLPConditioner(*size, hidden_features=(6,)) for name, size in sizes.items()}
    return perturbed(AutoencoderCoupling(5, 2, **networks))


def conformal_embedding(features: int = 3, base_features: int = 2) -> ConformalEmbedding:
    """A curved surface."""
    maps = [Similarity, Orthogonal, SpecialConformal, PiecewiseConformal]
    parts = [perturbed(each(features), 0.2) for each in maps]
    return ConformalEmbedding(parts, base_features)


BIJECTIONS: dict[str, Callable[[], Transform]] = {
    "affine": lambda: perturbed(Affine(2)),
    "actnorm": lambda: perturbed(ActNorm(2)),
    "actnorm of an image": lambda: perturbed(ActNorm((2, 1, 3))),
    "conditional affine": lambda: perturbed(ConditionalAffine((2, 1, 3), 2)),
    "additive coupling": lambda: perturbed(
        AdditiveCoupling(3, conditioner=MLPConditioner(1, 2, hidden_features=(8,)))
    ),
    "affine coupling with context": lambda: perturbed(
        AffineCoupling(3, 2, conditioner=MLPConditioner(2, 2, 2, hidden_features=(8,)), mask="last")
    ),
    "affine coupling of channels": lambda: perturbed(
        AffineCoupling((3, 1, 2), conditioner=ConvConditioner((1, 1, 2), 4, hidden_channels=(4, 3)))
    ),
    "checkerboard coupling with context": lambda: perturbed(
        AffineCoupling(
            (2, 2, 2),
            3,
            conditioner=ConvConditioner((2, 2, 2), 4, 3, hidden_channels=(6,)),
            mask="odd",
        )
    ),
    "conv1x1": lambda: perturbed(Conv1x1((3, 1, 2))),
    "dense conv1x1 of a vector": lambda: perturbed(Conv1x1(3, lu=False), 0.1),
    "standardize": lambda: Standardize.from_data(3 + 2 * torch.randn(50, 2)),
    "normal scores": lambda: NormalScores.from_data(torch.randn(50, 2).exp()),
    "whiten": lambda: Whiten.from_data(3 + torch.randn(50, 2) @ torch.tensor([[1.0, 2], [0, 0.5]])),
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
    "continuous on the sphere": lambda: ContinuousTransform(tangent(Sphere(3)), solver=PRECISE),
    "continuous on the torus with context": lambda: ContinuousTransform(
        tangent(Torus(2), 3), solver=PRECISE
    ),
    "continuous rk4": lambda: ContinuousTransform(mlp(), solver=ODESolver(method="rk4", steps=20)),
    "logit": lambda: Logit(3),
    "unconstrain": lambda: Unconstrain(
        ["real", "positive", ("interval", -1.0, 4.0), ("periodic", 1, 7, 2.5)]
    ),
    "flatten": lambda: Flatten((2, 1, 3)),
    "permute": lambda: Permute([2, 0, 3, 1]),
    "squeeze": lambda: Squeeze((2, 4, 2)),
    "planar": lambda: perturbed(Planar(3)),
    "radial": lambda: perturbed(Radial(3)),
    "emerging convolution": lambda: perturbed(EmergingConv((2, 3, 2), 3)),
    "periodic convolution": lambda: perturbed(PeriodicConv((2, 2, 3), 2)),
    "woodbury convolution": lambda: perturbed(WoodburyConv((2, 3, 2), 1, 2)),
    "exact lipschitz": lambda: lipschitz(3),
    "exact lipschitz with context": lambda: lipschitz(2, 3, hidden_features=(8, 6)),
    "residual flow": lambda: residual_flow(lipschitz_mlp()),
    "residual flow with context": lambda: residual_flow(lipschitz_mlp(2, 3, activation="elu")),
    "residual flow of an image with context": lambda: residual_flow(
        lipschitz_conv(3), log_det=ExactLogDet()
    ),
    "attentive residual flow": lambda: residual_flow(lipschitz_attention()),
    "factor out": lambda: FactorOut([perturbed(Affine(2)), Permute([1, 0])], 5),
    "factor out continuous with context": lambda: FactorOut(
        [perturbed(Affine(2)), ContinuousTransform(mlp(2, 3), solver=PRECISE)], 3
    ),
    "chain with context": lambda: Chain([perturbed(Affine(2)), perturbed(ConditionalAffine(2, 3))]),
    "torch": lambda: FromTorch(ComposeTransform([AffineTransform(0.3, 0.5), ExpTransform()]), 2),
    "zuko": lambda: perturbed(
        FromZuko(zuko.flows.NSF(2, transforms=2, hidden_features=(8, 8)).transform, 2), 0.1
    ),
    "zuko with context": lambda: perturbed(
        FromZuko(zuko.flows.NICE(2, 3, transforms=2, hidden_features=(8,)).transform.inv, 2, 3), 0.1
    ),
    "nflows with context": lambda: perturbed(
        FromNflows(
            nflows.transforms.MaskedAffineAutoregressiveTransform(2, 8, 3, num_blocks=1), 2, 3
        ).double(),
        0.1,
    ),
    "normflows": lambda: perturbed(
        FromNormflows([normflows.flows.LULinearPermute(2, False)], 2).double(), 0.1
    ),
    "named": lambda: perturbed(build("realnvp", 2, size=6), 0.1).chain[0],
    "leaky relu": lambda: LeakyReLU(3, negative_slope=0.3),
    "patches": lambda: Unfold((2, 2, 4), 2),
    "flowified square layer": lambda: perturbed(FlowifiedLinear(3, 3)),
    "orthogonal": lambda: perturbed(Orthogonal(3)),
    "orthogonal of channels": lambda: perturbed(Orthogonal((3, 1, 2))),
    **CONFORMAL_MAPS,
    "autoencoder coupling": autoencoder,
    "logarithms of gaps": lambda: LogGaps(6, point_features=2),
    "inverse": lambda: Inverse(Chain([LogGaps(3), perturbed(Affine(3))])),
    "inverse with context": lambda: Inverse(perturbed(ConditionalAffine(2, 3))),
}

SURJECTIONS: dict[str, Callable[[], Transform]] = {
    "dequantize": lambda: Dequantize(3, 5),
    "unconstrain integers": lambda: Unconstrain(["integer", "positive", "integer"]),
    "augment": lambda: Augment(2, 3),
    "augment learnt": lambda: perturbed(Augment(3, 2, hidden_features=(8,))),
    "augment learnt with context": lambda: perturbed(Augment(2, 1, 3, hidden_features=())),
    "factor out of an augmented part": lambda: FactorOut(
        [perturbed(Augment(2, 1, hidden_features=(4, 4)))], 3
    ),
    "overlapping patches": lambda: perturbed(Unfold((1, 3, 4), 2, stride=1, padding=1)),
    "flowified wide layer": lambda: perturbed(FlowifiedLinear(2, 4)),
    "flowified wide convolution": lambda: perturbed(FlowifiedConv2d((1, 2, 2), 5, 2)),
    "inverse absolute values": lambda: Inverse(Abs(3)),
    "inverse rounding": lambda: Inverse(Round(2)),
    "inverse sorting": lambda: Inverse(Sort(4, point_features=2)),
    "inverse slice with context": lambda: Inverse(perturbed(Slice(3, 2, 3))),
}
"""Random on the way to the base, so that a likelihood is a lower bound."""


def annealed(features: int = 2, share: float = 0.5) -> AnnealedDensity:
    """A density between a normal and a mixture."""
    target = GaussianMixtureBase.from_data(torch.randn(40, features).exp())
    return AnnealedDensity(StandardNormal(features), target, share)


def distances(features: int, context_features: int) -> TransformedBase:
    """A conditional distribution of positive numbers."""
    base = ConditionalNormal(features, context_features, hidden_features=(4,))
    return perturbed(TransformedBase([Unconstrain(["positive"] * features)], base))


INFERENCE_SURJECTIONS: dict[str, Callable[[], Transform]] = {
    "absolute values": lambda: Abs(2),
    "convolutional funnel": lambda: perturbed(ConvFunnel((2, 2, 4), hidden_channels=(3,)), 0.1),
    "convolutional funnel with context": lambda: perturbed(
        ConvFunnel((1, 3, 3), 2, kernel_size=3), 0.1
    ),
    "flowified layer": lambda: perturbed(FlowifiedLinear(4, 2, hidden_features=(3,))),
    "flowified convolution": lambda: perturbed(
        FlowifiedConv2d((1, 2, 4), 2, 2, hidden_channels=(3,))
    ),
    "funnel": lambda: perturbed(MLPFunnel(4, 2), 0.1),
    "funnel with context": lambda: perturbed(MLPFunnel(3, 1, 2), 0.1),
    "inverse augmentation": lambda: Inverse(perturbed(Augment(2, 1, hidden_features=(3,)))),
    "maximum": lambda: Maximum(3),
    "maximum with context": lambda: Maximum(3, 2, offsets=distances(2, 3)),
    "max pooling": lambda: MaxPool2d((2, 2, 4), offsets=distances(12, 4)),
    "rounding": lambda: Round(2),
    "slice": lambda: perturbed(Slice(3, 2)),
    "slice with context": lambda: perturbed(Slice(3, 1, 2)),
    "slice by a flow with context": lambda: Slice(
        4, 2, 3, dropped=perturbed(build("realnvp", 2, 5, size=6), 0.1)
    ),
    "sort": lambda: Sort(3),
    "sort of points": lambda: Sort(6, point_features=2),
}
"""Random on the way to the data alone, so that a likelihood is exact."""

KERNELS: dict[str, Callable[[], Transform]] = {
    "metropolis hastings": lambda: MetropolisHastings(2, annealed(), steps=3),
    "langevin": lambda: Langevin(2, annealed(share=0.0), steps=3),
    "adjusted langevin": lambda: AdjustedLangevin(2, annealed(), steps=2),
    "hamiltonian monte carlo": lambda: HamiltonianMonteCarlo(2, annealed(), leapfrogs=2),
    "diffusion": lambda: Diffusion(mlp(), perturbed(LinearField(2)), steps=3),
    "diffusion with context": lambda: Diffusion(mlp(2, 3), mlp(2, 3), steps=2, noise=0.5),
}
"""Markov kernels."""

STOCHASTIC: dict[str, Callable[[], Transform]] = {
    "flowified overlapping convolution": lambda: perturbed(
        FlowifiedConv2d((1, 3, 3), 2, 3, stride=1, padding=1, hidden_channels=(3,)), 0.1
    ),
    **KERNELS,
    "permutation": lambda: StochasticPermutation(4, point_features=2),
    "autoencoder": lambda: perturbed(
        VAE(*(ConditionalNormal(*size, hidden_features=(4,)) for size in ((1, 3), (3, 1))))
    ),
    "autoencoder with context": lambda: perturbed(
        VAE(*(ConditionalNormal(*size, hidden_features=()) for size in ((1, 4), (2, 3))))
    ),
}
"""Random both ways."""

EMBEDDINGS: dict[str, Callable[[], Transform]] = {
    "conformal embedding": conformal_embedding,
    "conformal curve": lambda: conformal_embedding(2, 1),
    "factor out of an embedded part": lambda: FactorOut([conformal_embedding()], 5),
}
"""Onto a surface alone."""

UNDONE = {**BIJECTIONS, **SURJECTIONS}
"""What the way to the data undoes."""

TRANSFORMS = {**UNDONE, **INFERENCE_SURJECTIONS, **STOCHASTIC, **EMBEDDINGS}


def von_mises_fisher(manifold: Manifold) -> VonMisesFisherMixture:
    """A mixture of a wide and a narrow component."""
    base = VonMisesFisherMixture(manifold, 2)
    means = manifold.project(torch.randn(2, manifold.features))
    base.set_components(torch.randn(2), means, torch.tensor([[0.3], [4.0]]).expand(-1, base.angles))
    return base


BASES: dict[str, Callable[[], Base]] = {
    "standard normal": lambda: StandardNormal(2),
    "gaussian mixture": lambda: GaussianMixtureBase.from_data(torch.randn(40, 2).exp()),
    "torch": lambda: TorchBase(Independent(Gamma(torch.full((2,), 3.0), torch.full((2,), 2.0)), 1)),
    "normflows": lambda: NormflowsBase(normflows.distributions.GaussianMixture(3, 2).double()),
    "named": lambda: perturbed(build("gmm", 2, size=3).base),
    "mixture of flows": lambda: perturbed(MixtureOfFlows([cnf(), Flow(couplings())])),
    "half-normal": lambda: HalfNormal(2),
    "narrow normal": lambda: NarrowNormal(3, 1, std=0.2),
    "sorted normal": lambda: OrderedNormal(4, point_features=2),
    "transformed": lambda: TransformedBase(
        [Unconstrain(["positive", "real"]), perturbed(Affine(2))], StandardNormal(2)
    ),
    "uniform on the sphere": lambda: UniformOnManifold(Sphere(3)),
    "uniform on the torus": lambda: UniformOnManifold(Torus(2)),
    "side by side": lambda: ProductBase([UniformOnManifold(Torus(1)), StandardNormal(2)]),
    "mixture on the sphere": lambda: von_mises_fisher(Sphere(3)),
    "mixture on the torus": lambda: von_mises_fisher(Torus(2)),
}

ESTIMATES: dict[str, Callable[[], Transform]] = {
    "residual flow by roulette": lambda: residual_flow(
        lipschitz_mlp(3), log_det=RussianRoulette(exact_terms=1)
    ),
    "residual flow by roulette with context": lambda: residual_flow(
        lipschitz_mlp(2, 3), log_det=RussianRoulette(probes=2)
    ),
    "residual flow by a truncated series": lambda: residual_flow(
        lipschitz_mlp(), log_det=TruncatedSeries(terms=3)
    ),
    "attentive residual flow by a truncated series": lambda: residual_flow(
        lipschitz_attention(), log_det=TruncatedSeries(probes=3)
    ),
    "factor out of a part by roulette": lambda: FactorOut(
        [residual_flow(lipschitz_mlp(), log_det=RussianRoulette())], 3
    ),
}
"""Bijections whose ladj is an estimate, with a bias or without."""


def cnf(features: int = 2, context_features: int = 0, **settings: object) -> CNF:
    """A small, smooth CNF, solved precisely."""
    settings = {
        "hidden_features": (8, 8),
        "layer": "concatsquash",
        "time_features": 0,
        "frequency": 1.0,
        "solver": PRECISE,
        "standardize": False,
        **settings,
    }
    return perturbed(CNF(features, context_features, **settings))


def scaled(flow: CNF) -> CNF:
    """The flow, its scalings set from data and contexts of other scales."""
    x, context = torch.randn(50, flow.features), torch.randn(50, flow.context_features)
    flow.initialize(3 + 0.8 * x, 0.5 * context - 2)
    return flow


def multi_scale() -> Flow:
    """Images of one channel; half of the features are factored out after the first block."""
    return Flow(
        [
            Flatten((1, 2, 4)),
            Squeeze((1, 2, 4)),
            ContinuousTransform(mlp(8, 3), solver=PRECISE),
            FactorOut([perturbed(Affine(4)), ContinuousTransform(mlp(4, 3), solver=PRECISE)], 8),
        ]
    )


def couplings(context_features: int = 0) -> list[Transform]:
    """Discrete steps of the plane."""
    first, last = (
        MLPConditioner(1, outputs, context_features, hidden_features=(6,)) for outputs in (2, 1)
    )
    return [
        AffineCoupling(2, context_features, conditioner=first),
        Conv1x1(2),
        AdditiveCoupling(2, context_features, conditioner=last, mask="last"),
    ]


def convolutions() -> Flow:
    """Images through every invertible convolution."""
    shape = (2, 2, 2)
    parts = [EmergingConv(shape, 3), PeriodicConv(shape, 2), WoodburyConv(shape, 1, 1)]
    return cnf(8, transforms=[Flatten(shape), *(perturbed(part, 0.1) for part in parts)])


FLOWS: dict[str, Callable[[], Flow]] = {
    "cnf": cnf,
    "cnf with context": lambda: cnf(2, 3),
    "two blocks": lambda: cnf(blocks=2),
    "standardized": lambda: cnf(transforms=[Standardize.from_data(3 + 2 * torch.randn(50, 2))]),
    "normal scores and whitened": lambda: cnf(
        transforms=[normal_scores(torch.randn(500, 2)), Whiten.from_data(torch.randn(50, 2))]
    ),
    "scaled with context": lambda: scaled(cnf(2, 3, standardize=True)),
    "partly with context": lambda: Flow(
        [ContinuousTransform(part, solver=PRECISE) for part in (mlp(2, 3), mlp())]
    ),
    "actnorm": lambda: cnf(transforms=[perturbed(ActNorm(2))]),
    "couplings with context": lambda: cnf(2, 3, transforms=couplings(3)),
    "planar and radial": lambda: cnf(transforms=[perturbed(Planar(2)), perturbed(Radial(2))]),
    "exact lipschitz with context": lambda: cnf(
        2, 3, transforms=[lipschitz(2, 3, lipschitz=0.5)], skip=False
    ),
    "learnt affine with context": lambda: cnf(2, 3, transforms=[Affine(2)]),
    "linear": lambda: Flow([ContinuousTransform(perturbed(LinearField(2)), solver=PRECISE)]),
    "maf": lambda: perturbed(build("maf", 2, size=6), 0.1),
    "realnvp with context": lambda: perturbed(build("realnvp", 2, 3, size=6), 0.1),
    "default layers": lambda: perturbed(
        CNF(2, hidden_features=(8, 8), frequency=1.0, solver=PRECISE), 0.02
    ),
    "time features": lambda: Flow([ContinuousTransform(mlp(time_features=2), solver=PRECISE)]),
    "residual": lambda: Flow([ContinuousTransform(residual(), solver=PRECISE)]),
    "conv with context": lambda: Flow([ContinuousTransform(conv((1, 1, 2), 3), solver=PRECISE)]),
    "residual flow with context": lambda: cnf(
        2, 3, transforms=[residual_flow(lipschitz_mlp(2, 3))]
    ),
    "learnt end time": lambda: Flow(
        [ContinuousTransform(mlp(), solver=PRECISE, end_time=1.4, learn_end_time=True)]
    ),
    "potential with context": lambda: Flow([ContinuousTransform(potential(2, 3), solver=PRECISE)]),
    "user": lambda: Flow(
        [ContinuousTransform(perturbed(ModuleField(UserNetwork(2), 2)), solver=PRECISE)]
    ),
}
"""Exact flows of the plane."""

EXACT_FLOWS: dict[str, Callable[[], Flow]] = {
    **FLOWS,
    "logit": lambda: cnf(transforms=[Logit(2)]),
    "unconstrain": lambda: cnf(transforms=[Unconstrain(["positive", ("periodic", -1, 1)])]),
    "unconstrained circles": lambda: cnf(
        3, transforms=[Unconstrain(["positive", ("circle", -1, 1), ("circle", 0, 24)])]
    ),
    "sphere with context": lambda: cnf(3, 2, manifold=Sphere(3)),
    "torus": lambda: cnf(2, manifold=Torus(2), base=von_mises_fisher(Torus(2))),
    "sphere, circle and line": lambda: cnf(5, manifold=MANIFOLDS["sphere, circle and line"]),
    "image": lambda: cnf(4, transforms=[Flatten((1, 2, 2)), Permute([3, 1, 0, 2])]),
    "couplings": lambda: perturbed(Flow(couplings())),
    "pseudo-invertible encoder": lambda: perturbed(PseudoInvertibleEncoder(couplings(), 1)),
    "glow with context": lambda: perturbed(
        Flow(glow((1, 4, 4), 3, levels=2, steps=1, hidden_channels=(4, 3))), 0.1
    ),
    "convolutions": convolutions,
    "multi-scale with context": multi_scale,
    "residual flows": lambda: Flow(
        [residual_flow(lipschitz_attention(2, 2)), residual_flow(lipschitz_mlp(4))]
    ),
}

SURJECTIVE_FLOWS: dict[str, Callable[[], Flow]] = {
    "absolute values": lambda: Flow([perturbed(Affine(2)), Abs(2)], HalfNormal(2)),
    "sorted": lambda: Flow([perturbed(Affine(2)), Sort(2)], OrderedNormal(2)),
    "sorted and an ODE": lambda: cnf(4, transforms=[Sort(4, point_features=2), gaps()]),
    "largest": lambda: cnf(3, transforms=[Maximum(3)]),
    "pooled": lambda: cnf(8, transforms=[Flatten((1, 2, 4)), MaxPool2d((1, 2, 4))]),
    "funnelled": lambda: cnf(8, transforms=[ConvFunnel((1, 2, 4), hidden_channels=()), funnel()]),
    "sliced with context": lambda: cnf(4, 3, transforms=[gaussian_slice()]),
    "sliced by a flow with context": lambda: cnf(4, 3, transforms=[conditional_slice()]),
    "sliced by an ODE with context": lambda: Flow([slice_along_a_path(), perturbed(Affine(2))]),
}
"""Flows with an exact likelihood, whose data are drawn given z."""


def gaps() -> LogGaps:
    """Gaps of points in the plane."""
    return LogGaps(4, point_features=2)


def funnel() -> MLPFunnel:
    """A funnel from two numbers to one."""
    return MLPFunnel(2, 1, dropped=ConditionalNormal(1, 1, hidden_features=()))


def gaussian_slice() -> Slice:
    """A slice by a Gaussian."""
    return perturbed(Slice(4, 2, 3, dropped=ConditionalNormal(2, 5, hidden_features=())))


def slice_along_a_path() -> Slice:
    """A slice by a conditional flow that follows an ODE."""
    return Slice(4, 2, 3, dropped=Flow([ContinuousTransform(mlp(2, 5), solver=PRECISE)]))


def flowified() -> Chain:
    """A convolution, and a layer with more outputs."""
    convolution = FlowifiedConv2d((1, 2, 4), 2, 2, hidden_channels=(3,))
    return perturbed(Chain([convolution, LeakyReLU(4), FlowifiedLinear(4, 5)]), 0.1)


def conditional_slice() -> Slice:
    """A slice by a conditional flow."""
    return Slice(4, 2, 3, dropped=perturbed(build("realnvp", 2, 5, size=6), 0.1))


BOUNDS: dict[str, Callable[[], Flow]] = {
    "dequantized image": lambda: cnf(
        4, transforms=[Flatten((1, 2, 2)), Dequantize(4, 3), Logit(4)]
    ),
    "integer column": lambda: cnf(transforms=[Unconstrain([("interval", 2, 3), "integer"])]),
    "augmented": lambda: cnf(2, augment=1),
    "augmented with context": lambda: cnf(
        2, 3, transforms=[Affine(2), Augment(2, 2, 3, hidden_features=(8,))]
    ),
    "augmented without context in a conditional flow": lambda: cnf(
        2, 3, transforms=[perturbed(Augment(2, 1, hidden_features=(4,)))]
    ),
    "augmented inside": lambda: cnf(
        3, transforms=[FactorOut([Augment(2, 1, hidden_features=())], 3)]
    ),
    "signs": lambda: cnf(transforms=[Inverse(Abs(2))]),
    "integers": lambda: cnf(transforms=[Inverse(Round(2))]),
}
"""Flows whose likelihood is a lower bound."""

STOCHASTIC_FLOWS: dict[str, Callable[[], Flow]] = {
    "points in any order": lambda: cnf(4, transforms=[StochasticPermutation(4, point_features=2)]),
    "autoencoder": lambda: cnf(
        3, transforms=[VAE(*(ConditionalNormal(*size) for size in ((1, 3), (3, 1))))]
    ),
    "random steps": lambda: Flow(
        [part for part in (make() for make in KERNELS.values()) if not part.context_features]
    ),
    "flowified": lambda: Flow([flowified()]),
    "dequantized and sliced": lambda: cnf(4, transforms=[Dequantize(4, 3), Slice(4, 2)]),
}
"""Flows that draw both ways, whose likelihood is a lower bound."""

UNDONE_FLOWS = {**EXACT_FLOWS, **BOUNDS}
"""What the way to the data undoes."""

WITHOUT_DENSITY: dict[str, Callable[[], Flow]] = {
    "low-dimensional noise": lambda: Flow(couplings(), LowDimensionalNormal(2, 1))
}
"""Flows that can be drawn from alone."""

EVERY_FLOW = {**EXACT_FLOWS, **SURJECTIVE_FLOWS, **BOUNDS, **STOCHASTIC_FLOWS}

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
    x = torch.randn(*batch, *getattr(module, "event_shape", (module.features,)))
    x = inside(getattr(module, "support", None), x)
    size = module.context_features
    context = torch.randn(*batch, size) if size else None
    if getattr(module, "likelihood", None) == "on_manifold":
        start = x.to(next(module.parameters()).dtype)
        with torch.no_grad():
            x = module.to_data(module.to_base(start, context), context).to(x.dtype)
    return x, context


def base_rows_for(transform: Transform, *batch: int) -> Tensor:
    """Random rows of the base side of a transform."""
    return inside(transform.codomain, torch.randn(*batch, transform.base_features))


def fitting_flow(transform: Transform) -> Flow:
    """The transform, and a base that lives on its codomain."""
    codomain = transform.codomain
    if isinstance(codomain, OrderedVector):
        size, points = transform.base_features, codomain.point_features
        return Flow([transform], OrderedNormal(size, point_features=points))
    while hasattr(codomain, "base_constraint"):
        codomain = codomain.base_constraint
    if getattr(codomain, "is_discrete", False):
        return Flow([transform], TorchBase(Independent(Poisson(torch.ones(transform.features)), 1)))
    positive = getattr(codomain, "lower_bound", None) == 0
    return Flow([transform], HalfNormal(transform.base_features) if positive else None)


def inside(support: Constraint | None, x: Tensor) -> Tensor:
    """Real numbers `x`, mapped into `support`; None is for all real numbers."""
    if isinstance(support, OrderedVector):
        return sorted_points(x, support.point_features)
    if hasattr(support, "manifold"):
        return support.manifold.project(x)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if hasattr(support, "cseq"):
        parts = zip(support.cseq, x.unbind(-1), strict=True)
        return torch.stack([inside(part, column) for part, column in parts], -1)
    if hasattr(support, "upper_bound"):
        x = support.lower_bound + (support.upper_bound - support.lower_bound) * x.sigmoid()
    elif hasattr(support, "lower_bound"):
        x = support.lower_bound + x.exp()
    return x.round() if support is not None and support.is_discrete else x


def seeded() -> torch.Generator:
    """A generator that always draws the same."""
    return torch.Generator().manual_seed(0)
