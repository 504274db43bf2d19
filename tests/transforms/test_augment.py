"""Laws of the augmented flow: its bound is below a known truth, and reaches it when it should."""

import itertools
import math

import pytest
import torch
from laws import every_parameter_matters
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal
from zoo import PRECISE, cnf, mlp, perturbed, seeded

from cnf import (
    CNF,
    Exact,
    Flow,
    Hutchinson,
    MaximumLikelihood,
    ModuleField,
    Standardize,
    TrainingConfig,
    fit,
)
from cnf.transforms import Affine, Augment, ContinuousTransform, Dequantize
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

ROWS = 4000
FEATURES, AUGMENT = 2, 2


def gaussian_flow(augment=None, size=AUGMENT):
    """An augmented flow along a linear field, and the joint Gaussian of (x, e) that it is."""
    augment = augment or Augment(FEATURES, size)
    field = perturbed(LinearField(augment.base_features))
    scale = torch.linalg.matrix_exp(field.weight)
    loc, _ = field.solution(torch.zeros(augment.base_features), start=0.0, end=1.0)
    flow = Flow([augment, ContinuousTransform(field, solver=PRECISE)])
    return flow, loc.detach(), (scale @ scale.T).detach()


def marginal(loc, covariance):
    return MultivariateNormal(loc[:FEATURES], covariance[:FEATURES, :FEATURES])


def affine_q(gain, offset, log_std):
    """The Augment with ``q(e | x) = N(gain x + offset, exp(log_std)^2)``."""
    augment = Augment(gain.shape[1], gain.shape[0], hidden_features=())
    (affine,) = augment.q.network
    with torch.no_grad():
        affine.weight[: len(gain)] = gain
        affine.bias.copy_(torch.cat([offset, log_std]))
    return augment


def posterior(loc, covariance):
    """Gain, offset and covariance of e given x under the joint Gaussian."""
    gain = covariance[FEATURES:, :FEATURES] @ covariance[:FEATURES, :FEATURES].inverse()
    rest = covariance[FEATURES:, FEATURES:] - gain @ covariance[:FEATURES, FEATURES:]
    return gain, loc[FEATURES:] - gain @ loc[:FEATURES], rest


@pytest.mark.parametrize("hidden_features", [None, (), (4,)], ids=str)
def test_the_mean_of_the_bound_is_below_the_marginal(hidden_features):
    augment = Augment(FEATURES, AUGMENT, hidden_features=hidden_features)
    flow, loc, covariance = gaussian_flow(perturbed(augment, 0.1))
    truth = marginal(loc, covariance)
    for x in truth.sample((3,)):
        with torch.no_grad():
            bound = flow.log_prob(x.expand(ROWS, -1), generator=seeded())
        # Not just + 4 standard errors: q is far enough from the posterior to tell.
        assert bound.mean() < truth.log_prob(x) - 4 * bound.std() / ROWS**0.5


def test_the_mean_of_the_weights_is_the_marginal():
    """With a q that is wider than the posterior, so that the weights have a variance."""
    flow, loc, covariance = gaussian_flow()
    gain, offset, rest = posterior(loc, covariance)
    log_std = 0.5 * (2 * torch.linalg.eigvalsh(rest).max()).log().expand(AUGMENT)
    flow = Flow([affine_q(0.8 * gain, offset + 0.2, log_std), flow.chain[1]])
    truth = marginal(loc, covariance)
    for x in truth.sample((3,)):
        with torch.no_grad():
            bound = flow.log_prob(x.expand(ROWS, -1), generator=seeded())
        weights = (bound - truth.log_prob(x)).exp()
        error = weights.std() / ROWS**0.5
        assert (weights.mean() - 1).abs() < 4 * error
        assert error < 0.05


