"""Laws of metrics: units, and what weights are worth."""

import math

import pytest
import torch

from cnf import Flow
from cnf.bases import StandardNormal
from cnf.metrics import bits_per_dim, effective_sample_size, gaussian_log_prob, log_mean_exp
from cnf.transforms import Dequantize


def test_a_fair_choice_among_k_levels_is_log2_k_bits():
    log_prob = torch.tensor([-5 * math.log(2.0), -5 * math.log(256.0)])
    torch.testing.assert_close(bits_per_dim(log_prob, 5), torch.tensor([1.0, 8.0]))


def test_bits_of_integers_do_not_depend_on_their_scaling_to_the_unit_interval():
    """The log of the number of levels is in the likelihood, so a flat density costs log2 of it."""

    class Flat(StandardNormal):
        def _log_prob(self, z, context, generator):
            return torch.where(((z >= 0) & (z < 1)).all(-1), 0.0, -math.inf)

    x = torch.randint(64, (10, 3)).to(torch.float64)
    log_prob = Flow([Dequantize(3, 64)], Flat(3)).log_prob(x)
    torch.testing.assert_close(bits_per_dim(log_prob, 3), torch.full((10,), 6.0))


@pytest.mark.usefixtures("shapes_unchecked")
def test_dimensions_are_counted_from_one():
    with pytest.raises(ValueError, match="dimensions must be at least 1; got 0"):
        bits_per_dim(torch.zeros(2), 0)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_weights_are_worth_all_draws(shift, dtype):
    log_weights = torch.full((100, 3), shift, dtype=dtype)
    expected = torch.full((3,), 100.0, dtype=dtype)
    torch.testing.assert_close(effective_sample_size(log_weights), expected)
    torch.testing.assert_close(log_mean_exp(log_weights), log_weights[0])


def test_weights_1_2_3_and_0_are_worth_36_14ths_and_have_mean_6_4ths():
    log_weights = torch.tensor([1.0, 2.0, 3.0, 0.0]).log()
    for shift in (0.0, 700.0, -800.0):
        shifted = log_weights + shift
        torch.testing.assert_close(effective_sample_size(shifted), torch.tensor(36 / 14))
        torch.testing.assert_close(log_mean_exp(shifted), torch.tensor(math.log(1.5) + shift))


def test_a_weight_that_outdoes_the_rest_is_worth_one_draw():
    log_weights = torch.cat([torch.tensor([2000.0]), torch.zeros(99)])
    torch.testing.assert_close(effective_sample_size(log_weights), torch.tensor(1.0))


def test_weights_of_a_wider_normal_have_the_known_worth():
    """For p = N(0, 1) and q = N(0, s^2), E[w]^2 / E[w^2] = sqrt(2 s^2 - 1) / s^2; within 5 %."""
    std = 1.5
    x = std * torch.randn(20_000)
    p, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.0, std)
    log_weights = p.log_prob(x) - q.log_prob(x) + 3.0
    share = effective_sample_size(log_weights) / 20_000
    torch.testing.assert_close(share.item(), math.sqrt(2 * std**2 - 1) / std**2, rtol=0.05, atol=0)
    torch.testing.assert_close(log_mean_exp(log_weights).item(), 3.0, rtol=0, atol=0.02)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("metric", [effective_sample_size, log_mean_exp])
@pytest.mark.parametrize(
    ("log_weights", "message"),
    [
        (torch.tensor(0.0), r"must have shape \(draws, \*batch\); got \(\)"),
        (torch.zeros(0, 2), r"must have shape \(draws, \*batch\); got \(0, 2\)"),
        (torch.tensor([0.0, math.nan]), "must be finite, or -inf for a weight of zero.*got 1 col"),
        (torch.tensor([0.0, math.inf]), "must be finite, or -inf for a weight of zero"),
        (torch.full((3, 2), -math.inf), "not -inf throughout; got 2 columns"),
    ],
)
def test_weights_that_have_no_worth_are_refused(metric, log_weights, message):
    with pytest.raises(ValueError, match=message):
        metric(log_weights)


def test_the_gaussian_is_that_of_mean_and_covariance():
    training = torch.randn(50, 3) @ torch.randn(3, 3) + 5
    x = torch.randn(10, 3) + 5
    offset = x - training.mean(0)
    inverse = torch.linalg.inv(training.T.cov())
    squares = (offset @ inverse * offset).sum(-1)
    volume = torch.linalg.slogdet(2 * math.pi * training.T.cov()).logabsdet
    torch.testing.assert_close(gaussian_log_prob(x, training), -(squares + volume) / 2)


@pytest.mark.parametrize(
    "training",
    [torch.randn(1, 2), torch.ones(5, 2), torch.arange(8.0).reshape(4, 2), torch.randn(2, 2)],
    ids=["one row", "constant", "a line", "too few rows"],
)
def test_there_is_no_gaussian_of_a_singular_covariance(training):
    assert gaussian_log_prob(torch.zeros(1, 2), training) is None
