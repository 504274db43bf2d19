"""Laws of certification: what is right passes, what is wrong in one way fails in that way."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from nflows.transforms import ActNorm
from torch import nn
from torch.distributions import constraints
from training_runs import CHEAP
from zoo import (
    BOUNDS,
    EXACT_FLOWS,
    STOCHASTIC_FLOWS,
    SURJECTIVE_FLOWS,
    cnf,
    lipschitz_mlp,
    perturbed,
    residual_flow,
    rows_for,
)

from cnf import (
    CNF,
    Exact,
    Flow,
    Hutchinson,
    ModuleField,
    ODESolver,
    Standardize,
    certify,
    count_evaluations,
)
from cnf.adapters.transforms import FromNflows
from cnf.bases import HalfNormal, Likelihood
from cnf.flows import MixtureOfFlows
from cnf.transforms import (
    Abs,
    Affine,
    AffineCoupling,
    Augment,
    ContinuousTransform,
    FactorOut,
    Inverse,
    MarkovKernel,
    ResidualFlow,
    Round,
    RussianRoulette,
    Slice,
    Transform,
    TruncatedSeries,
    Whiten,
)
from cnf.transforms.residual.contractions import ContractiveNetwork
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

NAMES = [
    "hutchinson",
    "finite_differences",
    "standard_error",
    "gradient_modes",
    "tolerance",
    "path_weights",
    "round_trip",
    "ladj",
    "sampled_log_prob",
    "integral",
    "inverse_lipschitz",
    "nfe",
]

ACCURATE = ODESolver(rtol=1e-5, atol=1e-5)


def linear_flow(features=2, context_features=0, **settings):
    """Of three features, where the integral over the plane would take the most time."""
    field = perturbed(LinearField(features, context_features))
    return Flow([ContinuousTransform(field, **settings)])


def verdicts(report):
    return {check.name: check.verdict for check in report.checks}


def failures(report):
    return {check.name for check in report.checks if check.verdict == "fail"}


@pytest.mark.usefixtures("coarse_integral")
@pytest.mark.slow
@pytest.mark.parametrize("make", EXACT_FLOWS.values(), ids=EXACT_FLOWS)
def test_exact_flows_pass(make):
    flow = make()
    report = certify(flow.using(solver=ODESolver(method="rk4", steps=6)), *rows_for(flow, 20))
    assert report.passed, report
    assert [check.name for check in report.checks] == NAMES
    assert report.likelihood == "exact"
    assert report["standard_error"].verdict == "skip"


@pytest.mark.parametrize("make", BOUNDS.values(), ids=BOUNDS)
def test_bounds_are_measured_where_they_can_be(make):
    flow = make()
    report = certify(flow.using(solver=ACCURATE), *rows_for(flow, 20))
    found = verdicts(report)
    assert report.likelihood == "lower_bound"
    assert found["tolerance"] == found["round_trip"] == found["nfe"] == "pass"
    assert found["sampled_log_prob"] == found["integral"] == found["hutchinson"] == "skip"


def test_the_stretch_of_a_linear_flow_is_the_norm_of_its_exponential():
    flow = linear_flow(solver=ODESolver(rtol=1e-9, atol=1e-9))
    x = torch.randn(5, 2)
    found = certify(flow, x)["inverse_lipschitz"]
    matrix = torch.linalg.matrix_exp(flow.chain[0].vector_field.weight.detach())
    matrix = matrix / x.std(0).unsqueeze(-1)
    assert found.value == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-6)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_the_standard_error_is_that_of_the_flow_itself(noise):
    flow = linear_flow(divergence=Hutchinson(noise=noise, probes=3))
    x = torch.randn(3000, 2)
    with torch.no_grad():
        spread = (flow.log_prob(x) - flow.using(divergence=Exact()).log_prob(x)).std()
    found = certify(flow, x)["standard_error"]
    # The mean of a standard deviation of 8 draws lies a few per cent below the standard deviation.
    assert found.value == pytest.approx(float(spread), rel=0.12)


def test_the_standard_error_of_a_mixed_flow_is_that_of_its_estimates():
    first, second = (linear_flow().chain[0] for _ in range(2))
    x = torch.randn(200, 2)
    estimated = first.using(divergence=Hutchinson(probes=4))
    alone, mixed = (
        certify(Flow(chain), x)["standard_error"].value
        for chain in ([estimated], [estimated, second.using(divergence=Exact())])
    )
    assert mixed == pytest.approx(alone)


def test_evaluations_are_judged_where_the_field_decides_them():
    solver = ODESolver(method="euler", steps=300)
    found = certify(linear_flow(3, solver=solver), torch.randn(10, 3))["nfe"]
    assert found.verdict == "skip"
    assert "grid of the solver is fixed" in found.meaning


@pytest.mark.usefixtures("coarse_integral")
def test_units_of_the_data_do_not_matter():
    """A bad inverse is found although one feature is far away; a good one is not blamed."""
    x = torch.randn(50, 2) * torch.tensor([1e5, 1e-2]) + torch.tensor([1e7, 0.0])
    scale = Standardize.from_data(x)
    good = certify(cnf(transforms=[scale]).using(solver=ACCURATE), x)
    assert good.passed, good
    bad = certify(cnf(transforms=[scale], solver=ODESolver(method="euler", steps=2)), x)
    assert bad["round_trip"].verdict == "fail"


class OneTenthMore(LinearField):
    """Its divergence is too large."""

    def _velocity_and_divergence(self, t, x, context):
        velocity, divergence = super()._velocity_and_divergence(t, x, context)
        return velocity, 1.1 * divergence


def test_a_wrong_divergence_is_found():
    field = OneTenthMore(2)
    with torch.no_grad():
        field.weight.copy_(torch.tensor([[0.5, 0.1], [0.0, 0.7]]))
    report = certify(Flow([ContinuousTransform(field, solver=ACCURATE)]), torch.randn(200, 2))
    assert failures(report) == {"hutchinson", "integral"}


class AsksWhoAsks(LinearField):
    """Its divergence is zero where x needs a gradient."""

    def _velocity_and_divergence(self, t, x, context):
        velocity, divergence = super()._velocity_and_divergence(t, x, context)
        return velocity, divergence * (not x.requires_grad)


class Forgetful(LinearField):
    """Forgets some of x in training."""

    def _velocity(self, t, x, context):
        return super()._velocity(t, torch.nn.functional.dropout(x, 0.5, self.training), context)


@pytest.mark.parametrize("wrong", [AsksWhoAsks, Forgetful])
@pytest.mark.parametrize("training", [True, False])
def test_a_number_that_depends_on_who_asks_for_gradients_is_found(wrong, training):
    solver = ODESolver(method="rk4", steps=4, gradient="backprop")
    flow = Flow([ContinuousTransform(perturbed(wrong(2)), solver=solver)])
    flow.chain[0].train(training)
    modes = [part.training for part in flow.modules()]
    assert certify(flow, torch.randn(20, 2))["gradient_modes"].verdict == "fail"
    assert [part.training for part in flow.modules()] == modes


class Detached(nn.Module):
    """Part of it is hidden from autograd."""

    def forward(self, t, x):
        return torch.tanh(2 * x.detach()) + 0.1 * x


class ThroughNumpy(nn.Module):
    """All of it is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, t, x):
        return self.weight * torch.as_tensor(np.tanh(x.detach().numpy()))


