"""Laws of the count of live bytes."""

import pytest
import torch
from zoo import cnf

from cnf import ODESolver
from cnf._memory import LiveBytes, bytes_in, in_words


def test_only_what_operations_allocate_counts_and_only_once():
    given = torch.randn(100)
    with LiveBytes() as live:
        view = given[10:].reshape(9, 10).T.expand(2, 10, 9)
        assert live.now == 0
        made = given.exp()
        made += 1
        part = made[:3]
        assert live.now == 800
        del made
        assert live.now == 800  # the part keeps it
        del part
        assert (live.now, live.peak) == (0, 800)
        pair = view.max(-1)
        assert live.now == 2 * 20 * 8
        del pair
    assert live.now == 0


def test_what_is_kept_for_a_gradient_lives_until_it_is_taken():
    x = torch.randn(1000, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().sin().sum()
        assert live.now == 8000 + 8  # exp(x), of which both derivatives are made
        y.backward()
        assert live.now == 8000 + 8  # the gradient, in its place
        assert live.peak >= 3 * 8000


def test_counts_within_counts_agree_and_are_the_same_each_time():
    flow, x = cnf(solver=ODESolver(method="rk4", steps=3)), torch.randn(50, 2)
    with LiveBytes() as outer, LiveBytes() as inner:
        flow.log_prob(x)
    with LiveBytes() as again:
        flow.log_prob(x)
    assert outer.peak == inner.peak == again.peak > 50 * 8 * 8
    assert outer.now == inner.now == 0


def test_the_numbers_are_those_without():
    flow, x = cnf(), torch.randn(5, 2)
    with LiveBytes():
        watched = flow.log_prob(x)
    assert torch.equal(watched, flow.log_prob(x))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1 GiB", 2**30),
        (" 500MB ", 500_000_000),
        ("0.5 kib", 512),
        ("3 b", 3),
        ("2 TB", 2 * 10**12),
        ("4096", None),
        ("1 Gi", None),
        ("-1 GB", None),
        ("GiB", None),
        ("1 GiB or so", None),
    ],
)
def test_a_size_is_a_number_and_a_unit(text, size):
    assert bytes_in(text) == size


@pytest.mark.parametrize("size", [1, 1023, 1024, 2**20, 3 * 2**30, 2**40, 2**50])
def test_a_size_in_words_is_that_size(size):
    assert bytes_in(in_words(size)) == pytest.approx(size, rel=0.01)
