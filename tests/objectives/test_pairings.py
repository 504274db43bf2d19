"""Laws of pairings: the optimum, and what it does to the base given a context."""

import itertools
import math

import pytest
import torch
from scipy.stats import kstest

from cnf.objectives import IndependentPairing, LinearPath, OptimalTransport


def cost(x0, x1, context, order, weight):
    """The cost of pairing ``x0[order]`` with x1, as documented."""
    total = (x0[order] - x1).square().sum()
    if context is not None:
        scaled = context / context.std(0, correction=0)
        total = total + weight * (scaled[order] - scaled).square().sum()
    return total


@pytest.mark.parametrize("context_features", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_order_of_five_rows_is_cheaper(context_features, seed):
    torch.manual_seed(seed)
    x0, x1 = torch.randn(5, 3), 4 + 2 * torch.randn(5, 3)
    context = 10 + 3 * torch.randn(5, context_features) if context_features else None
    weight = 0.7
    orders = [torch.tensor(order) for order in itertools.permutations(range(5))]
    best = min(orders, key=lambda order: cost(x0, x1, context, order, weight).item())

    paired = OptimalTransport(context_weight=weight)(x0, x1, context)

    assert torch.equal(paired, x0[best])


def test_on_a_line_the_optimum_pairs_in_order():
    x0, x1 = torch.randn(200, 1), torch.randn(200, 1).exp()
    paired = OptimalTransport()(x0, x1)
    assert torch.equal(paired[x1.flatten().argsort()], x0.sort(0).values)


def labelled_draws(pairing, with_context):
    """Base points that met rows of class 1, whose data lie to the right, over many minibatches."""
    found = []
    for _ in range(60):
        label = torch.randint(2, (64, 1)).double()
        x1 = torch.cat([6 * label - 3, torch.zeros(64, 1)], -1) + 0.3 * torch.randn(64, 2)
        x0 = pairing(torch.randn(64, 2), x1, label if with_context else None)
        found.append(x0[label.flatten() == 1])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("pairing", "with_context", "is_normal"),
    [
        (IndependentPairing(), True, True),
        (OptimalTransport(), True, True),
        (OptimalTransport(), False, False),
    ],
    ids=["independent", "aware of the context", "blind to the context"],
)
def test_the_base_given_a_class_stays_normal_if_the_pairing_knows_the_class(
    pairing, with_context, is_normal
):
    """At 0.1 %, given a fixed seed; blind to the class, the bias is beyond any doubt."""
    pvalue = kstest(labelled_draws(pairing, with_context)[:, 0].numpy(), "norm").pvalue
    assert pvalue > 1e-3 if is_normal else pvalue < 1e-12


def test_pairs_share_a_class_where_classes_repeat():
    label = torch.randint(3, (64, 1)).double()
    x1 = 5 * label + torch.randn(64, 2)
    marked = torch.cat([torch.randn(64, 1), label], -1)  # each start carries its own class
    paired = OptimalTransport(context_weight=1e6)(marked, x1, label)
    assert torch.equal(paired[:, 1:], label)
    assert not torch.equal(paired, marked)


def test_a_very_large_weight_pairs_rows_of_different_contexts_independently():
    x0, x1, context = torch.randn(64, 2), torch.randn(64, 2), torch.randn(64, 2)
    assert torch.equal(OptimalTransport(context_weight=1e9)(x0, x1, context), x0)


@pytest.mark.parametrize("with_context", [False, True])
def test_optimal_transport_makes_paths_shorter(with_context):
    x0, x1 = torch.randn(128, 2), torch.randn(128, 2)
    context = torch.randint(2, (128, 1)).double() if with_context else None

    def mean_squared_velocity(pairing):
        t, start = torch.rand(128), pairing(x0, x1, context)
        return LinearPath().state_and_velocity(t, start, x1)[1].square().mean()

    independent, optimal = map(mean_squared_velocity, (IndependentPairing(), OptimalTransport()))
    assert optimal < 0.3 * independent


def test_a_pairing_loses_no_row_and_adds_none():
    x0, x1 = torch.randn(50, 3), torch.randn(50, 3)
    paired = OptimalTransport()(x0, x1, torch.randn(50, 1))
    assert torch.equal(paired.sort(0).values, x0.sort(0).values)


def test_the_scale_of_a_context_does_not_matter_nor_one_that_is_constant():
    x0, x1, context = torch.randn(40, 2), torch.randn(40, 2), torch.randn(40, 2)
    pairing = OptimalTransport(context_weight=0.5)
    paired = pairing(x0, x1, context)
    scaled = torch.cat([1e6 * context + 5, torch.full((40, 1), 7.0)], -1)
    assert torch.equal(pairing(x0, x1, scaled), paired)
    assert torch.equal(pairing(x0, x1, torch.ones(40, 1)), pairing(x0, x1))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match=r"context_weight must be positive and finite.*biased"):
        OptimalTransport(context_weight=weight)