@pytest.mark.parametrize("network", [Detached, ThroughNumpy])
def test_a_field_whose_velocity_autograd_does_not_see_is_found(network):
    flow = Flow([ContinuousTransform(ModuleField(network(), 3), solver=CHEAP)])
    report = certify(flow, torch.randn(20, 3))
    assert report["hutchinson"].verdict == "pass"
    assert report["finite_differences"].verdict == "fail"
    assert "operations of torch alone" in report["finite_differences"].remedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_field_at_rest_and_one_of_single_precision_agree_with_their_differences(dtype):
    for flow in (CNF(3), cnf(3), linear_flow(3)):
        found = certify(flow.to(dtype).using(solver=CHEAP), torch.randn(20, 3).to(dtype))
        assert found["finite_differences"].verdict == "pass"


def test_a_wrong_ladj_is_found():
    class Silent(Transform):
        def _to_base(self, x, context, generator):
            return 2 * x, x.new_zeros(x.shape[:-1])

        def _to_data(self, z, context, generator):
            return z / 2, z.new_zeros(z.shape[:-1])

    report = certify(Flow([Silent(2)]), torch.randn(20, 2))
    assert report["integral"].value == pytest.approx(0.75, abs=0.01)
    assert report["integral"].verdict == "fail"


@pytest.mark.usefixtures("coarse_integral")
@pytest.mark.parametrize("make", SURJECTIVE_FLOWS.values(), ids=SURJECTIVE_FLOWS)
def test_an_exact_surjection_passes_without_a_round_trip_of_the_data(make):
    torch.manual_seed(1)
    flow = make()
    report = certify(flow.using(solver=ACCURATE), *rows_for(flow, 20))
    found = verdicts(report)
    assert report.likelihood == "exact"
    assert report.passed, report
    assert found["round_trip"] == found["sampled_log_prob"] == "pass"
    assert "of part" in report["round_trip"].meaning
    assert found["inverse_lipschitz"] == "skip"


