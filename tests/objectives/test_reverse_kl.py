"""Laws of the reverse KL divergence: closed forms for normal targets, and importance weights."""

import math

import pytest
import torch
from test_objectives import BACKPROP, deep_cnf, gradients
from torch import nn
from torch.distributions import MultivariateNormal, Normal
from torch.utils.data import TensorDataset
from zoo import EXACT_FLOWS, cnf, conformal_embedding, perturbed, rows_for, seeded

from cnf import (
    CNF,
    Exact,
    Flow,
    Hutchinson,
    ODESolver,
    ReverseKL,
    TrainingConfig,
    count_evaluations,
    fit,
)
from cnf.bases import StandardNormal
from cnf.flows import MixtureOfFlows, log_normalizer
from cnf.metrics import effective_sample_size, log_mean_exp
from cnf.training import TrainingError
from cnf.transforms import (
    AdjustedLangevin,
    Affine,
    AnnealedDensity,
    Augment,
    ConditionalAffine,
    ContinuousTransform,
    Dequantize,
    Inverse,
    Langevin,
    LipschitzMLP,
    Logit,
    ResidualFlow,
    TruncatedSeries,
)
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
SCALE = torch.tensor([[1.2, 0.0], [0.4, 0.7]], dtype=torch.float64)
TARGET = MultivariateNormal(MEAN, scale_tril=SCALE)
LOG_Z = 2.3
QUICK = ODESolver(method="rk4", steps=5, gradient="backprop")


def normal_target(x):
    """An unnormalised normal density."""
    return TARGET.log_prob(x) + LOG_Z


def normal_given_context(x, context):
    """The mean is the sum of the features of the context."""
    return Normal(context.sum(-1, keepdim=True), 0.7).log_prob(x).sum(-1)


def linear_flow(context_features=0):
    field = perturbed(LinearField(2, context_features))
    return Flow([ContinuousTransform(field, solver=BACKPROP)])


def divergence_of(flow):
    """KL(q || p) - log Z of a linear flow from the normal target, in closed form."""
    field = flow.chain[0].vector_field
    mean, _ = field.solution(torch.zeros(2), start=0.0, end=1.0)
    factor = torch.linalg.matrix_exp(field.weight)
    law = MultivariateNormal(mean, factor @ factor.T)
    return torch.distributions.kl_divergence(law, TARGET) - LOG_Z


def test_loss_and_gradient_for_a_normal_target_are_on_average_their_closed_forms():
    """Within 4.5 standard errors of the mean over 20 steps."""
    flow = linear_flow()
    objective = ReverseKL(flow, normal_target, draws=2000, solver=QUICK)
    expected = divergence_of(flow)
    found = []
    for _ in range(20):
        loss = objective()
        parts = [loss, *gradients(loss, flow)]
        found.append(torch.cat([part.detach().flatten() for part in parts]))
    found = torch.stack(found)
    mean, error = found.mean(0), found.std(0) / 20**0.5
    wanted = torch.cat([part.flatten() for part in (expected, *gradients(expected, flow))])
    assert ((mean - wanted).abs() < 4.5 * error + 1e-4).all()
    assert (error < 0.02 * wanted.abs().max()).all()


def test_loss_and_gradient_are_those_of_the_draws_by_the_known_solution():
    flow = linear_flow(3)
    field, context = flow.chain[0].vector_field, torch.randn(4, 3)
    objective = ReverseKL(flow, normal_given_context, draws=5, solver=BACKPROP)
    loss = objective(context=context, generator=seeded())

    z = torch.randn(5, 4, 2, generator=seeded())
    x, ladj = field.solution(z, context, start=0.0, end=1.0)
    log_prob = Normal(0.0, 1.0).log_prob(z).sum(-1) - ladj
    expected = (log_prob - normal_given_context(x, context)).mean()

    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-7)
    pairs = zip(gradients(loss, flow), gradients(expected, flow), strict=True)
    for gradient, expected_gradient in pairs:
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", EXACT_FLOWS.values(), ids=EXACT_FLOWS)
def test_the_loss_is_the_mean_difference_of_log_densities_and_trains_every_flow(make):
    flow = make().using(solver=QUICK)
    _, context = rows_for(flow, 2)

    def log_density(x, context=None):
        shift = 0 if context is None else context.sum(-1)
        return -0.5 * x.flatten(-len(flow.event_shape)).square().sum(-1) + shift

    loss = ReverseKL(flow, log_density, draws=3, solver=QUICK)(context=context, generator=seeded())
    x, log_prob = flow.rsample_and_log_prob(3, context, generator=seeded())
    given = () if context is None else (context.expand(3, *context.shape),)

    torch.testing.assert_close(loss, (log_prob - log_density(x, *given)).mean())
    loss.backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_the_target_sees_a_context_for_every_draw():
    shapes = []

    def log_density(x, context):
        shapes.append((tuple(x.shape), tuple(context.shape)))
        return torch.cat([x, context], -1).sum(-1)

    ReverseKL(cnf(2, 3), log_density, draws=4)(context=torch.randn(5, 3))
    ReverseKL(cnf(2, 3), log_density, draws=4)(context=torch.randn(3))
    assert shapes == [((4, 5, 2), (4, 5, 3)), ((4, 2), (4, 3))]


