"""Laws of maximum likelihood: the loss is that of the flow, by the cheapest divergence allowed."""

import math

import pytest
import torch
from torch import nn
from zoo import (
    COARSE,
    EVERY_FLOW,
    EXACT_FLOWS,
    FLOWS,
    PRECISE,
    UserNetwork,
    cnf,
    mlp,
    perturbed,
    rows_for,
    seeded,
)

from cnf import CNF, Exact, Flow, Hutchinson, ModuleField, ODESolver, count_evaluations
from cnf.objectives import FlowMatching, MaximumLikelihood, Objective, ReverseKL, weighted_mean
from cnf.regularizers import kinetic_energy
from cnf.transforms import Affine, ContinuousTransform
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

BACKPROP = ODESolver(rtol=1e-9, atol=1e-9, gradient="backprop")
DEEP = {"hidden_features": (8, 8, 8), "activation": "tanh"}
"""A field without closed form for its divergence."""


def gradients(loss, flow):
    return torch.autograd.grad(loss, list(flow.parameters()))


def loss_with_seed(objective, x, seed, context=None):
    return objective(x, context, generator=torch.Generator().manual_seed(seed)).item()


def is_random(objective, x):
    """Whether the loss depends on the generator."""
    return len({loss_with_seed(objective, x, seed) for seed in range(3)}) > 1


def deep_cnf(features, **settings):
    return perturbed(CNF(features, **DEEP, **settings))


@pytest.mark.parametrize("make", EVERY_FLOW.values(), ids=EVERY_FLOW)
def test_the_loss_is_minus_the_mean_log_prob_and_so_is_its_gradient(make):
    flow = make().using(solver=COARSE)
    x, context = rows_for(flow, 4)

    loss = MaximumLikelihood(flow, solver=COARSE)(x, context, generator=seeded())
    expected = -flow.log_prob(x, context, generator=seeded()).mean()

    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-7)
    pairs = zip(gradients(loss, flow), gradients(expected, flow), strict=True)
    for gradient, expected_gradient in pairs:
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("context_features", [0, 3])
def test_the_loss_of_a_linear_flow_and_its_gradient_have_a_closed_form(context_features):
    field = perturbed(LinearField(2, context_features))
    flow = Flow([ContinuousTransform(field)])
    x, context = rows_for(flow, 5)

    loss = MaximumLikelihood(flow, solver=BACKPROP)(x, context)
    z, ladj = field.solution(x, context, start=1.0, end=0.0)
    expected = -(-0.5 * z.square().sum(-1) - math.log(2 * math.pi) + ladj).mean()

    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-8)
    pairs = zip(gradients(loss, flow), gradients(expected, flow), strict=True)
    for gradient, expected_gradient in pairs:
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-7)


def test_the_default_solver_is_precise_enough_for_a_step():
    flow = FLOWS["cnf"]()
    x, _ = rows_for(flow, 50)

    loss, expected = MaximumLikelihood(flow)(x), -flow.log_prob(x).mean()

    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-2)
    flat = [torch.cat([g.flatten() for g in gradients(value, flow)]) for value in (loss, expected)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.999


def test_a_flow_without_ode_has_the_same_loss():
    flow = Flow([perturbed(Affine(3))])
    x, _ = rows_for(flow, 6)
    assert torch.equal(MaximumLikelihood(flow)(x), -flow.log_prob(x).mean())


RULE = {
    "closed form, 9 features": (lambda: perturbed(CNF(9, hidden_features=(8, 8))), False),
    "no closed form, 8 features": (lambda: deep_cnf(8), False),
    "no closed form, 9 features": (lambda: deep_cnf(9), True),
    "user's network, 8 features": (
        lambda: Flow([ContinuousTransform(perturbed(ModuleField(UserNetwork(8), 8)))]),
        False,
    ),
    "user's network, 9 features": (
        lambda: Flow([ContinuousTransform(perturbed(ModuleField(UserNetwork(9), 9)))]),
        True,
    ),
    "one of two fields is dear": (
        lambda: Flow([ContinuousTransform(perturbed(LinearField(9))), *deep_cnf(9).chain]),
        True,
    ),
    "the flow names Exact": (lambda: deep_cnf(9, divergence=Exact()), False),
    "the flow names Hutchinson": (
        lambda: perturbed(CNF(2, hidden_features=(8, 8), divergence=Hutchinson())),
        True,
    ),
}


@pytest.mark.parametrize(("make", "random"), RULE.values(), ids=RULE)
def test_the_divergence_is_estimated_only_where_the_exact_one_is_dear_or_the_flow_says_so(
    make, random
):
    flow = make()
    x, _ = rows_for(flow, 4)
    assert is_random(MaximumLikelihood(flow), x) is random


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson()], ids=str)
@pytest.mark.parametrize("own", [None, Exact(), Hutchinson()], ids=str)
def test_the_divergence_of_the_objective_goes_before_that_of_the_flow(divergence, own):
    flow = deep_cnf(9, divergence=own)
    x, _ = rows_for(flow, 4)
    objective = MaximumLikelihood(flow, divergence=divergence)
    assert is_random(objective, x) is not divergence.is_exact


