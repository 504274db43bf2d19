"""Laws of a flow as a torch distribution."""

import pytest
import torch
from torch.distributions import (
    Distribution,
    Independent,
    MultivariateNormal,
    constraints,
    kl_divergence,
)
from torch.distributions.transforms import Transform
from zoo import (
    BOUNDS,
    COARSE,
    EVERY_FLOW,
    EXACT_FLOWS,
    base_rows_for,
    cnf,
    perturbed,
    rows_for,
    seeded,
)

from cnf import CNF, Flow, ODESolver, count_evaluations
from cnf.baselines import NamedMixture
from cnf.transforms import Affine, ContinuousTransform
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

every_flow = pytest.mark.parametrize("make", EVERY_FLOW.values(), ids=EVERY_FLOW)


def test_it_is_a_torch_distribution():
    distribution = CNF(2, 3)(torch.randn(5, 3))
    assert isinstance(distribution, Distribution)
    assert distribution.batch_shape == (5,)
    assert distribution.event_shape == (2,)
    assert distribution.has_rsample
    assert distribution.support is constraints.real_vector
    assert "batch_shape=(5,), event_shape=(2,)" in repr(distribution)


@pytest.mark.parametrize("sample_shape", [(), (4,), (3, 4), 4], ids=str)
def test_calls_agree_with_those_of_the_flow(sample_shape):
    flow, context = cnf(2, 3), torch.randn(5, 3)
    distribution = flow(context)

    def generator():
        return torch.Generator().manual_seed(1)

    x = distribution.sample(sample_shape, generator=generator())
    assert torch.equal(x, flow.sample(sample_shape, context, generator=generator()))
    again = distribution.rsample(sample_shape, generator=generator())
    torch.testing.assert_close(again.detach(), x, rtol=1e-12, atol=1e-12)
    assert torch.equal(distribution.log_prob(x), flow.log_prob(x, context))
    same, log_prob = distribution.rsample_and_log_prob(sample_shape, generator=generator())
    torch.testing.assert_close(same, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_prob, distribution.log_prob(x), rtol=0, atol=1e-6)


def test_expanded_without_context():
    flow = cnf()
    distribution = flow().expand((4,))
    assert distribution.batch_shape == (4,)
    assert distribution.sample((3,)).shape == (3, 4, 2)
    assert len(distribution.sample().unique(dim=0)) == 4
    x = torch.randn(2)
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x).expand(4))
    assert distribution.expand((5, 4)).sample().shape == (5, 4, 2)
    with pytest.raises(ValueError, match="batch_shape must be one that"):
        distribution.expand((3,))


def test_expanded_with_context():
    flow, context = cnf(2, 3), torch.randn(4, 3)
    distribution = flow(context).expand((5, 4))
    assert distribution.batch_shape == (5, 4)
    x = torch.randn(5, 4, 2)
    expected = flow.log_prob(x, context)
    torch.testing.assert_close(distribution.log_prob(x), expected, rtol=0, atol=1e-6)


def test_transform_and_base_make_up_the_density():
    distribution = cnf(2, 3)(torch.randn(4, 3))
    transform = distribution.transform
    assert isinstance(transform, Transform)
    x = torch.randn(4, 2)
    z = transform(x)
    torch.testing.assert_close(transform.inv(z), x, rtol=0, atol=1e-6)
    ladj = transform.log_abs_det_jacobian(x, z)
    torch.testing.assert_close(transform.call_and_ladj(x), (z, ladj), rtol=0, atol=1e-6)
    expected = distribution.base.log_prob(z) + ladj
    torch.testing.assert_close(distribution.log_prob(x), expected, rtol=0, atol=1e-6)
    assert distribution.base.batch_shape == (4,)


def test_base_distribution_is_the_base_of_the_flow():
    flow = cnf(3)
    z = torch.randn(5, 3)
    torch.testing.assert_close(flow().base.log_prob(z), flow.base.log_prob(z))


def test_torch_transformed_distribution_gives_the_same_density():
    flow = cnf()
    distribution = flow()
    composed = torch.distributions.TransformedDistribution(
        distribution.base, [distribution.transform.inv]
    )
    x = torch.randn(5, 2)
    torch.testing.assert_close(composed.log_prob(x), flow.log_prob(x), rtol=0, atol=1e-6)


def test_log_prob_refuses_what_the_flow_refuses():
    with pytest.raises(ValueError, match="NaN or inf in row 0"):
        CNF(2)().log_prob(torch.full((1, 2), torch.nan))
    with pytest.raises(ValueError, match="conditional; got None"):
        CNF(2, 3)()