def best_flow():
    """The linear flow from the standard normal to the normal target, by a logarithm of its scale.

    With A = log S, the mean is the integral of exp(s A) b over s in [0, 1], A^-1 (S - 1) b.
    """
    (a, _), (b, d) = SCALE.tolist()
    log_scale = torch.tensor(
        [[math.log(a), 0.0], [b * math.log(a / d) / (a - d), math.log(d)]], dtype=torch.float64
    )
    field = LinearField(2)
    with torch.no_grad():
        field.weight.copy_(log_scale)
        field.bias.copy_(torch.linalg.solve(SCALE - torch.eye(2), log_scale @ MEAN))
    return Flow([ContinuousTransform(field, solver=BACKPROP)])


def test_at_the_target_every_weight_is_the_normaliser():
    objective = ReverseKL(best_flow(), normal_target)
    log_weights = objective.log_weights(200)
    torch.testing.assert_close(log_weights, torch.full((200,), LOG_Z), rtol=0, atol=1e-5)
    assert effective_sample_size(log_weights) > 199.99
    torch.testing.assert_close(objective().item(), -LOG_Z, rtol=0, atol=2e-3)


def test_weights_estimate_the_normaliser_of_another_density():
    """Within 4 standard errors of the mean weight."""
    log_weights = ReverseKL(linear_flow(), normal_target).log_weights(20_000)
    weights = (log_weights - LOG_Z).exp()
    assert (weights.mean() - 1).abs() < 4 * weights.std() / 20_000**0.5
    assert abs(log_mean_exp(log_weights).item() - LOG_Z) < 0.1
    assert 1 < effective_sample_size(log_weights) < 19_000


def test_weights_take_no_gradient_and_the_flow_s_own_solver():
    flow = cnf(2, 3, solver=ODESolver(method="rk4", steps=7))
    objective = ReverseKL(flow, normal_given_context)
    with count_evaluations(flow) as nfe:
        log_weights = objective.log_weights(6, torch.randn(5, 3))
    assert nfe.value == 4 * 7
    assert log_weights.shape == (6, 5)
    assert not log_weights.requires_grad


def test_a_weight_may_be_zero():
    def half(x):
        return torch.where(x[..., 0] > 0, -0.5 * x.square().sum(-1), -math.inf)

    log_weights = ReverseKL(linear_flow(), half).log_weights(100)
    assert log_weights.isneginf().any()
    assert 1 < effective_sample_size(log_weights) < 100


def test_a_target_with_bounded_support_takes_a_flow_within_it():
    """A flat target on the unit square, whose flow draws within: log Z is 0."""
    flow = Flow([Logit(2), ContinuousTransform(LinearField(2)), perturbed(Affine(2))])
    log_weights = ReverseKL(flow, lambda x: torch.zeros(x.shape[:-1])).log_weights(4000)
    weights = log_weights.exp()
    assert (weights.mean() - 1).abs() < 4 * weights.std() / 4000**0.5


@pytest.mark.parametrize("log_weights", [False, True])
def test_the_generator_decides_the_draws_and_spares_the_global_one(log_weights):
    objective = ReverseKL(deep_cnf(9), lambda x: -x.square().sum(-1), draws=5)

    def value():
        return (
            objective.log_weights(5, generator=seeded())
            if log_weights
            else objective(generator=seeded())
        )

    before = torch.get_rng_state()
    assert torch.equal(value(), value())
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(objective(), objective())


