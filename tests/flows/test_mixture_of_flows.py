"""Mixtures of flows: exact sums of charts, draws by chart, and weights of zero."""

import copy
import math

import pytest
import torch
from torch.distributions import Normal
from zoo import cnf, perturbed, seeded

from cnf import CNF, Exact, Flow, Hutchinson, ODESolver, load, save
from cnf.baselines import build
from cnf.bases import StandardNormal
from cnf.flows import MixtureOfFlows
from cnf.objectives import MaximumLikelihood
from cnf.transforms import (
    Affine,
    Augment,
    ConditionalAffine,
    ConformalEmbedding,
    ContinuousTransform,
    Logit,
    MLPConditioner,
    Permute,
    Similarity,
)
from cnf.vector_fields import LinearField


def normal(mean: float, std: float) -> Flow:
    """A normal distribution on the line."""
    part = Affine(1)
    torch.nn.init.constant_(part.log_scale, math.log(std))
    torch.nn.init.constant_(part.loc, mean)
    return Flow([part])


def three() -> MixtureOfFlows:
    mixture = MixtureOfFlows([normal(-2.0, 0.5), normal(1.0, 1.0), normal(4.0, 0.3)])
    mixture.set_weights(torch.tensor([1, 2, 5]))
    return mixture


def test_the_density_is_the_weighted_sum():
    x = torch.linspace(-4, 6, 50).unsqueeze(-1)
    parts = [(1 / 8, Normal(-2.0, 0.5)), (2 / 8, Normal(1.0, 1.0)), (5 / 8, Normal(4.0, 0.3))]
    expected = sum(weight * part.log_prob(x).exp() for weight, part in parts)
    flow = Flow([], base=three())
    assert flow.likelihood == "exact"
    torch.testing.assert_close(flow.log_prob(x).exp(), expected.squeeze(-1))
    shares = flow.base.responsibilities(x)
    first = parts[0][0] * parts[0][1].log_prob(x).exp() / expected
    torch.testing.assert_close(shares[:, :1], first)
    torch.testing.assert_close(shares.sum(-1), torch.ones(50))


def test_other_names_of_the_charts_change_nothing():
    mixture, x = three(), torch.randn(20, 1)
    other = MixtureOfFlows(list(mixture.flows)[::-1])
    other.set_weights(torch.tensor([5, 2, 1]))
    torch.testing.assert_close(other.log_prob(x), mixture.log_prob(x))


def test_draws_come_from_the_charts_by_their_weights():
    with torch.no_grad():
        draws = three().rsample(torch.Size([100, 200]), generator=seeded())
    assert draws.shape == (100, 200, 1)
    share = (draws > 3).double().mean()  # the third chart, and 2.3 % of the second
    expected = 5 / 8 * (1 - Normal(4.0, 0.3).cdf(torch.tensor(3.0))) + 2 / 8 * (
        1 - Normal(1.0, 1.0).cdf(torch.tensor(3.0))
    )
    error = (expected * (1 - expected) / draws.numel()).sqrt()
    assert abs(share - expected) < 4 * error  # 4 standard errors: 6e-5


def test_a_chart_of_weight_zero_takes_no_part():
    mixture = three()
    mixture.set_weights(torch.tensor([0, 1, 1]))
    x = torch.tensor([[-2.0], [1.0], [400.0]])
    other = MixtureOfFlows(list(mixture.flows)[1:])
    torch.testing.assert_close(mixture.log_prob(x), other.log_prob(x))
    assert (mixture.responsibilities(x)[:, 0] == 0).all()
    mixture.log_prob(x).sum().backward()
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all()
        for parameter in mixture.parameters()
    )
    with torch.no_grad():
        assert mixture.rsample(torch.Size([500]), generator=seeded()).min() > -4


@pytest.mark.slow
def test_gradients_are_those_of_the_density():
    mixture = MixtureOfFlows([build("nsf", 2, size=4), cnf()])
    x = torch.randn(3, 2, requires_grad=True)
    assert torch.autograd.gradcheck(mixture.log_prob, (x,))
    gradient = torch.autograd.grad(mixture.log_prob(x).sum(), mixture.log_weights)[0]
    expected = (mixture.responsibilities(x) - mixture.log_weights.softmax(0)).sum(0)
    torch.testing.assert_close(gradient, expected)