@pytest.mark.parametrize("make", STOCHASTIC_FLOWS.values(), ids=STOCHASTIC_FLOWS)
def test_a_flow_that_draws_both_ways_is_measured_where_it_can_be(make):
    flow = make()
    report = certify(flow.using(solver=ACCURATE), *rows_for(flow, 20))
    found = verdicts(report)
    assert report.likelihood == "lower_bound"
    assert report.passed, report
    assert found["sampled_log_prob"] == found["integral"] == found["inverse_lipschitz"] == "skip"


class WrongAbs(Transform):
    """Absolute values, wrong in one of three ways."""

    codomain = constraints.independent(constraints.nonnegative, 1)
    stochastic_to_data = True

    def __init__(self, features, wrong):
        super().__init__(features)
        self.wrong = wrong

    def _to_base(self, x, context, generator):
        ladj = 0 if self.wrong == "contribution" else -self.features * math.log(2)
        return x.abs(), x.new_full(x.shape[:-1], ladj)

    def _to_data(self, z, context, generator):
        signs = torch.randint(0, 2, z.shape, generator=generator) * 2 - 1
        ladj = 0 if self.wrong == "contribution" else self.features * math.log(2)
        ladj = -ladj if self.wrong == "sign" else ladj
        x = z * signs * (1.1 if self.wrong == "inverse" else 1)
        return x, z.new_full(z.shape[:-1], ladj)


@pytest.mark.usefixtures("coarse_integral")
@pytest.mark.parametrize("features", [1, 2, 3])
@pytest.mark.parametrize(
    ("wrong", "fails"),
    [
        (None, set()),
        ("contribution", {"path_weights"}),
        ("sign", {"path_weights", "sampled_log_prob"}),
        ("inverse", {"path_weights", "round_trip", "sampled_log_prob"}),
    ],
)
def test_what_is_wrong_with_a_surjection_is_found(features, wrong, fails):
    flow = Flow([WrongAbs(features, wrong)], HalfNormal(features))
    report = certify(flow, torch.randn(100, features))
    if features == 2 and wrong == "contribution":
        fails = {*fails, "integral"}
    assert failures(report) == fails
    assert report["round_trip"].meaning.startswith("largest error of z -> x -> z of part 0, WrongA")


@pytest.mark.parametrize("wrong", [False, True])
def test_a_wrong_bijection_beside_a_surjection_is_found(wrong):
    class Halving(Transform):
        def _to_base(self, x, context, generator):
            return x / 2, x.new_full(x.shape[:-1], -3 * math.log(2))

        def _to_data(self, z, context, generator):
            return z * (2.1 if wrong else 2), z.new_full(z.shape[:-1], 3 * math.log(2))

    report = certify(Flow([Halving(3), Slice(3, 1)]), torch.randn(20, 3))
    assert report["round_trip"].verdict == ("fail" if wrong else "pass")


@pytest.mark.parametrize("wrong", [False, True])
def test_a_wrong_direction_of_a_bound_is_found(wrong):
    class Signs(Inverse):
        def _to_data_value(self, z, context, generator):
            return super()._to_data_value(z, context, generator) + (0.1 if wrong else 0)

    report = certify(Flow([Signs(Abs(2))]), torch.randn(20, 2).abs())
    assert report.likelihood == "lower_bound"
    assert report["round_trip"].verdict == ("fail" if wrong else "pass")