def test_the_loss_by_hutchinson_is_unbiased():
    flow = deep_cnf(9)
    x, _ = rows_for(flow, 300)
    solver = ODESolver(method="rk4", steps=4, gradient="backprop")

    exact = MaximumLikelihood(flow, solver=solver, divergence=Exact())
    estimate = MaximumLikelihood(flow, solver=solver)
    with torch.no_grad():
        losses = torch.tensor([loss_with_seed(estimate, x, seed) for seed in range(20)])
        expected = exact(x)

    standard_error = losses.std() / math.sqrt(20)
    assert (losses.mean() - expected).abs() < 4 * standard_error
    assert standard_error < 0.05


def test_the_same_generator_gives_the_same_loss_and_spares_the_global_one():
    flow = deep_cnf(9)
    x, _ = rows_for(flow, 4)
    objective = MaximumLikelihood(flow)
    before = torch.get_rng_state()

    assert loss_with_seed(objective, x, 3) == loss_with_seed(objective, x, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_generator_the_probes_are_the_global_ones():
    flow = deep_cnf(9)
    x, _ = rows_for(flow, 4)
    objective = MaximumLikelihood(flow)

    first = objective(x).item()

    assert objective(x).item() != first
    torch.manual_seed(5)
    again = objective(x).item()
    torch.manual_seed(5)
    assert objective(x).item() == again


def test_the_flow_keeps_its_own_solver_and_divergence_and_log_prob():
    flow = FLOWS["two blocks"]()
    x, _ = rows_for(flow, 4)
    parts = [(part, part.solver, part.divergence) for part in flow.chain]
    before = flow.log_prob(x)

    objective = MaximumLikelihood(flow, solver=BACKPROP, divergence=Hutchinson())
    objective(x).backward()

    assert objective.flow is flow
    for part, (old, solver, divergence) in zip(flow.chain, parts, strict=True):
        assert part is old
        assert part.solver is solver
        assert part.divergence is divergence
    assert torch.equal(flow.log_prob(x), before)
    assert flow.likelihood == "exact"


def test_the_solver_of_the_objective_is_the_one_used():
    flow = FLOWS["cnf"]()
    x, _ = rows_for(flow, 4)
    objective = MaximumLikelihood(
        flow, solver=ODESolver(method="rk4", steps=5, gradient="backprop")
    )
    with count_evaluations(flow) as nfe:
        loss = objective(x)
        loss.backward()
    assert nfe.value == 4 * 5


def test_the_solver_of_the_objective_reaches_nested_transforms():
    flow = EXACT_FLOWS["multi-scale with context"]()
    objective = MaximumLikelihood(
        flow, solver=ODESolver(method="rk4", steps=5, gradient="backprop")
    )
    with count_evaluations(flow) as nfe:
        objective(*rows_for(flow, 4))
    assert nfe.value == 2 * 4 * 5


def test_the_default_of_the_objective_is_cheaper_than_a_precise_flow():
    flow = FLOWS["cnf"]()
    x, _ = rows_for(flow, 4)
    with count_evaluations(flow) as training:
        MaximumLikelihood(flow)(x)
    with count_evaluations(flow) as reporting:
        flow.log_prob(x)
    assert training.value < reporting.value / 2


@pytest.mark.parametrize("make", [lambda: deep_cnf(9), FLOWS["cnf"]], ids=["estimate", "exact"])
def test_the_loss_does_not_depend_on_the_mode(make):
    flow = make()
    x, _ = rows_for(flow, 4)
    objective = MaximumLikelihood(flow)
    assert loss_with_seed(objective.train(), x, 1) == loss_with_seed(objective.eval(), x, 1)


def test_the_parameters_are_those_of_the_flow():
    flow = FLOWS["cnf with context"]()
    objective = MaximumLikelihood(flow)
    objective(*rows_for(flow, 3))
    assert [id(p) for p in objective.parameters()] == [id(p) for p in flow.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_loss_has_the_dtype_of_the_flow(dtype):
    field = mlp().to(dtype)
    flow = Flow([ContinuousTransform(field, solver=PRECISE)]).to(dtype)
    x = torch.randn(4, 2, dtype=dtype)

    loss = MaximumLikelihood(flow)(x)
    loss.backward()

    assert loss.dtype == dtype
    assert {p.grad.dtype for p in flow.parameters() if p.grad is not None} == {dtype}
    torch.testing.assert_close(
        loss.double(), MaximumLikelihood(flow.double())(x.double()), rtol=0, atol=1e-3
    )


def test_rows_count_alike():
    flow = FLOWS["cnf with context"]()
    x, context = rows_for(flow, 6)
    objective = MaximumLikelihood(flow, solver=BACKPROP)

    whole = objective(x, context)
    halves = [objective(x[part], context[part]) for part in (slice(0, 3), slice(3, 6))]

    torch.testing.assert_close(whole, sum(halves) / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("regularizers", [None, {kinetic_energy: 0.3}], ids=["plain", "costly"])
def test_a_row_of_weight_two_counts_as_two_rows(regularizers):
    flow = FLOWS["cnf with context"]()
    x, context = rows_for(flow, 3)
    objective = MaximumLikelihood(flow, regularizers, solver=BACKPROP)
    twice = [0, 0, 1, 2]

    weighted = objective(x, context, weight=torch.tensor([1.5, 0.75, 0.75]))
    repeated = objective(x[twice], context[twice])

    torch.testing.assert_close(weighted, repeated, rtol=0, atol=1e-7)
    for gradient, expected in zip(*(gradients(v, flow) for v in (weighted, repeated)), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_weights_of_one_change_nothing():
    flow = FLOWS["cnf"]()
    x, _ = rows_for(flow, 4)
    objective = MaximumLikelihood(flow)
    torch.testing.assert_close(objective(x, weight=torch.ones(4)), objective(x), rtol=0, atol=1e-14)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("objective", [MaximumLikelihood, FlowMatching])
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(3), ValueError, r"one entry for each row, shape \(4,\); got \(3,\)"),
        (torch.ones(4, 1), ValueError, r"one entry for each row, shape \(4,\); got \(4, 1\)"),
        (torch.tensor(1.0), ValueError, r"one entry for each row, shape \(4,\); got \(\)"),
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), ValueError, "weight must be at least 0.*row 1"),
        (torch.tensor([1.0, 1.0, math.nan, 1.0]), ValueError, "weight must be finite.*row 2"),
        (torch.ones(4, dtype=torch.int64), ValueError, "weight must have a floating dtype"),
        (torch.ones(4, dtype=torch.float64), ValueError, "weight must have the model's dtype"),
        ([1.0] * 4, TypeError, r"weight must be a torch\.Tensor; got list"),
    ],
)
def test_bad_weights_are_refused(objective, weight, error, message):
    with pytest.raises(error, match=message):
        objective(CNF(2).float())(torch.zeros(4, 2).float(), weight=weight)