@pytest.mark.parametrize(
    ("make", "divergence", "draws_probes"),
    [
        (lambda: deep_cnf(8), None, False),
        (lambda: deep_cnf(9), None, True),
        (lambda: deep_cnf(9), Exact(), False),
        (lambda: deep_cnf(2), Hutchinson(), True),
        (lambda: deep_cnf(9, divergence=Exact()), None, False),
    ],
)
def test_the_divergence_is_chosen_as_for_maximum_likelihood(make, divergence, draws_probes):
    """A divergence that draws no probes leaves the generator where the draws of the base did."""
    flow = make()
    objective = ReverseKL(flow, lambda x: -x.square().sum(-1), draws=4, divergence=divergence)
    used, expected = seeded(), seeded()
    objective(generator=used)
    flow.base.rsample(torch.Size([4]), generator=expected)
    assert torch.equal(used.get_state(), expected.get_state()) is not draws_probes


def test_the_solver_of_the_objective_is_the_one_used_and_the_flow_keeps_its_own():
    flow = cnf()
    solver = flow.chain[0].solver
    objective = ReverseKL(flow, normal_target, solver=QUICK)
    with count_evaluations(flow) as nfe:
        objective().backward()
    assert nfe.value == 4 * 5
    assert flow.chain[0].solver is solver


def draws_of_steps(flow, data=None, *, accumulation_steps=1, **settings):
    """The shapes of the draws of one step of training, part by part."""
    shapes = []

    def log_density(x, context=None):
        shapes.append(tuple(x.shape[:-1]))
        return -0.5 * x.square().sum(-1)

    objective = ReverseKL(flow, log_density, **settings)
    fit(
        objective,
        data,
        TrainingConfig(steps=1, accumulation_steps=accumulation_steps, progress=False),
    )
    return shapes


def test_parts_of_a_step_share_its_draws():
    assert draws_of_steps(Flow([Affine(2)])) == [(512,)]
    assert draws_of_steps(Flow([Affine(2)]), accumulation_steps=4, draws=10) == [
        (3,),
        (3,),
        (2,),
        (2,),
    ]
    with pytest.raises(ValueError, match=r"2 draws cannot be cut into 3 parts .accumulation_s"):
        draws_of_steps(Flow([Affine(2)]), accumulation_steps=3, draws=2)


def test_each_draw_of_a_step_counts_the_same_in_parts_of_any_size():
    seen = []

    def log_density(x):
        seen.append(x.detach())
        return -0.5 * (x - 1).square().sum(-1)

    config = TrainingConfig(steps=1, accumulation_steps=3, progress=False)
    history = fit(ReverseKL(Flow([Affine(2)]), log_density, draws=7), None, config)

    x = torch.cat(seen)  # drawn from the base, for the flow begins there
    losses = Normal(0.0, 1.0).log_prob(x).sum(-1) + 0.5 * (x - 1).square().sum(-1)
    assert [len(part) for part in seen] == [3, 2, 2]
    assert history.loss[0] == pytest.approx(losses.mean().item(), rel=1e-12)


@pytest.mark.parametrize("form", [lambda c: c, TensorDataset], ids=["tensor", "dataset"])
def test_a_conditional_flow_draws_once_for_each_context(form):
    flow = cnf(2, 3).using(solver=QUICK)
    contexts = form(torch.randn(8, 3))
    assert draws_of_steps(flow, contexts, solver=QUICK) == [(1, 8)]
    assert draws_of_steps(flow, contexts, solver=QUICK, accumulation_steps=2) == [(1, 4), (1, 4)]
    assert draws_of_steps(flow, contexts, solver=QUICK, draws=5) == [(5, 8)]


def test_a_target_that_is_not_finite_leaves_the_last_good_weights():
    def log_density(x):
        return torch.where(x.abs().amax(-1) < 60, -0.5 * (x - 50).square().sum(-1), -torch.inf)

    flow = Flow([Affine(2)])
    config = TrainingConfig(steps=60, learning_rate=20.0, schedule="constant", progress=False)
    message = r"step \d+ of 60: log_density must be finite.*Objective: ReverseKL\. Settings: steps"
    with pytest.raises(TrainingError, match=message):
        fit(ReverseKL(flow, log_density, draws=64), None, config)
    assert log_density(flow.sample(500, generator=seeded())).isfinite().all()


