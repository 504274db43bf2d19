"""Laws of metrics: units."""

import math

import pytest
import torch

from cnf import Dequantize, Flow
from cnf.bases import StandardNormal
from cnf.metrics import bits_per_dim, gaussian_log_prob


def test_a_fair_choice_among_k_levels_is_log2_k_bits():
    log_prob = torch.tensor([-5 * math.log(2.0), -5 * math.log(256.0)])
    torch.testing.assert_close(bits_per_dim(log_prob, 5), torch.tensor([1.0, 8.0]))


def test_bits_of_integers_do_not_depend_on_their_scaling_to_the_unit_interval():
    """The log of the number of levels is in the likelihood, so a flat density costs log2 of it."""

    class Flat(StandardNormal):
        def log_prob(self, z):
            return torch.where(((z >= 0) & (z < 1)).all(-1), 0.0, -math.inf)

    x = torch.randint(64, (10, 3)).to(torch.float64)
    log_prob = Flow([Dequantize(3, 64)], Flat(3)).log_prob(x)
    torch.testing.assert_close(bits_per_dim(log_prob, 3), torch.full((10,), 6.0))


@pytest.mark.usefixtures("shapes_unchecked")
def test_dimensions_are_counted_from_one():
    with pytest.raises(ValueError, match="dimensions must be at least 1; got 0"):
        bits_per_dim(torch.zeros(2), 0)


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
