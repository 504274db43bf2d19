"""Laws of what starts from the data: set once, by `fit` too, and kept in a file."""

import pytest
import torch
from training_runs import config
from zoo import cnf, perturbed, rows_for

from cnf import Flow, fit, load, save
from cnf.transforms import ActNorm, Affine, FactorOut


@pytest.mark.parametrize("shape", [3, (3, 2, 2)], ids=["vector", "image"])
def test_the_first_rows_come_out_with_mean_0_and_standard_deviation_1(shape):
    transform = ActNorm(shape)
    x = 5 + 3 * torch.randn(50, transform.features)
    assert transform.needs_initialization
    transform.initialize(x)
    assert not transform.needs_initialization
    channels = transform.to_base(x).reshape(50, 3, -1).movedim(1, 0).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(3), rtol=0, atol=1e-12)
    torch.testing.assert_close(channels.std(1, correction=0), torch.ones(3), rtol=0, atol=1e-12)


def test_it_is_the_identity_until_then_and_later_rows_change_nothing():
    transform = ActNorm(2)
    x = 5 + 3 * torch.randn(10, 2)
    assert torch.equal(transform.to_base(x), x)
    transform.initialize(x)
    z = transform.to_base(x)
    transform.initialize(100 * x)
    assert torch.equal(transform.to_base(x), z)


def test_the_ladj_is_that_of_the_scale_alone():
    transform = perturbed(ActNorm((2, 1, 3)))
    x = torch.randn(4, 6)
    _, ladj = transform.to_base_and_ladj(x)
    with torch.no_grad():
        transform.loc += 5
    assert torch.equal(transform.to_base_and_ladj(x)[1], ladj)
    expected = -3 * transform.log_scale.sum().expand(4)
    torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-12)


def test_a_constant_feature_is_shifted_alone():
    transform = ActNorm(2)
    x = torch.stack([torch.full((5,), 7.0), torch.arange(5.0)], -1)
    transform.initialize(x)
    assert torch.equal(transform.to_base(x)[:, 0], torch.zeros(5))
    with pytest.raises(ValueError, match=r"x must have at least one row; got shape \(0, 2\)"):
        ActNorm(2).initialize(x[:0])


def test_each_part_of_a_flow_starts_from_what_the_parts_before_it_give():
    inner, last = ActNorm(2), ActNorm(3)
    flow = Flow([perturbed(Affine(3)), FactorOut([perturbed(Affine(2)), inner], 3), last])
    x = 5 + 3 * torch.randn(40, 3)
    flow.initialize(x)
    z = flow.to_base(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-12)
    assert not inner.needs_initialization
    torch.testing.assert_close(last.log_scale[:2], torch.zeros(2), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_fit_starts_it_and_a_file_keeps_it(tmp_path):
    flow = cnf(transforms=[ActNorm(2)])
    x = 100 + 5 * torch.randn(30, 2)
    fit(flow, x, config(1, learning_rate=1e-9), validation=None)
    torch.testing.assert_close(flow.chain[0].loc, x.mean(0), rtol=0, atol=1e-6)

    save(flow, tmp_path / "flow.safetensors")
    loaded = load(tmp_path / "flow.safetensors")
    assert not loaded.chain[0].needs_initialization
    rows, _ = rows_for(flow, 3)
    assert torch.equal(loaded.log_prob(rows), flow.log_prob(rows))
