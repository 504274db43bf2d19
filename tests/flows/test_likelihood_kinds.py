"""Laws of what a likelihood is: as the weakest part says, and never taken for more."""

import pytest
import torch
from zoo import cnf, conformal_embedding, lipschitz_mlp, perturbed, residual_flow, seeded

from cnf import Exact, Flow, Hutchinson, MaximumLikelihood, ReverseKL, certify
from cnf.flows import MixtureOfFlows
from cnf.regularizers import kinetic_energy
from cnf.transforms import (
    Affine,
    Augment,
    Chain,
    FactorOut,
    Inverse,
    RussianRoulette,
    Slice,
    TruncatedSeries,
)


def biased(features=2):
    return residual_flow(lipschitz_mlp(features), log_det=TruncatedSeries(terms=2))


def estimated(features=2):
    return residual_flow(lipschitz_mlp(features), log_det=RussianRoulette())


CHAINS = {
    "exact": lambda: [Affine(2), residual_flow(lipschitz_mlp())],
    "estimate": lambda: [Affine(2), estimated(), residual_flow(lipschitz_mlp())],
    "lower_bound": lambda: [estimated(), Augment(2, 1), residual_flow(lipschitz_mlp(3))],
    "biased_estimate": lambda: [Augment(2, 1), estimated(3), biased(3), Affine(3)],
}


@pytest.mark.parametrize("kind", CHAINS)
def test_a_flow_is_as_weak_as_its_weakest_part(kind):
    parts = CHAINS[kind]()
    assert Flow(parts).likelihood == kind
    nested = FactorOut(parts, 3)
    assert nested.likelihood == kind
    assert Chain([nested]).likelihoods == Chain(parts).likelihoods | {kind}


def test_a_bound_is_no_bound_by_weights_that_are_estimates():
    x = torch.randn(3, 2)
    for part in (estimated(), biased()):
        with pytest.raises(ValueError, match=r"a part .* is an estimate.*log_det=ExactLogDet"):
            Flow([part, Augment(2, 1)]).log_prob(x, importance_samples=2)
    with pytest.raises(ValueError, match="got 2 for one that is 'biased_estimate'"):
        Flow([biased()]).log_prob(x, importance_samples=2)


def test_a_standard_error_is_refused_where_it_would_not_be_the_whole_error():
    x = torch.randn(3, 2)
    hutchinson = cnf(divergence=Hutchinson(probes=4)).chain
    Flow([*hutchinson, residual_flow(lipschitz_mlp())]).log_prob_and_error(x)
    for parts in ([estimated()], [*hutchinson, estimated()], [FactorOut([estimated()], 3)]):
        flow = Flow(parts)
        with pytest.raises(ValueError, match=r"by Hutchinson only; got \['(Resid|Factor)"):
            flow.log_prob_and_error(torch.randn(3, flow.features))
    with pytest.raises(ValueError, match="it is 'biased_estimate'"):
        Flow([biased()]).log_prob_and_error(x)


@pytest.mark.slow
def test_a_standard_error_is_refused_where_estimates_are_hidden():
    """Inside of a transform that follows a path of its own, whose probes are not seen."""
    hutchinson = cnf(2, divergence=Hutchinson(probes=4))
    given = cnf(2, 1, divergence=Hutchinson(probes=4))
    for part in (Slice(3, 1, dropped=given), Inverse(hutchinson.chain)):
        flow = Flow([part])
        x = torch.randn(3, flow.features)
        assert flow.likelihood == "estimate"
        assert (flow.log_prob(x) != flow.log_prob(x)).any()
        for parts in ([part], [FactorOut([part], 5)], [Chain([Affine(flow.features), part])]):
            outer = Flow(parts)
            with pytest.raises(ValueError, match=r"does not see the estimates inside of .*Exact"):
                outer.log_prob_and_error(torch.randn(3, outer.features))
        exact = flow.using(divergence=Exact())
        assert (exact.log_prob_and_error(x)[1] == 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Flow([Slice(3, 1, dropped=cnf(2, 1))]),
        lambda: Flow([Inverse(cnf().chain)]),
        lambda: Flow([], MixtureOfFlows([cnf()])),
    ],
    ids=["Slice", "Inverse", "MixtureOfFlows"],
)
def test_a_regularizer_is_refused_where_it_would_not_see_every_path(make, request):
    flow = make()
    assert MaximumLikelihood(flow)(torch.randn(3, flow.features)).isfinite()
    with pytest.raises(ValueError, match=f"inside of {request.node.callspec.id} follow paths"):
        MaximumLikelihood(flow, {kinetic_energy: 0.1})


def test_the_inverse_of_a_projection_on_a_surface_is_no_likelihood():
    """Also where both sides have the same size."""
    surface = conformal_embedding()
    projection = Chain([surface, Inverse(conformal_embedding())])
    assert projection.likelihood == "not_a_likelihood"
    assert Inverse(projection).likelihood == "not_a_likelihood"
    assert Inverse(Inverse(projection)).likelihood == "not_a_likelihood"
    assert Inverse(surface).likelihood == "not_a_likelihood"
    assert Inverse(Inverse(surface)).likelihood == "on_manifold"


def test_an_objective_of_log_densities_takes_no_biased_ones():
    with pytest.raises(ValueError, match=r"likelihood is 'biased_estimate'.*RussianRoulette"):
        ReverseKL(Flow([biased()]), lambda x: -x.square().sum(-1))
    loss = ReverseKL(Flow([estimated()]), lambda x: -x.square().sum(-1), draws=3)()
    assert loss.isfinite()


def test_a_draw_of_a_biased_bound_comes_with_a_weight_of_its_own():
    """Not that of the very numbers it was drawn from, which is larger on average."""
    flow = Flow([perturbed(Augment(2, 1, hidden_features=(4,))), biased(3), perturbed(Affine(3))])
    with torch.no_grad():
        z = torch.randn(4000, 3, generator=seeded())
        x, ladj = flow.chain.to_data_and_ladj(z, generator=seeded())
        own, fresh = flow.base.log_prob(z) - ladj, flow.log_prob(x, generator=seeded())
        _, given = flow.sample_and_log_prob(4000, generator=seeded())
    error = 2 * own.std() / 4000**0.5
    assert own.mean() - fresh.mean() > 4 * error
    assert abs(given.mean() - fresh.mean()) < 4 * error


@pytest.mark.slow
@pytest.mark.usefixtures("coarse_integral")
@pytest.mark.parametrize("part", [estimated, biased])
@pytest.mark.parametrize("continuous", [False, True])
def test_certify_measures_what_can_be_known(part, continuous):
    flow = Flow([part(), *(cnf().chain if continuous else [])])
    report = certify(flow, torch.randn(20, 2))
    assert report.passed, report
    assert report.likelihood == part().likelihood
    verdicts = {name: report[name].verdict for name in ("round_trip", "inverse_lipschitz")}
    assert verdicts == {"round_trip": "pass", "inverse_lipschitz": "pass"}
    for name in ("hutchinson", "standard_error", "sampled_log_prob", "integral"):
        assert report[name].verdict == "skip"
    assert f"{part().likelihood!r}" in report["integral"].meaning