def test_the_target_is_not_coarser_than_the_flow_under_autocast():
    dtypes = []

    def log_density(x):
        dtypes.append((x @ x.mT).dtype)
        return -0.5 * x.square().sum(-1)

    flow = Flow([Affine(2)]).float()
    fit(
        ReverseKL(flow, log_density),
        None,
        TrainingConfig(steps=1, precision="bfloat16", progress=False),
    )
    assert dtypes == [torch.float32]


@pytest.mark.slow
def test_training_without_data_finds_the_target():
    flow = linear_flow()
    objective = ReverseKL(flow, normal_target, draws=64, solver=QUICK)
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    for _ in range(80):
        optimizer.zero_grad()
        objective().backward()
        optimizer.step()
    assert effective_sample_size(objective.log_weights(500)) > 475


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ReverseKL(nn.Linear(2, 2), normal_target),
            TypeError,
            r"flow must be a cnf\.Flow; got Linear",
        ),
        (
            lambda: ReverseKL(Flow([Dequantize(2, 4), Logit(2)]), normal_target),
            ValueError,
            r"flow must have weights of its draws.*is on integers.*Dequantize",
        ),
        (
            lambda: ReverseKL(
                Flow([ResidualFlow(LipschitzMLP(2), log_det=TruncatedSeries())]), normal_target
            ),
            ValueError,
            r"is 'biased_estimate'.*RussianRoulette",
        ),
        (lambda: ReverseKL(CNF(2), TARGET), TypeError, "log_density must be callable; got Multi"),
        (lambda: ReverseKL(CNF(2), normal_target, draws=0), ValueError, "draws must be at least 1"),
        (lambda: ReverseKL(CNF(2), normal_target, draws=1.5), TypeError, "draws must be an int"),
    ],
)
def test_wrong_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("log_density", "error", "message"),
    [
        (lambda x: 1.0, TypeError, "log_density must return a tensor; got float"),
        (
            lambda x: -x.square(),
            ValueError,
            r"must return shape \(3,\) for x of shape \(3, 2\); got \(3, 2\)",
        ),
        (
            lambda x: x.sum(-1) * math.nan,
            ValueError,
            r"log_density must be finite or -inf at every point; got.* in rows 0, 1, 2.*Logit",
        ),
        (lambda x: x.sum(-1) - math.inf, ValueError, "must be finite at every point"),
    ],
)
def test_a_target_without_a_finite_number_for_each_draw_is_refused(log_density, error, message):
    with pytest.raises(error, match=message):
        ReverseKL(CNF(2), log_density, draws=3)()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_must_not_be_infinite(value):
    objective = ReverseKL(CNF(2), lambda x: x.sum(-1) + value)
    with pytest.raises(ValueError, match="must be finite or -inf at every point"):
        objective.log_weights(3)


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_missing_context_and_no_draws_are_refused():
    with pytest.raises(ValueError, match="context must have shape"):
        ReverseKL(CNF(2, 3), normal_target)()
    with pytest.raises(ValueError, match="draws must be at least 1; got 0"):
        ReverseKL(CNF(2), normal_target).log_weights(0)


def test_the_loss_of_random_steps_bounds_the_divergence_and_falls_with_them():
    """Minus the mean log-weight of paths is at least -log Z, and annealed steps bring it nearer."""
    target = MultivariateNormal(torch.tensor([1.5, 0.0]), torch.eye(2))

    def log_density(x):
        return target.log_prob(x) + LOG_Z

    shares = torch.linspace(1, 0.2, 5).tolist()
    kernels = [
        AdjustedLangevin(2, AnnealedDensity(StandardNormal(2), log_density, share), step_size=0.5)
        for share in shares
    ]
    with torch.no_grad():
        plain, annealed = (
            ReverseKL(Flow([Affine(2), *parts]), log_density, draws=4000)(generator=seeded())
            for parts in ([], kernels)
        )
    assert plain == pytest.approx(1.5**2 / 2 - LOG_Z, abs=0.1)
    assert -LOG_Z < annealed < -LOG_Z + 0.6 * (plain + LOG_Z)


