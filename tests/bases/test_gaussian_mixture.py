"""Gaussian mixture as a base, and its fit."""

import math

import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture
from torch.distributions import MultivariateNormal

from cnf import CNF, Flow
from cnf.bases import GaussianMixtureBase, mixture_fit
from cnf.bases.mixture_fit import fit_mixture


def two_clusters(rows, features=2, distance=6.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    x[::3] = 0.5 * x[::3] + distance
    return x


@pytest.mark.slow
def test_log_prob_and_draws_are_those_of_the_torch_distribution():
    base = GaussianMixtureBase.from_data(two_clusters(300))
    distribution = base.distribution()
    z = distribution.sample((500,))
    torch.testing.assert_close(base.log_prob(z), distribution.log_prob(z), rtol=0, atol=1e-10)
    drawn = base.rsample(torch.Size([40_000]), generator=torch.Generator().manual_seed(1))
    error = drawn.std(0) / 200
    assert ((drawn.mean(0) - distribution.mean).abs() < 4.5 * error).all()
    spread = (drawn - distribution.mean).square()
    assert ((spread.mean(0) - distribution.variance).abs() < 4.5 * spread.std(0) / 200).all()
    assert base.distribution((3,)).sample().shape == (3, 2)


def test_a_new_one_is_a_standard_normal_until_it_is_initialised():
    base = GaussianMixtureBase(3).double()
    z = torch.randn(5, 3)
    expected = MultivariateNormal(torch.zeros(3), torch.eye(3)).log_prob(z)
    torch.testing.assert_close(base.log_prob(z), expected)
    assert base.needs_initialization
    assert base.rsample(torch.Size([2, 0])).shape == (2, 0, 3)
    flow = Flow([], base)
    x = two_clusters(60, 3)
    flow.initialize(x)
    assert not base.needs_initialization
    torch.testing.assert_close(flow.log_prob(x), GaussianMixtureBase.from_data(x).log_prob(x))


def test_one_mixture_is_as_likely_as_that_of_scikit_learn():
    x = two_clusters(600)
    x = (x - x.mean(0)) / x.std(0)
    share = torch.full((1, 600), 1 / 600, dtype=x.dtype)
    candidate = mixture_fit._Candidate(2, 0.0)
    ours, is_regular = mixture_fit._fitted(candidate, x, share, torch.Generator().manual_seed(0))
    assert is_regular.all()
    theirs = GaussianMixture(2, random_state=0, tol=1e-8).fit(x.numpy())
    assert float(ours.log_prob(x).mean()) == pytest.approx(theirs.score(x.numpy()), abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "features"), [(12, 6), (40, 2), (60, 20), (250, 3)])
def test_rows_of_a_gaussian_lose_little_to_the_shrunk_gaussian(rows, features):
    generator = torch.Generator().manual_seed(rows)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    losses = []
    for _ in range(5):
        x = torch.randn(rows + 500, features, generator=generator, dtype=torch.float64) @ mix
        shrunk = LedoitWolf().fit(x[:rows].numpy())
        covariance = torch.from_numpy(shrunk.covariance_)
        gaussian = MultivariateNormal(torch.from_numpy(shrunk.location_), covariance)
        ours = GaussianMixtureBase.from_data(x[:rows])
        losses.append(float((gaussian.log_prob(x[rows:]) - ours.log_prob(x[rows:])).mean()))
    assert sum(losses) / 5 < 0.1 * math.sqrt(features)


@pytest.mark.slow
def test_rows_of_two_clusters_gain():
    x = two_clusters(800)
    gaussian = MultivariateNormal(x[:400].mean(0), x[:400].T.cov())
    ours = GaussianMixtureBase.from_data(x[:400])
    assert float((ours.log_prob(x[400:]) - gaussian.log_prob(x[400:])).mean()) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1e-12, 1e9])