@pytest.mark.usefixtures("coarse_integral")
def test_too_few_steps_are_found():
    flow = cnf(solver=ODESolver(method="euler", steps=2))
    found = verdicts(certify(flow, torch.randn(50, 2)))
    assert found["tolerance"] == found["round_trip"] == found["sampled_log_prob"] == "fail"


class Pulse(ModuleField):
    """Grows by 10.6 nats in two features, within a smooth pulse of width 0.02 at t = 0.537."""

    def __init__(self):
        super().__init__(nn.Identity(), 2)
        self.strength = nn.Parameter(torch.tensor(5.3))

    def _velocity(self, t, x, context):
        place = ((t - 0.537) / 0.01).clamp(-1, 1)
        bump = torch.exp(-1 / (1 - place.square()).clamp(min=1e-9)) / 0.443994
        return (1 + 100 * self.strength * bump) * x


@pytest.mark.usefixtures("coarse_integral")
@pytest.mark.parametrize(
    "solver",
    [
        ODESolver(rtol=1e-5, atol=1e-5),
        ODESolver(method="dopri8", rtol=1e-6, atol=1e-6),
        ODESolver(method="rk4", steps=9),
        ODESolver(method="rk4", times=[i / 6 for i in range(7)], accuracy=1e-3),
    ],
    ids=["dopri5", "dopri8", "rk4", "calibrated"],
)
def test_a_pulse_between_the_steps_is_found(solver):
    flow = Flow([ContinuousTransform(Pulse(), solver=solver)])
    x = torch.randn(10, 2)
    assert flow.log_prob(x).max() > -10  # the pulse is stepped over
    found = certify(flow, x)["tolerance"]
    assert found.verdict == "fail"
    assert found.value > 10


def test_a_calibrated_flow_is_held_to_its_own_accuracy():
    flow = perturbed(cnf())
    x = torch.randn(50, 2)
    for accuracy, limit in ((1e-3, 0.05), (0.1, 0.5)):
        flow.calibrate(x, accuracy=accuracy)
        found = certify(flow, x)["tolerance"]
        assert (found.verdict, found.limit) == ("pass", pytest.approx(limit))


def test_an_exploding_inverse_is_found():
    flow = Flow([Affine(2)])
    with torch.no_grad():
        flow.chain[0].log_scale.copy_(torch.tensor([20.0, -20.0]))
    x = torch.randn(10, 2, dtype=torch.float32)
    report = certify(flow.float(), x)
    stretch = math.exp(20.0) / float(x[:, 0].std())
    assert report["inverse_lipschitz"].value == pytest.approx(stretch, rel=1e-3)
    assert report["inverse_lipschitz"].verdict == "fail"
    with torch.no_grad():
        flow.chain[0].log_scale.zero_()
    assert certify(flow, torch.randn(10, 2, dtype=torch.float32)).passed


def test_a_narrow_density_is_no_exploding_inverse():
    """Its rounding errors grow on the way to the base, and shrink again on the way back."""
    x = torch.randn(200, 1, dtype=torch.float32).expand(-1, 2)
    x = x + 2e-4 * torch.randn_like(x)
    flow = Flow([Whiten.from_data(x)])
    report = certify(flow, x)
    assert report["inverse_lipschitz"].verdict == report["round_trip"].verdict == "pass"