def test_unadjusted_steps_are_trained_through():
    """The gradient of the loss is that of finite differences, draw by draw."""
    affine = perturbed(Affine(2))
    flow = Flow([affine, Langevin(2, StandardNormal(2), steps=2, step_size=0.1)])
    objective = ReverseKL(flow, normal_target, draws=20)

    def loss(loc):
        values = {"flow.transforms.0.loc": loc}
        return torch.func.functional_call(objective, values, kwargs={"generator": seeded()})

    assert torch.autograd.gradcheck(loss, (affine.loc.detach().requires_grad_(),))


def test_an_augmented_flow_learns_a_target_by_its_joint_weights():
    augmented = Flow([Augment(2, 1), perturbed(Affine(3))])
    log_z = log_normalizer(normal_target, augmented, 40_000, generator=seeded())
    assert abs(log_z.log_z - LOG_Z) < 4 * log_z.standard_error + 0.01
    assert torch.isfinite(ReverseKL(augmented, normal_target)())


def test_the_normalizer_has_its_standard_error():
    """Over 200 repetitions: z-scores with variance 1, within 4.5 of their standard errors."""
    flow = Flow([Affine(2)])
    target = MultivariateNormal(torch.tensor([0.3, 0.0]), 0.5 * torch.eye(2))
    generator = seeded()
    found = [log_normalizer(target.log_prob, flow, 500, generator=generator) for _ in range(200)]
    scores = torch.stack([each.log_z / each.standard_error for each in found])
    assert abs(scores.square().mean() - 1) < 4.5 * (2 / 200) ** 0.5
    assert all(1 < each.effective_sample_size < 500 for each in found)


def test_a_proposal_with_lighter_tails_is_warned_of():
    narrow = Flow([Affine(1)])
    nn.init.constant_(narrow.transforms[0].log_scale, math.log(0.4))
    target = Normal(0.0, 1.0)
    with pytest.warns(UserWarning, match="lighter tails than log_density"):
        log_normalizer(lambda x: target.log_prob(x).sum(-1), narrow, 2000, generator=seeded())


def test_a_proposal_that_hardly_meets_the_density_is_warned_of():
    """Of 1000 draws, about 23 are above 2, where alone the density is not zero."""
    with pytest.warns(UserWarning, match="misses a part of it"):
        found = log_normalizer(
            lambda x: (
                torch.where(x[..., 0] > 2, 0.0, -math.inf) + Normal(0.0, 1.0).log_prob(x)[..., 0]
            ),
            Flow([Affine(1)]),
            1000,
            generator=seeded(),
        )
    assert found.log_z.isfinite()
    assert found.standard_error.isfinite()


def test_the_normalizer_of_each_context():
    flow = Flow([perturbed(ConditionalAffine(2, 3))])
    found = log_normalizer(
        lambda x, context: normal_given_context(x, context) + context[..., 0],
        flow,
        40_000,
        context := torch.randn(3, 3) / 3,
        generator=seeded(),
    )
    assert found.log_z.shape == (3,)
    assert ((found.log_z - context[:, 0]).abs() < 4.5 * found.standard_error + 0.01).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: log_normalizer(normal_target, Affine(2), 10), TypeError, "proposal must be"),
        (lambda: log_normalizer(normal_target, CNF(2), 1), ValueError, "draws must be at least 2"),
        (lambda: log_normalizer(3, CNF(2), 10), TypeError, "log_density must be callable"),
        (
            lambda: Flow(
                [], MixtureOfFlows([Flow([Augment(2, 1), Affine(3)])])
            ).rsample_and_log_weight(normal_target),
            ValueError,
            "base must have a log-density of its draws",
        ),
        (
            lambda: log_normalizer(normal_target, Flow([Inverse(conformal_embedding())]), 10),
            ValueError,
            "draws have weights; its likelihood is 'not_a_likelihood'",
        ),
        (
            lambda: log_normalizer(lambda x: x.sum(-1) - math.inf, Flow([Affine(2)]), 10),
            ValueError,
            "finite at some of the 10 draws",
        ),
    ],
)
def test_wrong_arguments_of_the_normalizer_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