def test_draws_have_gradients_of_charts_but_none_of_weights():
    mixture = three()
    with pytest.raises(NotImplementedError, match="no gradients of its weights"):
        mixture.rsample(torch.Size([2]))
    mixture.log_weights.requires_grad_(False)
    draws = mixture.rsample(torch.Size([4000]), generator=seeded())
    draws.mean().backward()
    share = (draws > 3).double().mean()
    loc = mixture.flows[2].transforms[0].loc
    assert float(loc.grad) == pytest.approx(float(share), abs=0.02)  # d mean / d loc: the weight


def test_a_gate_weighs_the_charts_by_context():
    gate = perturbed(MLPConditioner(1, 3, hidden_features=()))
    charts = list(three().flows)
    mixture = MixtureOfFlows(charts, gate, context_features=1)
    context, x = torch.randn(30, 1), torch.randn(30, 1)
    weights = gate(context).softmax(-1)
    expected = sum(weights[:, k] * chart.log_prob(x).exp() for k, chart in enumerate(charts))
    torch.testing.assert_close(mixture.log_prob(x, context).exp(), expected)
    with torch.no_grad():
        draws = Flow([], base=mixture).sample(20_000, context[:1], generator=seeded())
    share = (draws > 3).double().mean()
    expected = sum(
        weights[0, k] * (1 - Normal(mean, std).cdf(torch.tensor(3.0)))
        for k, (mean, std) in enumerate([(-2.0, 0.5), (1.0, 1.0), (4.0, 0.3)])
    )
    assert abs(share - expected) < 0.014  # 4 standard errors at most


def test_each_draw_is_given_its_own_context():
    """Each chart is a normal distribution around the context."""
    charts = [Flow([ConditionalAffine(1, 1)]) for _ in range(2)]
    context = torch.linspace(-100, 100, 40).unsqueeze(-1)
    with torch.no_grad():
        for chart in charts:
            chart.transforms[0].layer.weight.copy_(torch.tensor([[1.0], [0.0]]))
        draws = MixtureOfFlows(charts).rsample(torch.Size([200, 40]), context, generator=seeded())
    assert (draws - context).abs().max() < 5  # of 8000 normal numbers: 5e-3


def test_charts_take_the_context_and_are_initialised_with_it():
    mixture = MixtureOfFlows([CNF(2, 3, hidden_features=(8, 8)), Flow([ConditionalAffine(2, 3)])])
    flow = Flow([], base=mixture)
    x, context = 5 + torch.randn(50, 2), 3 + torch.randn(50, 3)
    flow.initialize(x, context)
    assert not mixture.needs_initialization
    torch.testing.assert_close(flow.base.flows[0].to_base(x, context).mean(0), torch.zeros(2))
    assert flow.sample((4,), context).shape == (4, 50, 2)


def test_the_units_of_the_context_do_not_matter_and_a_file_keeps_them(tmp_path):
    x, context = torch.randn(50, 2), torch.randn(50, 3)
    charts = [perturbed(Flow([ConditionalAffine(2, 3)])), Flow([Affine(2)])]
    gate = perturbed(MLPConditioner(3, 2, hidden_features=(4,)))
    flow = Flow([Affine(2)], MixtureOfFlows(charts, gate))
    flows = [flow, copy.deepcopy(flow)]
    for scale, each in zip((1.0, 1e4), flows, strict=True):
        each.initialize(x, scale * context)
    expected = flows[0].log_prob(x, context)
    torch.testing.assert_close(flows[1].log_prob(x, 1e4 * context), expected)
    save(flows[1], tmp_path / "flow.safetensors")
    loaded = load(tmp_path / "flow.safetensors")
    torch.testing.assert_close(loaded.log_prob(x, 1e4 * context), expected)


