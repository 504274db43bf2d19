"""Laws: no number depends on who asks for gradients, nor on how its inputs lie in memory."""

import contextlib

import pytest
import torch
from torch import nn
from training_runs import config
from zoo import (
    ESTIMATES,
    EVERY_FLOW,
    FIELDS,
    LAYERED,
    MLP_FIELDS,
    NEURAL_ODES,
    POTENTIAL_FIELDS,
    TRANSFORMS,
    UserNetwork,
    base_rows_for,
    perturbed,
    rows_for,
    seeded,
)

from cnf import (
    Exact,
    Flow,
    FlowMatching,
    Hutchinson,
    MaximumLikelihood,
    MLPField,
    ModuleField,
    ODESolver,
    Standardize,
    certify,
    fit,
)
from cnf.data.densities import GaussianMixture
from cnf.diagnostics import check_gradients
from cnf.flows import log_prob_in_chunks
from cnf.metrics import bits_per_dim, effective_sample_size, gaussian_log_prob, log_mean_exp
from cnf.objectives import OptimalTransport
from cnf.plots import plot_pairs, plot_samples, plot_trajectories
from cnf.regularizers import (
    directional_derivative,
    hjb_residual,
    jacobian_frobenius,
    kinetic_energy,
    total_derivative,
)
from cnf.transforms import ActNorm, ContinuousTransform
from cnf.transforms.continuous import map_continuous
from cnf.vector_fields import PotentialField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

GRADIENTS = ["adjoint", "backprop", "checkpoint"]
KINDS = {
    name: make
    for name, make in FIELDS.items()
    if name not in {**MLP_FIELDS, **POTENTIAL_FIELDS}
    or name in LAYERED
    or name in ("time features with context", "potential blend", "potential concatsquash")
}
"""One specimen of each way to make a divergence."""


def plain(x):
    return x.clone()


def leaf(x):
    return x.clone().requires_grad_()


def behind_a_parameter(x):
    return x * nn.Parameter(torch.ones(()))


def view_made_without_gradient(x):
    """As torch hands tensors to the forward pass of an `autograd.Function`."""
    with torch.no_grad():
        return leaf(x)[...]


def detached(x):
    return leaf(x).detach()


def strided(x):
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def with_the_negative_bit(x):
    lazy = torch.view_as_complex(torch.stack([torch.zeros_like(x), -x], -1)).conj().imag
    assert lazy.is_neg()
    return lazy


def nothing(module):
    return contextlib.nullcontext()


@contextlib.contextmanager
def frozen(module):
    parameters = [part for part in module.parameters() if part.requires_grad]
    for part in parameters:
        part.requires_grad_(False)
    yield
    for part in parameters:
        part.requires_grad_()


@contextlib.contextmanager
def evaluating(module):
    module.eval()
    yield
    module.train()


def no_gradient(module):
    return torch.no_grad()


def inference(module):
    return torch.inference_mode()


MODES = {
    "gradients of the parameters": (nothing, plain, plain),
    "of what stands in front": (nothing, behind_a_parameter, behind_a_parameter),
    "of x alone": (frozen, leaf, plain),
    "of the context alone": (frozen, plain, leaf),
    "of nothing": (frozen, detached, detached),
    "a view made without gradient": (nothing, view_made_without_gradient, plain),
    "no gradient": (no_gradient, leaf, view_made_without_gradient),
    "inference mode": (inference, leaf, plain),
    "evaluation mode and strides": (evaluating, strided, strided),
    "the negative bit": (nothing, with_the_negative_bit, with_the_negative_bit),
    "the negative bit without gradient": (no_gradient, with_the_negative_bit, strided),
}
"""What is around a call, and how its points and contexts are made."""


