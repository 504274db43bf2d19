"""Whitening: a normal density with a shrunk covariance."""

import pytest
import torch
from sklearn.covariance import LedoitWolf

from cnf import Flow
from cnf.transforms import Whiten


def correlated(rows, features=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return 5 + noise @ mixing


@pytest.mark.parametrize("rows", [6, 20, 3000])
def test_the_shrinkage_is_that_of_ledoit_and_wolf(rows):
    """Of scikit-learn, for rows standardised before."""
    x = correlated(rows)
    std, mean = torch.std_mean(x, 0)
    scaled = (x - mean) / (std * ((rows - 1) / rows) ** 0.5)
    expected = LedoitWolf().fit(scaled.numpy())
    transform = Whiten.from_data(x)
    factor = transform.scale_tril / std.unsqueeze(-1)
    torch.testing.assert_close(factor @ factor.T, torch.from_numpy(expected.covariance_))


def test_a_flow_of_it_is_the_normal_density():
    x = correlated(500)
    transform = Whiten.from_data(x)
    normal = torch.distributions.MultivariateNormal(transform.mean, scale_tril=transform.scale_tril)
    torch.testing.assert_close(Flow([transform]).log_prob(x), normal.log_prob(x))


def test_fewer_rows_than_features_and_equal_columns_give_a_finite_map():
    few = correlated(4, features=10)
    assert Flow([Whiten.from_data(few)]).log_prob(few).isfinite().all()
    x = correlated(200, features=2)
    x = torch.cat([x, x[:, :1] * 2 + 1], -1)
    z, ladj = Whiten.from_data(x).to_base_and_ladj(x)
    assert z.isfinite().all()
    assert ladj.isfinite().all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_do_not_matter(scale):
    x = correlated(50)
    units = torch.tensor([scale, 1.0, 3.0, 1 / scale], dtype=torch.float64)
    torch.testing.assert_close(
        Whiten.from_data(x * units).to_base(x * units), Whiten.from_data(x).to_base(x)
    )


def test_a_weight_counts_as_rows():
    x = correlated(40)
    weight = torch.ones(40, dtype=torch.float64)
    weight[30:] = 0
    torch.testing.assert_close(
        Whiten.from_data(x, weight=weight).scale_tril, Whiten.from_data(x[:30]).scale_tril
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    x = correlated(50, features=2)
    transform = Whiten.from_data(x).to(dtype)
    z = transform.to_base(x.to(dtype))
    assert z.dtype == dtype
    torch.testing.assert_close(z.double(), Whiten.from_data(x).to_base(x), rtol=0.1, atol=0.2)


def test_any_batch_shape():
    x = correlated(24)
    transform = Whiten.from_data(x)
    z, ladj = transform.to_base_and_ladj(x.view(2, 3, 4, 4))
    torch.testing.assert_close(z, transform.to_base(x).view(2, 3, 4, 4))
    assert ladj.shape == (2, 3, 4)
    torch.testing.assert_close(transform.to_base(x[0]), z[0, 0, 0])