def test_more_importance_samples_come_closer_to_the_marginal():
    flow, loc, covariance = gaussian_flow()
    truth = marginal(loc, covariance)
    x = truth.sample((4000,))
    exact, gaps = truth.log_prob(x), []
    for count in (1, 10, 100):
        rows = x[: 4000 // count]  # as many weights for each count
        with torch.no_grad():
            bound = flow.log_prob(rows, importance_samples=count, generator=seeded())
        gap = exact[: len(rows)] - bound
        error = gap.std() / len(rows) ** 0.5
        assert gap.mean() > -4 * error
        gaps.append((gap.mean(), error))
    for (looser, first), (tighter, second) in itertools.pairwise(gaps):
        assert tighter < looser - 4 * math.hypot(first, second)
    assert gaps[-1][0] < 0.1 * gaps[0][0]


def test_the_bound_of_the_true_posterior_is_the_marginal():
    flow, loc, covariance = gaussian_flow(size=1)
    gain, offset, rest = posterior(loc, covariance)
    flow = Flow([affine_q(gain, offset, 0.5 * rest[0].log()), flow.chain[1]])
    x = torch.randn(5, FEATURES)

    expected = marginal(loc, covariance).log_prob(x)

    for count in (1, 3):
        bound = flow.log_prob(x, importance_samples=count)
        torch.testing.assert_close(bound, expected, rtol=0, atol=1e-6)


class Ignoring(nn.Module):
    """A network that moves x as `field` does, whatever e is, and leaves e where it is."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, t, z):
        size = self.field.features
        return torch.cat([self.field(t, z[..., :size]), torch.zeros_like(z[..., size:])], -1)


def test_a_field_that_ignores_e_gives_the_density_of_its_part():
    field = mlp(2)
    plain = Flow([ContinuousTransform(field, solver=PRECISE)])
    flow = Flow(
        [Augment(2, 3), ContinuousTransform(ModuleField(Ignoring(field), 5), solver=PRECISE)]
    )
    x = torch.randn(5, 2)
    torch.testing.assert_close(flow.log_prob(x), plain.log_prob(x), rtol=0, atol=1e-6)


def test_the_ladj_is_minus_the_log_density_of_what_is_appended():
    augment = perturbed(Augment(2, 3, 1, hidden_features=(8,)))
    x, context = torch.randn(5, 2), torch.randn(1)
    z, ladj = augment.to_base_and_ladj(x, context)
    mean, log_std = augment.q.network(torch.cat([x, context.expand(5, 1)], -1)).chunk(2, -1)
    q = Independent(Normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(ladj, -q.log_prob(z[:, 2:]))
    e = torch.randn(5, 3)
    back, ladj_back = augment.to_data_and_ladj(torch.cat([x, e], -1), context)
    assert torch.equal(back, x)
    torch.testing.assert_close(ladj_back, q.log_prob(e))


@pytest.mark.parametrize("hidden_features", [None, (), (8,), (8, 8)], ids=str)
def test_a_new_q_is_standard_normal(hidden_features):
    augment = Augment(2, 3, hidden_features=hidden_features)
    x = torch.randn(5, 2)
    z, ladj = augment.to_base_and_ladj(x, generator=seeded())
    noise = torch.randn(5, 3, generator=seeded())
    torch.testing.assert_close(z, torch.cat([x, noise], -1))
    torch.testing.assert_close(-ladj, Independent(Normal(0.0, 1.0).expand((3,)), 1).log_prob(noise))


def test_without_augmentation_it_is_the_plain_cnf():
    torch.manual_seed(1)
    plain = CNF(2)
    torch.manual_seed(1)
    flow = CNF(2, augment=0)
    assert flow.likelihood == "exact"
    assert [type(part) for part in flow.chain] == [Standardize, ContinuousTransform]
    x = torch.randn(5, 2)
    assert torch.equal(flow.log_prob(x), plain.log_prob(x))


def test_the_ode_of_an_augmented_cnf_has_the_size_of_what_precedes_it():
    flow = CNF(2, 1, augment=3, transforms=[Standardize(2).double()])
    assert [part.features for part in flow.chain] == [2, 2, 5]
    assert (flow.features, flow.event_shape, flow.base.features) == (2, (2,), 5)
    flow = CNF(2, transforms=[Augment(2, 3, hidden_features=(4,))], blocks=2)
    assert [part.features for part in flow.chain] == [2, 5, 5, 5]
    flow = CNF(2, transforms=[Augment(2, 3)], augment=1)
    assert [part.features for part in flow.chain] == [2, 5, 5, 6]


def test_gradients_reach_every_parameter_of_q():
    flow = cnf(2, 1, transforms=[perturbed(Augment(2, 2, 1, hidden_features=(4, 4)))])
    x, context = torch.randn(5, 2), torch.randn(5, 1)
    every_parameter_matters(flow, flow.log_prob(x, context))
    every_parameter_matters(flow, flow.log_prob(x, context, importance_samples=3))
    every_parameter_matters(flow, MaximumLikelihood(flow)(x, context))


@pytest.mark.slow
def test_training_brings_q_to_the_posterior():
    """The field stays; only q, which can be the posterior, learns: the bound becomes the truth."""
    augment = Augment(FEATURES, 1, hidden_features=())
    flow, loc, covariance = gaussian_flow(augment)
    flow.chain[1].requires_grad_(False)
    truth = marginal(loc, covariance)
    x = truth.sample((500,))
    before = (truth.log_prob(x) - flow.log_prob(x)).mean()

    fit(flow, x, TrainingConfig(steps=150, learning_rate=0.1, progress=False))

    with torch.no_grad():
        gap = (truth.log_prob(x) - flow.log_prob(x)).mean()
    assert gap.abs() < 0.02 * before
    gain, _, _ = posterior(loc, covariance)
    torch.testing.assert_close(augment.q.network[0].weight[:1], gain, rtol=0, atol=0.05)


def test_each_weight_has_its_own_draws_and_rows_differ():
    flow = Flow([Dequantize(1, 3), Augment(1, 1), Affine(2)])
    x = torch.ones(4, 1)
    z = flow.chain[0].to_base(x.expand(3, 4, 1))
    assert len(z.unique()) == 12
    averaged = flow.log_prob(x, importance_samples=3, generator=seeded())
    single = flow.log_prob(x.expand(3, 4, 1), generator=seeded())
    expected = single.exp().mean(0).log()
    torch.testing.assert_close(averaged, expected)
    assert len(averaged.unique()) == 4


def test_importance_samples_of_integers_come_closer_to_their_probability():
    affine = Affine(1)
    with torch.no_grad():
        affine.loc.fill_(0.5)
        affine.log_scale.fill_(math.log(0.15))
    flow = Flow([Dequantize(1, 2), affine])
    exact = Normal(0.5, 0.15).cdf(torch.tensor([0.0, 0.5])).diff().log()
    gaps = []
    for count in (1, 10, 100):
        with torch.no_grad():
            bound = flow.log_prob(torch.zeros(2000, 1), importance_samples=count)
        assert exact > bound.mean() - 4 * bound.std() / 2000**0.5
        gaps.append(float(exact - bound.mean()))
    assert gaps[0] > 2 * gaps[1] > 4 * abs(gaps[2])


def test_draws_come_with_a_bound_and_not_with_the_weight_of_their_own_e():
    flow, loc, covariance = gaussian_flow()
    with torch.no_grad():
        x, log_prob = flow.rsample_and_log_prob((ROWS,), generator=seeded())
        gap = marginal(loc, covariance).log_prob(x) - log_prob
    assert gap.mean() > 4 * gap.std() / ROWS**0.5
    same, again = flow().rsample_and_log_prob((ROWS,), generator=seeded())
    assert torch.equal(same, x)
    assert torch.equal(again, log_prob)


def test_a_distribution_passes_the_number_of_importance_samples_on():
    flow = cnf(2, 1, augment=1)
    x, context = torch.randn(5, 2), torch.randn(5, 1)
    found = flow(context).log_prob(x, importance_samples=4, generator=seeded())
    expected = flow.log_prob(x, context, importance_samples=4, generator=seeded())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson()], ids=str)
def test_importance_samples_of_what_is_no_bound_are_refused(divergence):
    flow = CNF(2, divergence=divergence)
    with pytest.raises(ValueError, match=f"lower bound; got 2 for one that is '{flow.likelihood}'"):
        flow.log_prob(torch.zeros(3, 2), importance_samples=2)
    flow.log_prob(torch.zeros(3, 2), importance_samples=1)


def test_importance_samples_of_an_estimate_inside_a_bound_are_refused():
    """The mean of exp(log weight + noise) is too large, however the noise is centred."""
    flow = CNF(2, augment=1, divergence=Hutchinson())
    assert flow.likelihood == "lower_bound"
    with pytest.raises(ValueError, match=r"no bound; got 2\. Perhaps use flow\.using"):
        flow.log_prob(torch.zeros(3, 2), importance_samples=2)
    flow.using(divergence=Exact()).log_prob(torch.zeros(3, 2), importance_samples=2)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Augment(2, 0), ValueError, "augment must be at least 1; got 0"),
        (lambda: Augment(2, 1.0), TypeError, "augment must be an int; got 1.0"),
        (lambda: Augment(2, 1, hidden_features=8), TypeError, "widths such as .*; got 8"),
        (lambda: Augment(2, 1, hidden_features=(0,)), ValueError, "hidden_features must be at le"),
        (lambda: CNF(2, augment=-1), ValueError, "augment must be at least 0; got -1"),
        (lambda: CNF(3, transforms=[Affine(2)]), ValueError, "features must be the 2 .* got 3"),
        (
            lambda: cnf(2, augment=1).log_prob(torch.zeros(3, 2), importance_samples=0),
            ValueError,
            "importance_samples must be at least 1; got 0",
        ),
        (
            lambda: Flow([Augment(2, 1), Affine(2)]),
            ValueError,
            "Augment gives 3 and Affine takes 2",
        ),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
