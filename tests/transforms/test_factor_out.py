"""Laws of factoring out: what is left out is left alone, and the density is a product."""

import pytest
import torch
from torch.distributions import MultivariateNormal
from zoo import PRECISE, cnf, mlp, perturbed

from cnf import Flow, Hutchinson
from cnf.transforms import Affine, ContinuousTransform, Dequantize, FactorOut, Flatten


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