@every_flow
def test_it_tells_whether_its_draws_have_a_gradient(make):
    """That is, whether each entry of x moves with the base point that it comes from."""
    flow = make().using(solver=COARSE)
    context = rows_for(flow, 2)[1]
    z = base_rows_for(flow.chain, 2).requires_grad_()
    entries = flow.to_data(z, context).flatten(1).sum(0)
    slopes = [
        torch.autograd.grad(entry, z, retain_graph=True, materialize_grads=True)[0]
        for entry in entries
    ]
    distribution = flow(context)
    assert distribution.has_rsample == all(slope.any() for slope in slopes)
    assert distribution.has_rsample == distribution.expand((3, 2)).has_rsample


def test_a_flow_from_a_base_without_differentiable_draws_has_none():
    flow = Flow([perturbed(Affine(2))], NamedMixture(2, 3))
    distribution = flow()
    assert not distribution.has_rsample
    assert not distribution.base.has_rsample
    assert distribution.sample((4,)).shape == (4, 2)
    with pytest.raises(NotImplementedError, match="cannot be drawn from differentiably"):
        distribution.rsample()


def test_rows_that_do_not_fit_the_batch_shape_are_refused_before_the_solve():
    distribution = CNF(2)().expand((3,))
    with (
        count_evaluations(distribution.flow) as nfe,
        pytest.raises(ValueError, match="must broadcast"),
    ):
        distribution.log_prob(torch.randn(4, 2))
    assert nfe.value == 0


@every_flow
def test_draws_are_events_in_the_support(make):
    flow = make().using(solver=COARSE)
    distribution = flow(rows_for(flow, 2)[1]).expand((3, 2))
    x = distribution.sample((4,))
    assert x.shape == (4, 3, 2, *flow.event_shape)
    assert distribution.event_shape == flow.event_shape
    assert distribution.support.event_dim == len(flow.event_shape)
    assert distribution.support.check(x).shape == (4, 3, 2)
    assert distribution.support.check(x).all()
    assert distribution.log_prob(x).shape == (4, 3, 2)


@pytest.mark.parametrize("make", EXACT_FLOWS.values(), ids=EXACT_FLOWS)
def test_torch_builds_the_same_density_from_base_and_transform(make):
    flow = make().using(solver=COARSE)
    x, context = rows_for(flow, 2)
    distribution = flow(context)
    composed = torch.distributions.TransformedDistribution(
        distribution.base, [distribution.transform.inv], validate_args=False
    )
    assert composed.event_shape == flow.event_shape
    torch.testing.assert_close(composed.log_prob(x), flow.log_prob(x, context), rtol=0, atol=1e-6)
    assert composed.rsample((3,)).shape == (3, *distribution.batch_shape, *flow.event_shape)


