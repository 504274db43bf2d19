"""Normal scores: the marginal densities of the rows, exactly inverted."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from cnf import CNF, Flow, ReverseKL, TrainingConfig, fit, load, save
from cnf.transforms import NormalScores, Whiten


def skewed(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, generator=generator, dtype=torch.float64).exp()


def test_until_it_is_set_it_is_the_identity():
    x = torch.linspace(-5, 5, 20, dtype=torch.float64).unsqueeze(-1).expand(-1, 2)
    z, ladj = NormalScores(2).double().to_base_and_ladj(x)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(ladj, torch.zeros(20, dtype=torch.float64))


@pytest.mark.parametrize("knots", [2, 8, 32])
def test_a_knot_is_at_the_quantile_of_its_score(knots):
    """Quantiles in the middle of each row's step, but for a hundredth of an affine map."""
    x = skewed(10_001)
    transform = NormalScores.from_data(x) if knots == 32 else NormalScores(2, knots).double()
    transform.initialize(x)
    scores = transform.scores
    assert scores[-1].item() == pytest.approx(norm.ppf(1 - 0.5 / 10_001))
    quantiles = torch.from_numpy(np.quantile(x, norm.cdf(scores), axis=0, method="hazen"))
    expected = 0.99 * quantiles + 0.01 * (x.mean(0) + x.std(0) * scores.unsqueeze(-1))
    torch.testing.assert_close(transform.places.T, expected)
    torch.testing.assert_close(transform.to_base(transform.places.T), scores.expand(2, -1).T)


def test_inverse_beyond_the_knots_and_everywhere_between():
    transform = NormalScores.from_data(skewed(500))
    x = torch.linspace(-30, 60, 4001, dtype=torch.float64).unsqueeze(-1).expand(-1, 2)
    z, ladj = transform.to_base_and_ladj(x)
    assert (z.diff(dim=0) > 0).all()
    back, minus = transform.to_data_and_ladj(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -ladj)


def test_the_density_is_continuous():
    """A step of the slope at a knot would be a jump of the density there."""
    transform = NormalScores.from_data(skewed(300))
    knots, tiny = transform.places.T, 1e-9
    left, right = (transform.contributions(knots + side) for side in (-tiny, tiny))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_the_density_of_a_skewed_column_is_close_to_the_truth():
    """Of new rows of a log-normal density, within 0.03 nats for each of two features."""
    train, test = skewed(20_000), skewed(20_000, seed=1)
    flow = Flow([NormalScores.from_data(train)])
    truth = torch.distributions.LogNormal(torch.zeros(2).double(), torch.ones(2).double())
    gap = truth.log_prob(test).sum(-1).mean() - flow.log_prob(test).mean()
    assert abs(gap) < 0.06


def test_repeated_values_keep_the_slope_bounded():
    x = torch.zeros(400, 1, dtype=torch.float64)
    x[:40] = torch.linspace(-1, 1, 40, dtype=torch.float64).unsqueeze(-1)
    transform = NormalScores.from_data(x)
    slope = transform.contributions(x).exp()
    assert slope.max() <= 2 * math.sqrt(400) / x.std()


def test_a_weight_counts_as_rows():
    x = skewed(200)
    repeated = NormalScores.from_data(x.repeat_interleave(3, 0))
    few = NormalScores.from_data(x, weight=torch.full((200,), 1e-45, dtype=torch.float64))
    torch.testing.assert_close(few.places, NormalScores.from_data(x).places)
    none = torch.cat([x, skewed(50, seed=3)])
    weight = torch.cat([torch.ones(200), torch.zeros(50)]).double()
    torch.testing.assert_close(
        NormalScores.from_data(none, weight=weight).places, NormalScores.from_data(x).places
    )
    assert repeated.scores[-1] > few.scores[-1]


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e25])
def test_units_do_not_matter(scale):
    x = skewed(300).float()
    expected = NormalScores.from_data(x).to_base(x)
    transform = NormalScores.from_data(scale * x)
    z = transform.to_base(scale * x)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transform.to_data(z) / scale, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [[0.0, 0, 0], [1.0, 0, 0], [1.0, 1e-30, 0]])
def test_weights_of_one_row_are_refused(weight):
    x = skewed(3)
    with pytest.raises(ValueError, match="weight must"):
        NormalScores.from_data(x, weight=torch.tensor(weight, dtype=torch.float64))


def test_a_column_without_variation_is_refused():
    with pytest.raises(ValueError, match=r"constant in \[0\]"):
        NormalScores.from_data(torch.ones(5, 1))


def test_one_knot_is_refused():
    with pytest.raises(ValueError, match="knots must be at least 2"):
        NormalScores(2, knots=1)


@pytest.mark.slow
def test_a_cnf_needs_no_other_scaling_and_fit_sets_it_from_the_training_rows(tmp_path):
    x = skewed(200)
    flow = CNF(2, transforms=[NormalScores(2), Whiten(2)])
    assert [type(part).__name__ for part in flow.transforms[:-1]] == ["NormalScores", "Whiten"]
    fit(flow, x, TrainingConfig(steps=2, progress=False), validation=None)
    torch.testing.assert_close(flow.transforms[0].places, NormalScores.from_data(x).places)
    save(flow, tmp_path / "flow.safetensors")
    torch.testing.assert_close(load(tmp_path / "flow.safetensors").log_prob(x), flow.log_prob(x))


def test_without_data_it_stays_the_identity():
    """As training by an objective without data leaves it."""
    flow = CNF(2, transforms=[NormalScores(2)])
    objective = ReverseKL(flow, lambda x: -x.square().sum(-1), draws=4)
    fit(objective, None, TrainingConfig(steps=1, progress=False))
    flow.initialize(skewed(50))
    assert flow.transforms[0].scores[-1] == 3


def test_the_density_integrates_to_one():
    x = skewed(50)[:, :1]
    points = torch.linspace(-40, 80, 400_001, dtype=torch.float64)
    density = Flow([NormalScores.from_data(x)]).log_prob(points.unsqueeze(-1)).exp()
    assert abs(torch.trapezoid(density, points) - 1) < 1e-6
