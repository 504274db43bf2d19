"""Laws of factoring out: what is left out is left alone, and the density is a product."""

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal
from zoo import PRECISE, cnf, mlp, perturbed

from cnf import Flow, Hutchinson
from cnf.bases import StandardNormal
from cnf.transforms import (
    Affine,
    AffineCoupling,
    Chain,
    ContinuousTransform,
    Conv1x1,
    Dequantize,
    FactorOut,
    Flatten,
    Permute,
    Planar,
    rank_by_contributions,
)


def test_log_prob_is_the_sum_of_those_of_the_parts():
    kept = cnf(2, 3, transforms=[Affine(2)])
    flow = Flow([FactorOut(kept.chain, 5)])
    x, context = torch.randn(4, 5), torch.randn(4, 3)

    rest = MultivariateNormal(torch.zeros(3), torch.eye(3)).log_prob(x[:, 2:])
    expected = kept.log_prob(x[:, :2], context) + rest

    torch.testing.assert_close(flow.log_prob(x, context), expected, rtol=0, atol=1e-7)


def test_what_is_left_out_is_left_alone():
    transform = FactorOut([perturbed(Affine(2))], 5)
    x = torch.randn(4, 5)
    assert torch.equal(transform.to_base(x)[:, 2:], x[:, 2:])
    assert torch.equal(transform.to_data(x)[:, 2:], x[:, 2:])
    assert (transform.to_base(x)[:, :2] != x[:, :2]).all()


def test_nested_levels_each_leave_out_more():
    inner = FactorOut([perturbed(Affine(1))], 2)
    transform = FactorOut([perturbed(Affine(2)), inner], 4)
    x = torch.randn(3, 4)
    _, ladj = transform.to_base_and_ladj(x)
    scales = [transform.chain[0].log_scale, inner.chain[0].log_scale]
    expected = -sum(scale.sum() for scale in scales).expand(3)
    torch.testing.assert_close(ladj, expected)


def test_some_columns_of_a_table_may_be_integers():
    flow = Flow([FactorOut([Dequantize(1, 3)], 2)])
    assert flow.likelihood == "lower_bound"
    x = torch.tensor([[2.0, 0.5], [0.5, 0.5], [0.0, -7.0]])
    assert flow.log_prob(x[::2], importance_samples=2).shape == (2,)
    with pytest.raises(ValueError, match="integers from 0 to 2; got other values in row 1"):
        flow.log_prob(x)


def test_another_solver_or_divergence_reaches_what_is_inside():
    inner = FactorOut([ContinuousTransform(mlp(2))], 3)
    flow = Flow([FactorOut([inner], 4)])
    other = flow.using(solver=PRECISE, divergence=Hutchinson())
    (found,) = (part for part in other.modules() if isinstance(part, ContinuousTransform))
    assert (found.solver, found.divergence) == (PRECISE, Hutchinson())
    assert (flow.likelihood, other.likelihood) == ("exact", "estimate")
    assert [id(p) for p in other.parameters()] == [id(p) for p in flow.parameters()]


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FactorOut([], 3), ValueError, "at least one transform; got none"),
        (lambda: FactorOut([Affine(3)], 3), ValueError, "more than the 3 .*; got 3"),
        (lambda: FactorOut(Affine(2), 3), TypeError, "put the single transform in brackets"),
        (lambda: FactorOut([Affine(2), Affine(1)], 3), ValueError, "gives 2 and Affine takes 1"),
        (lambda: FactorOut([Flatten((1, 2))], 3), ValueError, r"vectors; Flatten takes \(1, 2\)"),
    ],
)
def test_constructor_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def trained_chain():
    """A vector flow that scales, mixes, permutes and factors out, far from the identity."""
    return Chain(
        [
            perturbed(Affine(6)),
            perturbed(AffineCoupling(6)),
            Permute([5, 3, 1, 0, 2, 4]),
            perturbed(Conv1x1((6, 1, 1))),
            perturbed(AffineCoupling(6, mask="last")),
            FactorOut([Chain([Permute([2, 0, 3, 1]), perturbed(Affine(4))])], 6),
            perturbed(Affine(6)),
        ]
    )


def test_shares_of_the_entries_sum_to_the_log_density():
    chain, x = trained_chain(), torch.randn(50, 6)
    z, ladj = chain.to_base_and_ladj(x)
    shares = chain.contributions(x) + Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(shares.sum(-1), Flow(chain).log_prob(x))
    torch.testing.assert_close(chain.contributions(x).sum(-1), ladj)


def test_contributions_stand_at_the_entries_of_z():
    """By the chain rule: of maps of single features, each is the slope of its own entry."""
    parts = [perturbed(Affine(3)), Permute([2, 0, 1]), perturbed(Affine(3)), Permute([1, 0, 2])]
    chain, x = Chain(parts), torch.randn(3)
    slopes = torch.autograd.functional.jacobian(chain.to_base, x).abs()
    torch.testing.assert_close(chain.contributions(x), slopes.amax(-1).log())
    swaps = FactorOut([Chain([Permute([1, 0])])], 3)
    parted = Chain([parts[0], swaps, parts[2]])
    slopes = torch.autograd.functional.jacobian(parted.to_base, x).abs()
    torch.testing.assert_close(parted.contributions(x), slopes.amax(-1).log())
    nested = Chain([parts[0], Chain(parts[1:3]), parts[3]])
    torch.testing.assert_close(nested.contributions(x), chain.contributions(x))


def test_a_ranking_puts_the_largest_shares_first():
    chain, x = trained_chain(), torch.randn(400, 6)
    shares = chain.contributions(x) + Normal(0.0, 1.0).log_prob(chain.to_base(x))
    ranking = rank_by_contributions(chain, x)
    ranked = ranking.to_base(shares.mean(0))
    assert (ranked.diff() <= 0).all()
    assert ranked[0] > ranked[-1]
    # Then a FactorOut keeps the first ones, and the flow is the same density up to its own maps.
    rest = FactorOut([perturbed(Affine(3))], 6)
    flow = Flow([chain, ranking, rest])
    z, ladj = rest.to_base_and_ladj(ranking.to_base(chain.to_base(x)))
    expected = StandardNormal(6).log_prob(z) + ladj + chain.to_base_and_ladj(x)[1]
    torch.testing.assert_close(flow.log_prob(x), expected)
    torch.testing.assert_close(flow.to_data(flow.to_base(x)), x)


def test_channels_of_an_image_are_ranked_as_wholes():
    affine = Affine(12)
    with torch.no_grad():
        affine.log_scale.copy_(torch.tensor([0.0, 1.0, -1.0]).repeat_interleave(4))
    order = rank_by_contributions([affine], torch.zeros(2, 12), shape=(3, 2, 2)).order
    assert order == (8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rank_by_contributions([Affine(6)], torch.zeros(0, 6)), "must have rows"),
        (lambda: rank_by_contributions([Affine(6)], torch.zeros(3, 5)), "x must"),
        (
            lambda: rank_by_contributions([Affine(6)], torch.zeros(3, 6), shape=(2, 2, 2)),
            "must have the 6 entries of z",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused(make, message, shapes_unchecked):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_transform_without_contributions_is_named():
    with pytest.raises(NotImplementedError, match="the ladj of a Planar is no sum"):
        rank_by_contributions([Affine(2), Planar(2)], torch.zeros(3, 2))