def test_units_of_the_rows_and_of_the_weights_change_nothing(unit):
    x = two_clusters(200)
    weight = torch.rand(200, dtype=torch.float64) + 0.5
    scale = torch.tensor([unit, 1.0], dtype=torch.float64)
    one = GaussianMixtureBase.from_data(x, weight=weight)
    other = GaussianMixtureBase.from_data(x * scale, weight=weight * 1e-45)
    expected = one.log_prob(x) - math.log(unit)
    torch.testing.assert_close(other.log_prob(x * scale), expected, rtol=0, atol=1e-6)


def test_rows_count_by_weight_and_not_at_weight_0():
    x = two_clusters(300)
    heavy = torch.ones(300, dtype=torch.float64)
    heavy[::3] = 0
    ours = GaussianMixtureBase.from_data(x, weight=heavy)
    without = GaussianMixtureBase.from_data(x[heavy > 0])
    torch.testing.assert_close(ours.log_prob(x), without.log_prob(x))
    chance = GaussianMixtureBase.from_data(x, weight=1 + 9 * heavy).rsample(torch.Size([20_000]))
    share = float((chance.mean(-1) > 4).double().mean())
    assert share == pytest.approx(1 / 21, abs=0.01)


def test_repeated_values_and_collinear_columns_have_a_finite_density():
    x = torch.from_numpy(load_iris().data)
    x = torch.cat([x, x[:, :1] + x[:, 1:2], x[:, :1].round()], -1)
    base = GaussianMixtureBase.from_data(x[::2])
    assert base.log_prob(x[1::2]).isfinite().all()
    assert GaussianMixtureBase.from_data(x[:2, :2]).log_prob(x[:, :2]).isfinite().all()


@pytest.mark.parametrize(
    ("z", "weight", "message"),
    [
        (torch.ones(5, 2), None, r"vary in every feature; it is constant in \[0, 1\]"),
        (torch.randn(1, 2), None, "at least 2 rows"),
        (torch.randn(3, 2), torch.tensor([1.0, 0.0, 0.0]), "at least 2 rows of positive weight"),
    ],
)
def test_rows_without_a_density_are_refused(z, weight, message):
    with pytest.raises(ValueError, match=message):
        fit_mixture(z, weight)


def test_two_rows_are_not_on_a_line():
    x = torch.randn(2, 3)
    held_out = torch.randn(50, 3)
    assert GaussianMixtureBase.from_data(x).log_prob(held_out).mean() > -1000


def test_half_precision_and_few_rows_at_a_time_give_the_same(monkeypatch):
    base = GaussianMixtureBase.from_data(two_clusters(100).float())
    z = two_clusters(40, seed=1).bfloat16()
    expected = base.log_prob(z.float())
    half = base.bfloat16().log_prob(z)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.2)
    whole = GaussianMixtureBase.from_data(two_clusters(100))
    z = two_clusters(300, seed=1)
    expected = whole.log_prob(z)
    drawn = whole.rsample(torch.Size([30]), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("cnf.bases.mixture_fit._NUMBERS_AT_ONCE", 1)
    monkeypatch.setattr("cnf.bases.gaussian_mixture._NUMBERS_AT_ONCE", 1)
    torch.testing.assert_close(whole.log_prob(z), expected)
    again = whole.rsample(torch.Size([30]), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, drawn)


def test_state_dicts_are_loaded_whatever_the_number_of_components():
    base = GaussianMixtureBase.from_data(two_clusters(100))
    z = torch.randn(4, 2)
    for other in (GaussianMixtureBase(2), GaussianMixtureBase(2, 3)):
        other.double().load_state_dict(base.state_dict())
        assert torch.equal(other.log_prob(z), base.log_prob(z))
    other.load_state_dict(GaussianMixtureBase(2).double().state_dict())
    assert other.components == 0
    flow = CNF(2, base=base)
    fresh = CNF(2)
    fresh.load_state_dict(flow.state_dict())
    assert torch.equal(fresh.base.log_prob(z), base.log_prob(z))