@every_flow
def test_the_transform_says_whether_it_is_bijective_and_gives_shapes_and_domain(make):
    flow = make().using(solver=COARSE)
    x, context = rows_for(flow, 2)
    transform = flow(context).transform
    drawn = flow.chain.stochastic_to_data
    assert transform.bijective == (flow.likelihood != "lower_bound" and not drawn)
    z = transform(x)
    assert z.shape == transform.forward_shape(x.shape)
    assert x.shape == transform.inverse_shape(z.shape)
    assert transform.domain.check(x).all()
    assert transform.codomain.check(z).all()
    if not drawn:
        torch.testing.assert_close(transform.inv(z), flow.to_data(z, context), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", BOUNDS.values(), ids=BOUNDS)
def test_a_map_that_is_no_bijection_has_no_jacobian_determinant(make):
    flow = make()
    x, context = rows_for(flow, 2)
    transform = flow(context).transform
    with pytest.raises(NotImplementedError, match=r"use flow\.to_base_and_ladj"):
        transform.log_abs_det_jacobian(x, transform(x))


SIGNIFICANCE = 4.5
"""Standard errors: more than this is seen once in 150 000 draws from the truth."""


def linear_flow():
    """A CNF of a linear field: x is normal, with the matrix exponential of the weight."""
    field = perturbed(LinearField(2), 0.5)
    solver = ODESolver(method="rk4", steps=8)
    matrix = torch.linalg.matrix_exp(field.weight.detach())
    shift = torch.linalg.solve(field.weight.detach(), (matrix - torch.eye(2)) @ field.bias.detach())
    return Flow([ContinuousTransform(field, solver=solver)]), shift, matrix @ matrix.T


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_estimates_of_moments_and_entropy_are_those_of_the_closed_form(batch):
    flow, mean, covariance = linear_flow()
    distribution, draws = flow().expand(batch), 4000
    entropy = MultivariateNormal(mean, covariance).entropy()
    for (found, error), expected in (
        (distribution.estimate_mean(draws, generator=seeded()), mean),
        (distribution.estimate_variance(draws, generator=seeded()), covariance.diag()),
        (distribution.estimate_entropy(draws, generator=seeded()), entropy),
    ):
        assert found.shape == error.shape == (*batch, *expected.shape)
        assert ((found - expected).abs() < SIGNIFICANCE * error).all()
        assert (error < 5 * expected.abs().clamp(min=1) / draws**0.5).all()
        assert not found.requires_grad


def test_standard_errors_are_the_spread_of_repeated_estimates():
    distribution = linear_flow()[0]().expand((100,))  # whose draws are independent
    for estimate in ("estimate_mean", "estimate_variance", "estimate_entropy"):
        values, errors = getattr(distribution, estimate)(200, generator=seeded())
        # The relative error of a spread of 100 values is 1 / sqrt(200) = 0.07.
        torch.testing.assert_close(values.std(0), errors.mean(0), rtol=0.3, atol=0)


def test_the_entropy_of_a_lower_bound_is_refused():
    with pytest.raises(NotImplementedError, match="-log_prob averaged over draws is not"):
        cnf(2, augment=1)().estimate_entropy(10)


GAUSSIAN = MultivariateNormal(torch.zeros(2), torch.eye(2))
LACKING = {
    "mean": (lambda d: d.mean, r"estimate_mean\(draws\)"),
    "variance": (lambda d: d.variance, r"estimate_variance\(draws\)"),
    "stddev": (lambda d: d.stddev, r"estimate_variance\(draws\)"),
    "mode": (lambda d: d.mode, "an optimizer of torch on -log_prob"),
    "entropy": (lambda d: d.entropy(), r"estimate_entropy\(draws\)"),
    "perplexity": (lambda d: d.perplexity(), r"estimate_entropy\(draws\), and exp"),
    "kl_divergence of it": (lambda d: kl_divergence(d, GAUSSIAN), r"x, log_p = p.rsample_and_log"),
    "kl_divergence of two": (lambda d: kl_divergence(d, cnf()()), r"x, log_p = p.rsample_and_log"),
    "kl_divergence to it": (lambda d: kl_divergence(GAUSSIAN, d), r"x = p.sample\(\(1000,\)\);"),
    "kl_divergence of batches": (
        lambda d: kl_divergence(Independent(d.expand((3,)), 1), Independent(d.expand((3,)), 1)),
        r"x, log_p = p.rsample_and_log_prob",
    ),
    "cdf": (lambda d: d.cdf(torch.zeros(2)), "the fraction of draws"),
    "icdf": (lambda d: d.icdf(torch.zeros(2)), "quantiles of draws"),
    "enumerate_support": (lambda d: d.enumerate_support(), "sample"),
}


@pytest.mark.parametrize(("ask", "remedy"), LACKING.values(), ids=LACKING)
def test_what_a_flow_lacks_says_what_to_call_instead(ask, remedy):
    with pytest.raises(NotImplementedError, match=f"has no .*closed form; .*{remedy}"):
        ask(cnf()())


@pytest.mark.parametrize("reverse", [False, True])
def test_the_estimate_of_a_divergence_advised_is_near_it(reverse):
    """Of two Gaussians, whose divergence is known: within 4 standard errors."""
    flow = perturbed(Flow([Affine(2)]))
    p, q = flow(), MultivariateNormal(torch.zeros(2), torch.eye(2))
    jacobian = torch.autograd.functional.jacobian(flow.to_data, torch.zeros(2)).detach()
    law = MultivariateNormal(flow.to_data(torch.zeros(2)).detach(), jacobian @ jacobian.mT)
    exact = kl_divergence(q, law) if reverse else kl_divergence(law, q)
    torch.manual_seed(0)
    if reverse:
        x = q.sample((1000,))
        values = q.log_prob(x) - p.log_prob(x)
    else:
        x, log_p = p.rsample_and_log_prob((1000,))
        values = log_p - q.log_prob(x)
    assert (values.mean(0) - exact).abs() < 4 * values.std(0) / 1000**0.5
