"""Laws of flow matching: its optimum in closed form, what it trains, and what it draws."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn
from zoo import EVERY_FLOW, cnf, mlp, perturbed, rows_for, seeded

from cnf import (
    CNF,
    Flow,
    FlowMatching,
    MLPField,
    ModuleField,
    ODESolver,
    Standardize,
    TrainingConfig,
    count_evaluations,
    fit,
)
from cnf.bases import StandardNormal
from cnf.objectives import LinearPath, OptimalTransport, SmoothedPath, VariancePreservingPath
from cnf.transforms import Affine, Augment, ContinuousTransform, Dequantize, FactorOut
from cnf.vector_fields import LinearField


def can_be_matched(flow):
    return sum(isinstance(part, ContinuousTransform) for part in flow.chain) == 1 and not any(
        isinstance(inner, ContinuousTransform) and inner not in flow.chain
        for inner in flow.modules()
    )


MATCHED = {name: make for name, make in EVERY_FLOW.items() if can_be_matched(make())}
"""Flows with one ODE, on the data side of which there may be anything."""


def field_of(flow):
    return next(part for part in flow.chain if isinstance(part, ContinuousTransform)).vector_field


def at_rest(features, *, before=(), behind=()):
    """A flow whose field is zero, so that the loss is the mean squared velocity of the paths."""
    return Flow([*before, ContinuousTransform(LinearField(features)), *behind])


class BestForNormalData(nn.Module):
    """The best field for normal data met along linear paths, plus a trainable change of it.

    The mean is a number for each feature or, if it is None, the context; the change starts at 0.
    """

    def __init__(self, mean, std, start, end):
        super().__init__()
        self.mean, self.std, self.start, self.end = mean, std, start, end
        self.change = nn.Parameter(torch.zeros(5, len(std)))

    def forward(self, t, x, context=None):
        mean = self.mean if context is None else context
        share = ((t / self.end - self.start) / (1 - self.start)).unsqueeze(-1)
        variance = (1 - share) ** 2 + (share * self.std) ** 2
        best = mean + (share * self.std**2 - (1 - share)) / variance * (x - share * mean)
        one = torch.ones_like(x)
        features = torch.stack([one, share * one, x, share * x, mean * one])
        change = (features * self.change.unsqueeze(1)).sum(0)
        return (best + change) / (self.end * (1 - self.start))


TIMES = {"usual times": (0.0, 1.0), "other times": (-0.3, 0.8)}
STD = torch.tensor([0.5, 2.0], dtype=torch.float64)
MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)


def best_flow(start, end, *, conditional=False, **settings):
    network = BestForNormalData(None if conditional else MEAN, STD, start, end)
    field = ModuleField(network, 2, 2 if conditional else 0)
    transform = ContinuousTransform(
        field, start_time=start, end_time=end, solver=ODESolver(rtol=1e-7, atol=1e-7), **settings
    )
    return Flow([transform])


def normal_rows(rows, conditional):
    context = torch.randn(rows, 2) if conditional else None
    mean = MEAN if context is None else context
    return mean + STD * torch.randn(rows, 2), context


def mean_and_error(draws):
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


def losses_and_gradients(objective, rows, *, times, weight=None):
    """Loss and gradient in the field of many minibatches; `rows` makes one."""
    losses, gradients = [], []
    for _ in range(times):
        loss = objective(*rows(), weight=weight)
        losses.append(loss.detach())
        parts = torch.autograd.grad(loss, list(field_of(objective.flow).parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(losses), torch.stack(gradients)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(("start", "end"), TIMES.values(), ids=TIMES)
def test_the_best_field_for_normal_data_makes_their_density(start, end, conditional):
    flow = best_flow(start, end, conditional=conditional)
    x, context = normal_rows(4, conditional)
    mean = MEAN if context is None else context
    expected = torch.distributions.Normal(mean, STD).log_prob(x).sum(-1)
    torch.testing.assert_close(flow.log_prob(x, context), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", ["pair", "stable"])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(("start", "end"), TIMES.values(), ids=TIMES)
def test_the_best_field_for_normal_data_is_the_minimum(start, end, conditional, target):
    """The gradient is zero, and the minimum of pairs pi / 2 times the mean deviation: in 4.5
    errors."""
    objective = FlowMatching(best_flow(start, end, conditional=conditional), target=target)
    losses, gradients = losses_and_gradients(
        objective, lambda: normal_rows(2000, conditional), times=60
    )
    mean, error = mean_and_error(gradients)
    assert (mean.abs() < 4.5 * error).all()
    assert (error < 0.05).all()
    mean, error = mean_and_error(losses)
    if target == "stable" and not conditional:
        assert mean < 0.2 * STD.mean()
    else:  # rows with contexts of their own have no other paths through a state
        assert (mean - math.pi / 2 * STD.mean()).abs() < 4.5 * error
    assert error < 0.02


def test_away_from_the_best_field_the_gradient_points_away():
    flow = best_flow(0.0, 1.0)
    network = field_of(flow).network
    with torch.no_grad():
        network.change[2, 0] = 0.2
    _, gradients = losses_and_gradients(
        FlowMatching(flow), lambda: normal_rows(2000, False), times=30
    )
    mean, error = mean_and_error(gradients)
    assert mean.view_as(network.change)[2, 0] > 20 * error.view_as(network.change)[2, 0]


def marginal_regression(field, points, shares, sigma):
    """Integral over t and x of p(x) (v - u)^2, for the mean velocity u of linear paths, in 1-D."""
    nodes, weights = np.polynomial.legendre.leggauss(30)
    t = 0.5 + 0.5 * torch.from_numpy(nodes).repeat_interleave(500)
    grid = torch.linspace(-6, 7, 500, dtype=torch.float64)
    x = grid.repeat(30).unsqueeze(-1)
    spread = 1 - (1 - sigma) * t.unsqueeze(-1)
    joint = shares * torch.distributions.Normal(t.unsqueeze(-1) * points, spread).log_prob(x).exp()
    density = joint.sum(-1, keepdim=True)
    velocity = (joint * (points - (1 - sigma) * x) / spread).sum(-1, keepdim=True) / density
    errors = density * (field(t, x) - velocity).square()
    weight = 0.5 * torch.from_numpy(weights).repeat_interleave(500) * (grid[1] - grid[0])
    return (weight.unsqueeze(-1) * errors).sum()


@pytest.mark.parametrize("target", ["pair", "stable"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_regression_on_the_mean_velocity(weighted, target):
    """Data of two points, one three times as likely, as rows or by weights; within 5 errors."""
    field = mlp(1, hidden_features=(4,), activation="tanh")
    flow = Flow([ContinuousTransform(field)])
    points, shares = torch.tensor([-1.0, 2.0]), torch.tensor([0.75, 0.25])
    integral = marginal_regression(field, points, shares, 0.3)
    parts = torch.autograd.grad(integral, list(field.parameters()))
    expected = torch.cat([part.flatten() for part in parts])

    rows = points if weighted else torch.tensor([-1.0, -1.0, -1.0, 2.0])
    weight = (2 * shares).repeat(500) if weighted else None
    data = rows.repeat(1000 // len(rows)).unsqueeze(-1)
    losses, gradients = losses_and_gradients(
        FlowMatching(flow, LinearPath(0.3), target=target), lambda: (data,), times=80, weight=weight
    )

    mean, error = mean_and_error(gradients)
    assert ((mean - expected).abs() < 5 * error).all()
    assert error.max() < 0.05 * expected.abs().max()
    if target == "pair":
        assert losses.mean() > integral + 0.1  # by how much the velocities through a point differ
    else:
        assert (losses.mean() - integral).abs() < 0.05


def test_a_variance_preserving_path_between_like_normals_needs_no_motion():
    """The velocity is then independent of the state, and its variance pi^2 / 4."""
    objective = FlowMatching(at_rest(2), VariancePreservingPath())
    losses, gradients = losses_and_gradients(objective, lambda: (torch.randn(2000, 2),), times=40)
    mean, error = mean_and_error(losses)
    assert (mean - math.pi**2 / 4).abs() < 4 * error
    mean, error = mean_and_error(gradients)
    assert (mean.abs() < 4.5 * error).all()


@pytest.mark.parametrize("make", MATCHED.values(), ids=MATCHED)
def test_every_parameter_of_the_field_gets_a_gradient_and_no_other_does(make):
    flow = make()
    FlowMatching(flow)(*rows_for(flow, 8), generator=seeded()).backward()
    of_field = {id(parameter) for parameter in field_of(flow).parameters()}
    for name, parameter in flow.named_parameters():
        if id(parameter) in of_field:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 1e-9, name
        else:
            assert parameter.grad is None, name


def times_seen(flow, objective, *data):
    """The times at which a step asks the field."""
    seen = []
    handle = field_of(flow).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    objective(*data)
    handle.remove()
    return seen


@pytest.mark.parametrize("make", MATCHED.values(), ids=MATCHED)
def test_a_step_takes_one_evaluation_at_times_that_few_rows_share(make):
    flow = make()
    with count_evaluations(flow) as nfe:
        (seen,) = times_seen(flow, FlowMatching(flow), *rows_for(flow, 48))
    assert nfe.value == 1
    shape = (3, 1) if field_of(flow).shares_times else (48,)
    assert seen.shape == shape
    assert len(seen.unique()) == len(seen)


@pytest.mark.parametrize("make", MATCHED.values(), ids=MATCHED)
def test_rows_that_share_a_time_have_the_loss_of_each_at_that_time(make, monkeypatch):
    flow = make()
    data = rows_for(flow, 48)
    objective = FlowMatching(flow)
    loss = objective(*data, generator=seeded())
    if field_of(flow).shares_times:
        forward = field_of(flow).forward

        def each_for_itself(t, x, context=None):
            context = None if context is None else context.flatten(0, 1)
            velocity = forward(t.expand(x.shape[:-1]).flatten(), x.flatten(0, 1), context)
            return velocity.unflatten(0, x.shape[:-1])

        monkeypatch.setattr(field_of(flow), "forward", each_for_itself)
    torch.testing.assert_close(objective(*data, generator=seeded()), loss)


@pytest.mark.parametrize("make", MATCHED.values(), ids=MATCHED)
@pytest.mark.parametrize("times", ["uniform", "late", "logit_normal"])
def test_the_generator_decides_the_loss_and_spares_the_global_one(make, times):
    flow = make()
    path = SmoothedPath(0.1) if field_of(flow).manifold is None else None
    objective = FlowMatching(flow, path, OptimalTransport(), times=times)
    x, context = rows_for(flow, 6)
    before = torch.get_rng_state()
    losses = [objective(x, context, generator=seeded()).item() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1]
    assert objective(x, context).item() != losses[0]


@pytest.mark.parametrize(
    ("times", "as_uniform"),
    [
        ("uniform", lambda t: t),
        ("late", lambda t: 1 - (1 - t).sqrt()),  # the integral of 1 / (2 sqrt(1 - t))
        ("logit_normal", lambda t: torch.special.ndtr(t.logit())),
    ],
)
def test_the_time_of_a_row_is_drawn_as_named(times, as_uniform):
    """From step to step at 0.1 %, given a fixed seed; in one step times are spread evenly."""
    flow = Flow([ContinuousTransform(LinearField(1), start_time=-0.3, end_time=0.8)])
    objective = FlowMatching(flow, times=times)
    seen = torch.stack([times_seen(flow, objective, torch.zeros(5, 1))[0] for _ in range(500)])
    shares = as_uniform((seen / 0.8 + 0.3) / 1.3)
    assert 0 <= shares.min() < shares.max() <= 1
    assert kstest(shares[:, 0].numpy(), "uniform").pvalue > 1e-3
    gaps = shares.sort(-1).values.diff(dim=-1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.2), rtol=0, atol=1e-6)


def test_a_pairing_keeps_to_the_weights():
    """Half of the rows lie right, and 90 % of the weight: so do ends, and starts are normal."""
    x = torch.cat([torch.full((500, 1), -5.0), torch.full((500, 1), 5.0)])
    weight = torch.cat([torch.full((500,), 0.2), torch.full((500,), 1.8)])
    seen = []

    class Recorded(OptimalTransport):
        def __call__(self, x0, x1, context=None):
            paired = super().__call__(x0, x1, context)
            seen.append((paired, x1))
            return paired

    FlowMatching(at_rest(1), pairing=Recorded())(x, weight=weight)
    ((x0, x1),) = seen
    assert abs((x1 > 0).double().mean() - 0.9) < 4 * math.sqrt(0.09 / 1000)
    # The least tenth of the base goes left: a border at the 10 % quantile of a normal.
    assert abs(x0[x1 < 0].max() + 1.2816) < 0.25
    assert kstest(x0.flatten().numpy(), "norm").pvalue > 1e-3


def test_weights_of_a_pairing_scale_the_loss_as_without():
    x, weight = 5 + torch.randn(64, 1), torch.full((64,), 3.0)
    objective = FlowMatching(at_rest(1), pairing=OptimalTransport())
    weighted, plain = (
        sum(objective(x, weight=each).item() for _ in range(50)) for each in (weight, None)
    )
    assert abs(weighted / plain - 3) < 0.15


def test_paths_run_between_what_the_other_transforms_make_of_data_and_base():
    before, behind = perturbed(Affine(2)), perturbed(Affine(2))
    flow = at_rest(2, before=[before], behind=[behind])
    x = torch.randn(6, 2)
    loss = FlowMatching(flow, target="pair")(x, generator=seeded())
    z = flow.base.rsample(torch.Size([6]), generator=seeded())
    expected = (before.to_base(x) - behind.to_data(z)).square().mean()
    torch.testing.assert_close(loss, expected)


def test_what_a_transform_draws_comes_from_the_generator_too():
    dequantize = Dequantize(3, 5)
    flow = at_rest(3, before=[dequantize])
    x = torch.randint(5, (6, 3)).double()
    generator = seeded()
    x1 = dequantize.to_base(x, generator=generator)
    x0 = flow.base.rsample(torch.Size([6]), generator=generator)
    loss = FlowMatching(flow, target="pair")(x, generator=seeded())
    torch.testing.assert_close(loss, (x1 - x0).square().mean())


@pytest.mark.parametrize("conditional", [False, True])
def test_the_pairing_reorders_the_base_within_a_class(conditional):
    """On a line, optimal transport pairs in order; data and contexts stay together."""
    label = torch.tensor([0.0, 1.0]).repeat(20).unsqueeze(-1)
    x = torch.randn(40, 1) + 3 * label
    flow = Flow([ContinuousTransform(LinearField(1, 1 if conditional else 0))])
    objective = FlowMatching(flow, pairing=OptimalTransport(context_weight=1e6))
    loss = objective(x, label if conditional else None, generator=seeded())

    x0 = torch.randn(40, 1, generator=seeded())
    expected = 0.0
    for rows in [slice(0, None, 2), slice(1, None, 2)] if conditional else [slice(None)]:
        order = x[rows].flatten().argsort()
        errors = x[rows][order] - x0[rows].sort(0).values
        expected += errors.square().sum() / 40
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["cnf with context", "standardized", "dequantized image"])
def test_the_loss_is_linear_in_the_weights_of_rows(name):
    flow = EVERY_FLOW[name]()
    objective = FlowMatching(flow, target="pair")
    x, context = rows_for(flow, 5)
    weight = torch.rand(5)

    def loss(weight):
        return objective(x, context, weight=weight, generator=seeded())

    of_rows = torch.stack([loss(one) for one in torch.eye(5)])
    torch.testing.assert_close(loss(weight), weight @ of_rows)
    torch.testing.assert_close(loss(None), of_rows.sum())


def test_the_loss_depends_on_the_context_through_the_field():
    flow = cnf(2, 3)
    x, context = rows_for(flow, 5)
    context.requires_grad_()
    FlowMatching(flow)(x, context).backward()
    assert (context.grad.abs().max(-1).values > 1e-9).all()


def test_a_field_that_takes_no_context_gets_none():
    flow = Flow([Augment(2, 1, 3, hidden_features=()), ContinuousTransform(mlp(3))])
    assert FlowMatching(flow)(*rows_for(flow, 5)) > 0


def test_a_learnt_end_time_sets_the_times_and_gets_no_gradient():
    flow = best_flow(0.0, 1.4, learn_end_time=True)
    loss = FlowMatching(flow)(*normal_rows(10, False), generator=seeded())
    loss.backward()
    assert flow.chain[0].log_end_time.grad is None


def test_the_loss_does_not_depend_on_the_units_of_time():
    plain, slow = (FlowMatching(best_flow(start, end)) for start, end in ((0.0, 1.0), (-0.3, 0.8)))
    x, _ = normal_rows(10, False)
    torch.testing.assert_close(plain(x, generator=seeded()), slow(x, generator=seeded()))


def test_the_loss_does_not_depend_on_the_mode_nor_leaves_anything_behind():
    flow = EVERY_FLOW["standardized"]()
    objective = FlowMatching(flow)
    x, _ = rows_for(flow, 4)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    keys = {name: set(vars(part)) for name, part in objective.named_modules()}
    losses = [part(x, generator=seeded()) for part in (objective.train(), objective.eval())]
    assert losses[0] == losses[1]
    assert keys == {name: set(vars(part)) for name, part in objective.named_modules()}
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_loss_has_the_dtype_of_the_flow_also_under_autocast(dtype):
    flow = Flow([ContinuousTransform(mlp())]).to(dtype)
    objective, x = FlowMatching(flow, pairing=OptimalTransport()), torch.randn(64, 2, dtype=dtype)
    loss = objective(x, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = objective(x, generator=seeded())
    rounded.backward()
    assert loss.dtype == rounded.dtype == dtype
    torch.testing.assert_close(rounded, loss, rtol=0.02, atol=0)


@pytest.mark.slow
def test_training_by_matching_learns_the_density():
    x = torch.randn(4000, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    flow = CNF(2, hidden_features=(32, 32), transforms=[Standardize.from_data(x)])
    fit(FlowMatching(flow), x, TrainingConfig(steps=400, batch_size=256, progress=False))
    truth = torch.distributions.MultivariateNormal(torch.zeros(2), x.T.cov())
    new = truth.sample((500,))
    assert (truth.log_prob(new) - flow.log_prob(new)).mean() < 0.06


def test_the_parts_around_the_ode_are_those_of_the_flow_alone():
    """A copy trains its own flow, and the state holds each tensor once."""
    flow = Flow([Affine(2), ContinuousTransform(MLPField(2, hidden_features=(4,)))])
    objective = FlowMatching(flow)
    assert list(objective.state_dict()) == [f"flow.{name}" for name in flow.state_dict()]
    copied = copy.deepcopy(objective)
    copied(torch.randn(4, 2)).backward()
    field = copied.flow.chain[1].vector_field
    assert any(weight.grad is not None for weight in field.parameters())
    assert all(weight.grad is None for weight in flow.parameters())


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNF(2, blocks=2), "got 2. Use MaximumLikelihood"),
        (lambda: Flow([Affine(2)]), "got 0. Use MaximumLikelihood"),
        (
            lambda: Flow([FactorOut([ContinuousTransform(MLPField(2))], 3)]),
            "got 0, and there is one inside of another part. Use MaximumLikelihood",
        ),
        (
            lambda: Flow(
                [ContinuousTransform(MLPField(3)), FactorOut([ContinuousTransform(MLPField(2))], 3)]
            ),
            "got 1, and there is one inside of another part. Use MaximumLikelihood",
        ),
    ],
    ids=["two", "none", "nested", "one and a nested one"],
)
def test_a_flow_without_exactly_one_ode_is_refused(make, message):
    with pytest.raises(ValueError, match=f"exactly one ContinuousTransform.*{message}"):
        FlowMatching(make())


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FlowMatching(nn.Linear(2, 2)), TypeError, r"flow must be a cnf\.Flow; got Linear"),
        (
            lambda: FlowMatching(CNF(2), "linear"),
            TypeError,
            r"path must be a ProbabilityPath; got str.*LinearPath\(\)",
        ),
        (
            lambda: FlowMatching(CNF(2), pairing="ot"),
            TypeError,
            r"pairing must be a Pairing; got str.*OptimalTransport\(\)",
        ),
        (
            lambda: FlowMatching(CNF(2), times="cosine"),
            ValueError,
            "times must be one of uniform, logit_normal, late; got 'cosine'",
        ),
    ],
)
def test_wrong_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 3), r"x must have shape \(\*batch, 2\); got \(3, 4\)"),
        (torch.zeros(3, 2), None, r"context must have shape \(\*batch, 3\).*got None"),
        (torch.zeros(3, 2), torch.zeros(4, 3), "batch shapes of x and context must broadcast"),
        (torch.full((3, 2), math.nan), torch.zeros(3, 3), "x must be finite.*rows 0, 1, 2"),
        (torch.zeros(0, 2), torch.zeros(0, 3), r"at least one row; got batch shape \(0,\)"),
        (torch.zeros(2), torch.zeros(3), r"x must have one batch axis.*got batch shape \(\)"),
        (torch.zeros(4, 3, 2), torch.zeros(3, 3), r"one batch axis.*got batch shape \(4, 3\)"),
    ],
)
def test_bad_rows_are_refused_by_name(x, context, message):
    objective = FlowMatching(CNF(2, 3).float())
    context = None if context is None else context.float()
    with pytest.raises(ValueError, match=message):
        objective(x.float(), context)


def test_rows_outside_the_support_are_refused():
    flow = EVERY_FLOW["logit"]()
    with pytest.raises(ValueError, match="x must be strictly between"):
        FlowMatching(flow)(torch.full((3, 2), 1.5))


def test_the_base_need_not_be_normal():
    class Shifted(StandardNormal):
        def _rsample(self, shape, context, generator):
            return 7 + super()._rsample(shape, context, generator)

    flow = Flow([ContinuousTransform(LinearField(1))], Shifted(1))
    assert FlowMatching(flow)(torch.full((200, 1), 7.0)) < 2