def in_every_mode_the_same(module, values, x, context, *, modes=tuple(MODES)):
    """`values` takes points and contexts, and returns tensors."""
    with torch.no_grad():
        expected = values(x, context)
    for name in modes:
        around, of_x, of_context = MODES[name]
        points, given = of_x(x), None if context is None else of_context(context)
        with around(module):
            found = values(points, given)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(
                one.detach().clone(), other, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def coarse(gradient):
    """A first step and another."""
    return ODESolver(method="euler", steps=2, gradient=gradient)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_field_has_the_same_path_and_divergence_whoever_asks_for_gradients(make):
    field = make()
    x, context = rows_for(field, 2, 3)
    bottlenecks = [False, True] if field.bottleneck else [False]
    for divergence in (Exact(), *(Hutchinson(bottleneck=narrow) for narrow in bottlenecks)):
        part = ContinuousTransform(field, solver=coarse("adjoint"), divergence=divergence)

        def values(x, context, part=part):
            return part.to_base_and_ladj(x, context, generator=seeded())

        in_every_mode_the_same(part, values, x, context)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", [FIELDS["user with context"], FIELDS["potential blend"]])
def test_costs_are_the_same_whoever_asks_for_gradients(make, gradient):
    field = make()
    x, context = rows_for(field, 3)
    costs = [kinetic_energy, jacobian_frobenius, directional_derivative, total_derivative]
    costs += [hjb_residual] if isinstance(field, PotentialField) else []
    part = ContinuousTransform(field, solver=coarse(gradient), divergence=Exact())

    def values(x, context):
        return part.to_base_with_costs(x, context, regularizers=costs)

    in_every_mode_the_same(part, values, x, context)


@pytest.mark.parametrize("solver", [ODESolver(), ODESolver(gradient="checkpoint")], ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_an_adaptive_solve_is_the_same_whoever_asks_for_gradients(batch, solver):
    field = perturbed(ModuleField(UserNetwork(2, 3), 2, 3))
    flow = Flow([ContinuousTransform(field, solver=solver)])
    x, context = rows_for(field, *batch)
    in_every_mode_the_same(flow, lambda x, context: [flow.log_prob(x, context)], x, context)


@pytest.mark.parametrize(
    "make", {**TRANSFORMS, **ESTIMATES}.values(), ids={**TRANSFORMS, **ESTIMATES}
)
def test_a_transform_gives_the_same_numbers_whoever_asks_for_gradients(make):
    transform = map_continuous(make(), lambda part: part.using(solver=coarse("adjoint")))
    x, context = rows_for(transform, 2, 3)
    z = base_rows_for(transform, 2, 3)

    def values(x, context):
        there = transform.to_base_and_ladj(x, context, generator=seeded())
        without_ladj = transform.to_base(x, context, generator=seeded())
        return *there, without_ladj

    def back(z, context):
        there = transform.to_data_and_ladj(z, context, generator=seeded())
        return *there, transform.to_data(z, context, generator=seeded())

    in_every_mode_the_same(transform, values, x, context)
    in_every_mode_the_same(transform, back, z, context)


@pytest.mark.parametrize("make", EVERY_FLOW.values(), ids=EVERY_FLOW)
def test_a_flow_gives_the_same_numbers_whoever_asks_for_gradients(make):
    flow = make().using(solver=coarse("adjoint"))
    x, context = rows_for(flow, 3)
    z = base_rows_for(flow.chain, 3)

    def values(x, context):
        return flow.log_prob(x, context, generator=seeded()), flow.to_base(
            x, context, generator=seeded()
        )

    def draws(z, context):
        x = flow.to_data(z, context, generator=seeded())
        return x, *flow.rsample_and_log_prob((2,), context, generator=seeded())

    # The others are those of its transforms.
    modes = ["of what stands in front", "of x alone", "inference mode", "the negative bit"]
    in_every_mode_the_same(flow, values, x, context, modes=modes)
    in_every_mode_the_same(flow, draws, z, context, modes=modes)


@pytest.mark.parametrize("make", NEURAL_ODES.values(), ids=NEURAL_ODES)
def test_a_neural_ode_gives_the_same_numbers_whoever_asks_for_gradients(make):
    ode = make()
    ode.solver = coarse("adjoint")
    x, context = rows_for(ode, 3)
    in_every_mode_the_same(ode, lambda x, context: [ode(x, context)], x, context)


def test_the_divergence_of_a_field_by_autograd_is_that_of_its_jacobian_in_the_first_stage():
    """By the default adjoint, whose solve hands on views of a leaf, made without gradient."""
    matrix = torch.tensor([[0.3, -1.0], [0.5, 0.4]])

    class Linear(nn.Module):
        def forward(self, t, x):
            return x @ matrix.T

    flow = Flow([ContinuousTransform(ModuleField(Linear(), 2), solver=coarse("adjoint"))])
    _, ladj = flow.to_base_and_ladj(torch.randn(4, 2, requires_grad=True))
    torch.testing.assert_close(ladj, torch.full((4,), -0.7))


def points_in(figure):
    """Where the points of a plot are."""
    clouds = [cloud for panel in figure.axes for cloud in panel.collections]
    return [torch.from_numpy(cloud.get_offsets().data) for cloud in clouds]


TIMES = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
DOORS = {
    "fit": lambda flow, x, z: fit(flow, x, config(2, batch_size=3), validation=x).loss,
    "initialize": lambda flow, x, z: flow.initialize(x) or [*flow.parameters()],
    "standardize": lambda flow, x, z: Standardize.from_data(x).to_base(x),
    "likelihood": lambda flow, x, z: MaximumLikelihood(flow)(x),
    "flow matching": lambda flow, x, z: FlowMatching(
        Flow(flow.chain[-1:]), pairing=OptimalTransport()
    )(x, generator=seeded()),
    "chunks": lambda flow, x, z: log_prob_in_chunks(flow, x, chunk_size=4),
    "trajectory": lambda flow, x, z: flow.trajectory(x, with_the_negative_bit(TIMES)),
    "standard error": lambda flow, x, z: flow.log_prob_and_error(x),
    "certify": lambda flow, x, z: certify(flow, x)["round_trip"].value,
    "gradients": lambda flow, x, z: check_gradients(flow, x).passed,
    "base": lambda flow, x, z: flow.base.log_prob(x),
    "a distribution": lambda flow, x, z: flow().log_prob(x),
    "metrics": lambda flow, x, z: [
        bits_per_dim(x[:, 0], 2),
        effective_sample_size(x),
        log_mean_exp(x),
        gaussian_log_prob(x, x),
    ],
    "a target": lambda flow, x, z: GaussianMixture(
        means=z, covariances=torch.eye(2).expand(6, 2, 2), weights=z[:, 0].softmax(0)
    ).log_prob(x),
    "plot of samples": lambda flow, x, z: points_in(plot_samples(x)),
    "plot of trajectories": lambda flow, x, z: points_in(plot_trajectories(x.expand(2, 6, 2))),
    "plot of pairs": lambda flow, x, z: points_in(plot_pairs(x, ["a", "b"], data=z)),
}
"""What takes tensors of a user: a flow, points and other numbers."""


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_every_door_takes_lazy_views(door):
    def flow():
        torch.manual_seed(0)
        field = MLPField(2, hidden_features=(4, 4))
        return Flow([ActNorm(2), ContinuousTransform(field, solver=coarse("backprop"))])

    x, z = torch.randn(6, 2), torch.randn(6, 2)
    expected = door(flow(), x, z)
    found = door(flow(), with_the_negative_bit(x), with_the_negative_bit(z))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