def test_costs_keep_their_precision_under_autocast():
    """A cost of 1 + 2^-12 would be 1 in bfloat16."""

    def constant(evaluation):
        return torch.full_like(evaluation.divergence, 1 + 2**-12)

    flow = Flow([ContinuousTransform(LinearField(2))]).float()
    x = torch.zeros(4, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        costly, plain = (MaximumLikelihood(flow, r)(x) for r in ({constant: 1.0}, None))
    torch.testing.assert_close((costly - plain).item(), 1 + 2**-12, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "takes_data"),
    [(MaximumLikelihood, True), (FlowMatching, True), (ReverseKL, False)],
)
def test_an_objective_says_whether_it_takes_data(objective, takes_data):
    assert objective.takes_data is takes_data


@pytest.mark.usefixtures("shapes_unchecked")
def test_what_is_no_flow_is_refused():
    with pytest.raises(TypeError, match=r"flow must be a cnf\.Flow; got Linear"):
        MaximumLikelihood(nn.Linear(2, 2))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "rk4"}, "solver must be a ODESolver; got str"),
        ({"divergence": "exact"}, "divergence must be a Divergence; got str"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused(settings, message):
    with pytest.raises(TypeError, match=message):
        MaximumLikelihood(CNF(2), **settings)(torch.zeros(3, 2))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 3), r"x must have shape \(\*batch, 2\); got \(3, 4\)"),
        (torch.zeros(3, 2), None, r"context must have shape \(\*batch, 3\).*got None"),
        (torch.zeros(3, 2), torch.zeros(3, 1), r"context must have shape .*got \(3, 1\)"),
        (torch.full((3, 2), math.nan), torch.zeros(3, 3), "x must be finite.*rows 0, 1, 2"),
    ],
)
def test_bad_rows_are_refused_by_name(x, context, message):
    objective = MaximumLikelihood(CNF(2, 3).float())
    context = None if context is None else context.float()
    with pytest.raises(ValueError, match=message):
        objective(x.float(), context)