class Steep(torch.nn.Module):
    """A conditioner whose logarithm of the scale is so many times what it sees."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x, context=None):
        return torch.cat([torch.zeros_like(x), self.slope * x], -1)


class NoContraction(ContractiveNetwork):
    """Says that its slopes are below a half, and has one of -1.5."""

    def given(self, context):
        return lambda x: torch.where(x.abs() > 1, -1.5 * x, 0.3 * x)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("slope", [40.0, 1000.0])
def test_a_coupling_that_explodes_fails_and_does_not_raise(slope, sign):
    flow = Flow([AffineCoupling(2, conditioner=Steep(slope), bound=2000.0)])
    report = certify(flow, sign * torch.tensor([[-1.5, 1.0], [0.3, 0.2], [1.2, 0.1]]))
    assert report["inverse_lipschitz"].verdict == "fail"
    assert not any(math.isnan(check.value) for check in report.checks if check.verdict != "skip")
    if slope == 1000:
        assert report["inverse_lipschitz"].value == report["round_trip"].value == math.inf
        assert report["round_trip"].verdict == "fail"
        assert "finite" in report["round_trip"].remedy


def test_a_residual_step_that_is_no_contraction_fails_with_its_message():
    flow = Flow([ResidualFlow(NoContraction(2, coefficient=0.5))])
    found = certify(flow, 3 * torch.randn(10, 2))["round_trip"]
    assert found.value == math.inf
    assert found.verdict == "fail"
    assert "did not converge" in found.remedy


def test_a_flow_that_still_needs_initialization_is_refused():
    with pytest.raises(RuntimeError, match="initialize"):
        certify(Flow([FromNflows(ActNorm(2), 2)]), torch.randn(10, 2))


@pytest.mark.usefixtures("coarse_integral")
def test_a_failed_solve_fails_the_check_with_its_message():
    flow = cnf(solver=ODESolver(max_evaluations=9))
    report = certify(flow, torch.randn(10, 2))
    assert report["round_trip"].verdict == "fail"
    assert "max_evaluations=9" in report["round_trip"].remedy
    assert not report.passed


def test_many_evaluations_are_found():
    flow = linear_flow(3, solver=ODESolver(rtol=1e-13, atol=1e-13))
    x = torch.randn(10, 3)
    found = certify(flow, x)["nfe"]
    with count_evaluations(flow) as nfe:
        flow.log_prob(x)
    assert found.value == nfe.value > 200
    assert found.verdict == "fail"
    assert "kinetic_energy" in found.remedy


@pytest.mark.usefixtures("coarse_integral")
def test_a_report_shows_each_check_and_the_remedy_of_those_that_failed():
    flow = cnf(solver=ODESolver(method="euler", steps=2))
    text = str(certify(flow, torch.randn(20, 2)))
    assert "likelihood: exact, on 20 rows" in text
    assert all(name in text for name in NAMES)
    assert "raise steps" in text
    assert "raise steps" not in str(certify(cnf(solver=ACCURATE), torch.randn(20, 2)))


@pytest.mark.usefixtures("coarse_integral")
def test_a_report_is_reproducible_and_changes_nothing():
    flow = cnf(transforms=[Standardize.from_data(torch.randn(20, 2))])
    flow = flow.using(divergence=Hutchinson(probes=2), solver=CHEAP)
    x = torch.randn(20, 2)
    state = torch.get_rng_state()
    first, second = certify(flow, x), certify(flow, x)
    assert str(first) == str(second)
    other = certify(flow, x, generator=torch.Generator().manual_seed(5))
    assert other["hutchinson"].value != first["hutchinson"].value
    assert (torch.get_rng_state() == state).all()
    assert all(parameter.grad is None for parameter in flow.parameters())


@pytest.mark.usefixtures("coarse_integral")
def test_an_estimate_is_certified_by_the_exact_flow_where_needed():
    x = torch.randn(30, 2)
    flow = cnf(solver=CHEAP)
    exact, estimate = (
        certify(flow.using(divergence=divergence), x)
        for divergence in (Exact(), Hutchinson(probes=500))
    )
    assert estimate["integral"].value == exact["integral"].value
    assert estimate["standard_error"].verdict == "pass"


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="flow must be a Flow; got Affine"):
        certify(Affine(2), torch.randn(3, 2))
    with pytest.raises(TypeError, match="x must be a Tensor; got list"):
        certify(cnf(), [[0.0, 0.0]])
    with pytest.raises(ValueError, match=r"at least 2 rows, and shape \(rows, 2\); got \(1, 2\)"):
        certify(cnf(), torch.randn(1, 2))
    with pytest.raises(ValueError, match=r"got \(2,\)"):
        certify(cnf(), torch.randn(2))
    with pytest.raises(ValueError, match="x must be finite"):
        certify(cnf(), torch.tensor([[0.0, math.nan], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="context must have shape"):
        certify(cnf(2, 3), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"context must have shape \(4, 3\).*got \(3, 3\)"):
        certify(cnf(2, 3), torch.randn(4, 2), torch.randn(3, 3))
    with pytest.raises(ValueError, match="dtype"):
        certify(cnf(), torch.randn(4, 2).half())


class Doubling(Transform):
    """Doubles, with one thing wrong."""

    def __init__(self, features, wrong):
        super().__init__(features)
        self.wrong = wrong

    def _to_base(self, x, context, generator):
        z = torch.as_tensor(2 * x.detach().numpy()) if self.wrong == "autograd" else 2 * x
        ladj = x.new_full(x.shape[:-1], self.features * math.log(2))
        return z, 1.5 * ladj if self.wrong in ("to_base", "both") else ladj

    def _to_data(self, z, context, generator):
        ladj = z.new_full(z.shape[:-1], -self.features * math.log(2))
        return z / 2, 1.5 * ladj if self.wrong in ("to_data", "both") else ladj


@pytest.mark.parametrize("features", [2, 3])
@pytest.mark.parametrize(
    ("wrong", "where"),
    [("both", "to_base"), ("to_base", "to_base"), ("to_data", "to_data"), ("autograd", "to_base")],
)
def test_a_wrong_ladj_is_told_of_with_its_part_and_direction(features, wrong, where):
    flow = Flow([perturbed(Affine(features)), Doubling(features, wrong)])
    check = certify(flow, torch.randn(10, features))["ladj"]
    assert check.verdict == "fail"
    assert f"in {where}_and_ladj of part 1, Doubling" in check.meaning
    assert "must be log |det| of the Jacobian of the value" in check.remedy
    if wrong != "autograd":
        assert check.value == pytest.approx(0.5 * features * math.log(2))
    check = certify(Flow([Doubling(features, None)]), torch.randn(10, features))["ladj"]
    assert (check.verdict, check.value) == ("pass", pytest.approx(0, abs=1e-9))


class Steps(MarkovKernel):
    """Steps that leave a normal density with a given variance invariant, or claim to."""

    def __init__(self, variance: float, claimed: float) -> None:
        super().__init__(2, lambda x: -x.square().sum(-1) / (2 * claimed), steps=1)
        self.variance = variance

    def _propose(self, point, generator):
        noise = torch.randn(point.shape, generator=generator, dtype=point.dtype)
        proposal = point + noise
        change = point.square().sum(-1) - proposal.square().sum(-1)
        return proposal, change / (2 * self.variance)


def test_wrong_weights_of_paths_are_found():
    x = torch.randn(50, 2)
    right = certify(Flow([perturbed(Affine(2)), Steps(2.0, 2.0), perturbed(Affine(2))]), x)
    assert right["path_weights"].verdict == "pass"
    wrong = certify(Flow([perturbed(Affine(2)), Steps(2.0, 1.0), perturbed(Affine(2))]), x)
    assert wrong["path_weights"].verdict == "fail"
    assert not wrong.passed
    assert "log-ratio" in wrong["path_weights"].remedy
    assert verdicts(certify(Flow([perturbed(Augment(2, 1))]), x))["path_weights"] == "pass"
    assert verdicts(certify(Flow([Affine(2)]), x))["path_weights"] == "skip"


@pytest.mark.parametrize(
    ("name", "seed"),
    [("autoencoder", 19), ("autoencoder", 24), ("random steps", 13), ("sliced with context", 2)],
)
def test_right_weights_with_heavy_tails_are_not_blamed(name, seed):
    """Their mean is 1 by draws that hardly ever come: here 0.3, 0.01, 0.64 and 0.8."""
    torch.manual_seed(seed)
    flow = {**STOCHASTIC_FLOWS, **SURJECTIVE_FLOWS}[name]()
    found = certify(flow.using(solver=CHEAP), *rows_for(flow, 20))["path_weights"]
    assert found.verdict != "fail"


def test_weights_of_paths_are_those_of_the_exact_divergence():
    """The exponential of an unbiased estimate is biased."""
    flow = Flow([Augment(2, 1), *linear_flow(3, solver=CHEAP).chain])
    x = torch.randn(20, 2)
    exact, estimated = (
        certify(flow.using(divergence=divergence), x)["path_weights"]
        for divergence in (Exact(), Hutchinson())
    )
    assert exact == estimated
    assert exact.verdict == "pass"
    integers = Flow([FactorOut([Inverse(Round(2))], 3)])
    assert certify(integers, x[:, [0, 0, 1]].round())["path_weights"].verdict == "skip"
    roulette = residual_flow(lipschitz_mlp(3), log_det=RussianRoulette())
    assert certify(Flow([Augment(2, 1), roulette]), x)["path_weights"].verdict == "skip"


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(probes=2)], ids=["exact", "estimated"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Flow([Slice(3, 2, dropped=linear_flow(1, 2))]),
        lambda: Flow([Inverse(linear_flow(3).chain)]),
        lambda: Flow([], MixtureOfFlows([linear_flow(3), linear_flow(3)])),
    ],
    ids=["slice", "inverse", "mixture"],
)
def test_an_ode_inside_of_another_part_is_measured_where_it_can_be(make, divergence):
    flow = make().using(divergence=divergence, solver=ACCURATE)
    report = certify(flow, torch.randn(20, 3))
    assert report.passed, report
    assert report["finite_differences"].verdict == report["tolerance"].verdict == "pass"
    assert report["hutchinson"].verdict == report["standard_error"].verdict == "skip"


class Padding(Transform):
    """Zeros behind x, so that most z have no x: no likelihood."""

    def __init__(self, wrong):
        super().__init__(2)
        self.wrong = wrong

    base_features = 3

    def _to_base(self, x, context, generator):
        return torch.nn.functional.pad(x, (0, 1)), x.new_zeros(x.shape[:-1])

    def _to_data(self, z, context, generator):
        return z[..., :2] + self.wrong, z.new_zeros(z.shape[:-1])


class WrongArea(Inverse):
    """The plane in space, with another area."""

    def _to_data(self, z, context, generator):
        x, ladj = super()._to_data(z, context, generator)
        return x, ladj + 1

    def _to_base(self, x, context, generator):
        z, ladj = super()._to_base(x, context, generator)
        return z, ladj - 1


def truncated(network):
    return Flow([ResidualFlow(network, log_det=TruncatedSeries())])


def estimated(field):
    with torch.no_grad():
        field.weight.copy_(torch.tensor([[0.5, 0.1, 0.0], [0.0, 0.7, 0.2], [0.1, 0.0, 0.4]]))
    solver = ODESolver(method="rk4", steps=8)
    part = ContinuousTransform(field, solver=solver, divergence=Hutchinson(probes=500))
    return Flow([part])


SPECIMENS = {
    "exact": (lambda: Flow([Doubling(3, None)]), lambda: Flow([Doubling(3, "both")]), {"ladj"}),
    "estimate": (
        lambda: estimated(LinearField(3)),
        lambda: estimated(OneTenthMore(3)),
        {"hutchinson"},
    ),
    "lower_bound": (
        lambda: Flow([Steps(2.0, 2.0)]),
        lambda: Flow([Steps(2.0, 1.0)]),
        {"path_weights"},
    ),
    "biased_estimate": (
        lambda: truncated(lipschitz_mlp(3)),
        lambda: truncated(NoContraction(3, coefficient=0.5)),
        {"round_trip"},
    ),
    "on_manifold": (
        lambda: Flow([Inverse(Padding(0.0))]),
        lambda: Flow([WrongArea(Padding(0.0))]),
        {"ladj"},
    ),
    "not_a_likelihood": (
        lambda: Flow([Padding(0.0)]),
        lambda: Flow([Padding(0.1)]),
        {"round_trip"},
    ),
}
"""A right and a wrong flow of each likelihood, and the checks that fail for the wrong one."""


def test_every_likelihood_has_its_specimens():
    assert set(SPECIMENS) == set(get_args(Likelihood))


@pytest.mark.parametrize(("kind", "specimens"), SPECIMENS.items(), ids=SPECIMENS)
def test_a_right_flow_of_each_likelihood_passes_and_a_wrong_one_fails(kind, specimens):
    right, wrong, fails = specimens
    for make, expected in ((right, set()), (wrong, fails)):
        flow = make()
        report = certify(flow, 3 * torch.randn(50, flow.features))
        assert report.likelihood == kind
        assert failures(report) == expected, report
