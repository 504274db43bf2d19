"""Laws of transforms that draw both ways: their bounds lie below a known marginal, and reach it."""

import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal
from zoo import perturbed, seeded

from cnf import Flow
from cnf.bases import ConditionalNormal
from cnf.transforms import VAE, Affine, StochasticPermutation

ROWS = 4000


def permuted_normals():
    """Three independent normals in a random order, and the density of the mixture of orders."""
    affine = perturbed(Affine(3))
    flow = Flow([StochasticPermutation(3), affine])
    orders = torch.tensor(list(itertools.permutations(range(3))))

    def log_prob(x):
        with torch.no_grad():
            each = Flow([affine]).log_prob(x[..., orders])
        return each.logsumexp(-1) - math.log(6)

    return flow, log_prob


def linear_vae():
    """A linear Gaussian decoder, whose marginal is known, and an encoder that is too wide."""
    decoder = ConditionalNormal(2, 1, hidden_features=())
    encoder = ConditionalNormal(1, 2, hidden_features=())
    with torch.no_grad():
        decoder.network[0].weight[:2] = torch.tensor([[1.0], [-0.5]])
        encoder.network[0].weight[0] = torch.tensor([0.3, -0.2])
    weight = torch.tensor([1.0, -0.5])
    covariance = torch.outer(weight, weight) + torch.eye(2)
    return Flow([VAE(encoder, decoder)]), MultivariateNormal(torch.zeros(2), covariance).log_prob


@pytest.mark.parametrize("make", [permuted_normals, linear_vae])
def test_the_bound_lies_below_the_marginal_and_rises(make):
    flow, marginal = make()
    assert flow.likelihood == "lower_bound"
    x = torch.randn(flow.features)
    truth, gaps = marginal(x), []
    for count in (1, 4, 64):
        with torch.no_grad():
            bound = flow.log_prob(x.expand(ROWS, -1), importance_samples=count, generator=seeded())
        gap = truth - bound
        error = gap.std() / ROWS**0.5
        assert gap.mean() > -4 * error  # 4 standard errors: 3e-5
        gaps.append((gap.mean(), error))
    for (looser, first), (tighter, second) in itertools.pairwise(gaps):
        assert tighter < looser - 4 * math.hypot(first, second)
    assert gaps[-1][0] < 0.1 * gaps[0][0]


def test_the_true_posterior_as_encoder_gives_the_marginal():
    flow, marginal = linear_vae()
    weight = torch.tensor([1.0, -0.5])
    with torch.no_grad():
        variance = 1 / (1 + weight @ weight)
        flow.transforms[0].encoder.network[0].weight[0] = variance * weight
        flow.transforms[0].encoder.network[0].bias[1] = 0.5 * variance.log()
    x = torch.randn(5, 2)
    torch.testing.assert_close(flow.log_prob(x).detach(), marginal(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("points", [1, 2])
def test_every_order_is_drawn_as_often(points):
    part = StochasticPermutation(3 * points, point_features=points)
    x = torch.arange(3.0 * points)
    for draw in (part.to_base, part.to_data):
        z = draw(x.expand(6000, -1), generator=seeded())
        assert torch.equal(z.sort(-1).values, x.expand(6000, -1))
        counts = z[:, ::points].unique(dim=0, return_counts=True)[1]
        assert len(counts) == 6
        assert (counts - 1000).abs().max() < 4 * (6000 * 5 / 36) ** 0.5  # 4 standard errors


def test_the_draws_of_a_vae_have_its_marginal():
    flow, _ = linear_vae()
    x = flow.sample((20_000,), generator=seeded())
    assert Normal(0.0, 2**0.5).cdf(x[:, 0]).mean() == pytest.approx(0.5, abs=0.01)
    assert x[:, 0].var() == pytest.approx(2, abs=0.1)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: VAE(ConditionalNormal(1, 3), ConditionalNormal(2, 1)),
            ValueError,
            "got 1 given 3, and 2 given 1",
        ),
        (lambda: VAE(None, ConditionalNormal(2, 1)), TypeError, "encoder must be a Base"),
        (lambda: StochasticPermutation(3, point_features=2), ValueError, "must divide the 3"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