def test_an_empty_minibatch_is_refused():
    with pytest.raises(ValueError, match=r"at least one row; got batch shape \(0,\)"):
        MaximumLikelihood(CNF(2))(torch.zeros(0, 2))


X = torch.zeros(3, 2, dtype=torch.float64)


class MeanAtTheBase(Objective):
    """An objective of one's own: its hook, and nothing else."""

    def _loss(self, x, context, weight, draws, generator):
        z = self.flow.to_base(x, context, generator=generator)
        return weighted_mean(z.square().sum(-1), weight)


def test_an_objective_of_ones_own_is_given_what_its_call_was():
    flow = cnf(2, 3)
    x, context = rows_for(flow, 4)
    weight = torch.tensor([0.0, 1.0, 2.0, 1.0])
    loss = MeanAtTheBase(flow)(x, context[0], weight=weight)
    squares = flow.to_base(x, context[:1]).square().sum(-1)
    torch.testing.assert_close(loss, (weight * squares).mean())


def test_an_objective_without_the_hook_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Objective(cnf(2))


@pytest.mark.parametrize("parent", [Objective, MeanAtTheBase])
def test_the_call_of_an_objective_is_final(parent):
    with pytest.raises(TypeError, match=r"Mine must not override forward.*final; write _loss\(x,"):

        class Mine(parent):
            def forward(self, x):
                return x.sum()


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (MeanAtTheBase, {"x": X, "draws": 4}, "draws must be None, because MeanAt"),
        (MeanAtTheBase, {"x": X.expand(4, 3, 2)}, r"one batch axis.*batch shape \(4, 3\)"),
        (
            lambda flow: ReverseKL(flow, torch.sum),
            {"x": X},
            "x and weight must be None, because ReverseKL takes no data; give contexts as context=",
        ),
        (lambda flow: ReverseKL(flow, torch.sum), {"draws": 0}, "draws must be at least 1; got 0"),
    ],
)
def test_what_an_objective_does_not_take_is_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(cnf(2))(**arguments)


@pytest.mark.usefixtures("shapes_unchecked")
def test_every_objective_refuses_a_seed_in_place_of_a_generator():
    for make in (MeanAtTheBase, lambda flow: ReverseKL(flow, torch.sum)):
        with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None; got 7"):
            make(cnf(2))(generator=7)
