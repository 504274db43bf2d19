"""The typicality test: its level, its power against what is too likely, and its two sides."""

import math

import pytest
import torch
from torch.distributions import Normal
from zoo import seeded

from cnf.diagnostics import TypicalityTest

FEATURES = 50


def log_prob(x):
    return Normal(0.0, 1.0).log_prob(x).sum(-1)


def normal_rows(*shape, generator):
    return torch.randn(*shape, FEATURES, generator=generator)


def of_normal_rows(batch_size, generator):
    training, held_out = (log_prob(normal_rows(20_000, generator=generator)) for _ in range(2))
    return TypicalityTest(training, held_out, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 10])
def test_batches_of_the_data_are_rejected_at_the_level(batch_size):
    generator = seeded()
    test = of_normal_rows(batch_size, generator)
    batches = log_prob(normal_rows(10_000, batch_size, generator=generator))
    for level in (0.01, 0.1):
        share = test.rejects(batches, level=level).double().mean()
        # The error of the share, and of the quantile of 20 000 held-out rows.
        assert abs(share - level) < 4 * (level * (1 - level)) ** 0.5 * (1e-2 + 1e-2)


def test_what_is_denser_than_the_data_is_rejected():
    """A shrunk normal has a higher log-density by 50 (1 - 0.7^2) / 2 nats, and is not typical."""
    generator = seeded()
    test = of_normal_rows(10, generator)
    shrunk = log_prob(0.7 * normal_rows(1000, 10, generator=generator))
    gain = FEATURES * (1 - 0.7**2) / 2
    error = shrunk.std() / 100
    assert abs(shrunk.mean() - test.training.mean() - gain) < 4 * error + 0.2
    assert test.rejects(shrunk).double().mean() > 0.99
    wide = log_prob(1.3 * normal_rows(1000, 10, generator=generator))
    assert test.rejects(wide).double().mean() > 0.99


def test_a_p_value_is_the_share_of_batches_at_least_as_far():
    test = TypicalityTest(torch.zeros(3), torch.tensor([0.0, 1.0, -2.0, 4.0]), resamples=4000)
    far = torch.tensor([[0.0], [-1.0], [2.0], [3.0], [-5.0], [-math.inf]])
    expected = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    torch.testing.assert_close(test.p_value(far), expected, rtol=0, atol=4 * 0.5 / 4000**0.5)
    assert test.p_value(far).min() > 0  # never quite zero
    assert test.rejects(far).tolist() == [False] * 4 + [True] * 2
    assert test.p_value(far.expand(2, 6, 1)).shape == (2, 6)


def test_the_same_seed_draws_the_same_batches():
    held_out = torch.randn(100)
    first, second, other = (
        TypicalityTest(held_out, held_out, batch_size=5, seed=seed).drawn for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_large_batches_are_drawn_in_parts(monkeypatch):
    held_out = torch.randn(100)
    monkeypatch.setattr("cnf.diagnostics.typicality._RESAMPLES_AT_ONCE", 70)
    test = TypicalityTest(held_out, held_out, batch_size=30, resamples=7)
    assert test.drawn.shape == (7,)
    assert (test.drawn.diff() >= 0).all()


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TypicalityTest([0.0], torch.zeros(2)), TypeError, "training must be a torch"),
        (lambda: TypicalityTest(torch.zeros(2), torch.zeros(0)), ValueError, "held_out must have"),
        (
            lambda: TypicalityTest(torch.zeros(2), torch.tensor([0.0, -math.inf])),
            ValueError,
            "held_out must be finite.*row 1",
        ),
        (lambda: TypicalityTest(torch.zeros(2), torch.zeros(2), 0), ValueError, "batch_size must"),
        (
            lambda: TypicalityTest(torch.zeros(2), torch.zeros(2), 3).rejects(torch.zeros(4, 2)),
            ValueError,
            "the 3 rows of a batch on its last axis",
        ),
        (
            lambda: TypicalityTest(torch.zeros(2), torch.zeros(2)).p_value(
                torch.tensor([math.nan])
            ),
            ValueError,
            "must not be NaN",
        ),
        (
            lambda: TypicalityTest(torch.zeros(2), torch.zeros(2)).rejects(
                torch.zeros(1), level=1.0
            ),
            ValueError,
            "level must be between 0 and 1",
        ),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