def test_training_moves_charts_and_weights():
    flow = Flow([], base=MixtureOfFlows([normal(-1.0, 1.0), normal(1.0, 1.0)]))
    x = torch.cat([torch.full((30, 1), -2.0), torch.full((90, 1), 2.0)]) + torch.randn(120, 1) / 3
    objective = MaximumLikelihood(flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        objective(x).backward()
        optimizer.step()
    weights = flow.base.log_weights.softmax(0)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75]), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MixtureOfFlows([]), "flows must hold at least one"),
        (lambda: MixtureOfFlows([CNF(2), CNF(3)]), "same size"),
        (lambda: MixtureOfFlows([CNF(2), Flow([Logit(2)])]), "same support"),
        (
            lambda: MixtureOfFlows([Flow([ConformalEmbedding([Similarity(3)], 2)])]),
            "flows must have densities in all of space.*likelihood is 'on_manifold'",
        ),
        (lambda: MixtureOfFlows([CNF(2)], torch.nn.Linear(3, 1)), "gate must be None"),
        (lambda: three().set_weights(torch.tensor([1, 2])), "weights must be 3 finite numbers"),
        (lambda: three().set_weights(torch.tensor([0, 0, 0])), "not all 0"),
        (lambda: three().set_weights(torch.tensor([1, -1, 1])), "at least 0"),
        (lambda: three().set_weights(torch.tensor([1, math.nan, 1])), "finite"),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("flows", [CNF(2), 3, [Affine(2)]])
def test_what_is_no_flow_is_refused(flows):
    with pytest.raises(TypeError, match="flows must be"):
        MixtureOfFlows(flows)


def test_a_gate_with_another_number_of_charts_is_refused():
    mixture = MixtureOfFlows([cnf(2, 3), cnf(2, 3)], MLPConditioner(3, 3))
    with pytest.raises(ValueError, match="gate must return 2 numbers, one for each chart"):
        mixture.log_prob(torch.zeros(4, 2), torch.zeros(4, 3))


def test_the_kind_is_the_weakest_of_the_charts():
    bound = Flow([Augment(2, 1), *build("nice", 3, size=4).transforms])
    assert MixtureOfFlows([cnf(), bound]).likelihood == "lower_bound"


def estimated(seed: int) -> Flow:
    """A linear flow in four dimensions, its divergence by one probe."""
    field = LinearField(4)
    with torch.no_grad():
        field.weight.copy_(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))
    solver = ODESolver(method="rk4", steps=10)
    return Flow([ContinuousTransform(field, divergence=Hutchinson(), solver=solver)])


@torch.no_grad()
def test_the_log_of_a_sum_of_estimates_is_labelled_as_biased():
    """It is too large on average, by far more than 5 standard errors."""
    x, generator = torch.zeros(4000, 4), seeded()
    for charts, kind in ((1, "estimate"), (2, "biased_estimate")):
        flow = Flow([], MixtureOfFlows([estimated(seed) for seed in range(charts)]))
        assert flow.likelihood == kind
        error = flow.log_prob(x, generator=generator) - flow.using(divergence=Exact()).log_prob(x)
        bias = error.mean() / (error.std() / len(x) ** 0.5)
        assert (bias > 5) if kind == "biased_estimate" else (bias.abs() < 5)


@pytest.mark.parametrize("has_gate", [False, True])
def test_a_density_is_the_same_within_vmap(has_gate):
    gate = perturbed(MLPConditioner(1, 2, hidden_features=())) if has_gate else None
    mixture = MixtureOfFlows([Flow([Affine(2)]), perturbed(Flow([ConditionalAffine(2, 1)]))], gate)
    z, context = torch.randn(5, 2), torch.randn(5, 1)
    found = torch.func.vmap(mixture.log_prob)(z, context)
    torch.testing.assert_close(found, mixture.log_prob(z, context))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_and_scaling_of_a_gate_have_the_dtype_of_the_charts(dtype):
    base = StandardNormal(2).to(dtype)
    for gate in (None, MLPConditioner(1, 1).to(dtype)):
        mixture = MixtureOfFlows([Flow([Permute([1, 0])], base)], gate, 1)
        x, context = torch.zeros(3, 2, dtype=dtype), torch.ones(1, dtype=dtype)
        assert mixture.log_prob(x, context).dtype == dtype
