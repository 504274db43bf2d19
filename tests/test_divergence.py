"""Laws of the divergence: random probes estimate without bias what the exact one gives."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from zoo import FIELDS, cnf, mlp, perturbed, rows_for

from cnf import Exact, Flow, Hutchinson, ODESolver
from cnf.divergence import Divergence
from cnf.regularizers import jacobian_frobenius
from cnf.transforms import ContinuousTransform
from cnf.vector_fields import LinearField

NOISES = ["rademacher", "gaussian"]
T = torch.tensor(0.4, dtype=torch.float64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_mean_within_four_errors(draws, expected):
    """The mean over the first axis of `draws`, against four of its standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= 4 * error + 1e-12).all()


def estimates(divergence, field, x, count, context=None):
    """`count` independent estimates for each row of `x`, from one evaluation."""
    many = x.expand(count, *x.shape)
    probes = divergence.draw_probes(many)
    return divergence(field, T, many, probes, context).divergence.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rademacher_entries_are_exactly_one_or_minus_one(dtype):
    probes = Hutchinson(probes=3).draw_probes(torch.zeros(50, 4, dtype=dtype))
    assert probes.dtype == dtype
    assert ((probes == 1) | (probes == -1)).all()
    assert (probes == 1).any()
    assert (probes == -1).any()


def test_gaussian_entries_are_normal():
    probes = Hutchinson(noise="gaussian").draw_probes(torch.zeros(50_000, 2)).flatten()
    assert_mean_within_four_errors(probes, 0)
    assert_mean_within_four_errors(probes**2, 1)
    assert_mean_within_four_errors(probes**3, 0)
    assert_mean_within_four_errors(probes**4, 3)
    within = (probes.abs() < 1).double()
    assert_mean_within_four_errors(within, math.erf(1 / math.sqrt(2)))


@pytest.mark.parametrize("noise", NOISES)
def test_probes_have_identity_covariance(noise):
    probes = Hutchinson(noise=noise).draw_probes(torch.zeros(50_000, 3))[0]
    assert_mean_within_four_errors(probes, 0)
    assert_mean_within_four_errors(probes.unsqueeze(-1) * probes.unsqueeze(-2), torch.eye(3))


@pytest.mark.parametrize("noise", NOISES)
def test_probes_are_independent_from_row_to_row_and_draw_to_draw(noise):
    probes = Hutchinson(noise=noise, probes=2).draw_probes(torch.zeros(50_000, 2, 1))
    first, second = probes.squeeze(-1)
    for one, other in [(first[:, 0], first[:, 1]), (first[:, 0], second[:, 0])]:
        assert_mean_within_four_errors(one * other, 0)


@pytest.mark.parametrize("noise", NOISES)
def test_probes_come_from_the_generator_alone(noise):
    hutchinson = Hutchinson(noise=noise, probes=2)
    x = torch.zeros(50, 3)
    torch.manual_seed(1)
    first = hutchinson.draw_probes(x, generator=seeded(7))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = hutchinson.draw_probes(x + 1, generator=seeded(7))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, hutchinson.draw_probes(x, generator=seeded(8)))


@pytest.mark.parametrize("noise", NOISES)
def test_without_a_generator_the_global_seed_decides(noise):
    hutchinson = Hutchinson(noise=noise)
    x = torch.zeros(50, 3)
    torch.manual_seed(1)
    first = hutchinson.draw_probes(x)
    following = hutchinson.draw_probes(x)
    torch.manual_seed(1)
    assert torch.equal(hutchinson.draw_probes(x), first)
    assert not torch.equal(first, following)


def test_exact_draws_nothing():
    before = torch.get_rng_state()
    assert Exact().draw_probes(torch.zeros(3, 2)) is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
def test_a_scaled_basis_as_probes_gives_the_exact_divergence_and_its_gradients(make):
    field = make()
    x, context = rows_for(field, 3)
    x.requires_grad_()
    features = field.features
    basis = math.sqrt(features) * torch.eye(features).unsqueeze(1).expand(-1, *x.shape)
    exact = Exact()(field, T, x, None, context)
    estimate = Hutchinson(probes=features)(field, T, x, basis, context)
    torch.testing.assert_close(estimate.velocity, exact.velocity, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(estimate.divergence, exact.divergence, rtol=1e-12, atol=1e-12)

    inputs = [x, *field.parameters()]
    gradients = [
        torch.autograd.grad(
            evaluation.divergence.sum(), inputs, allow_unused=True, materialize_grads=True
        )
        if evaluation.divergence.requires_grad
        else None
        for evaluation in (estimate, exact)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(probes=2)], ids=repr)
def test_an_evaluation_holds_where_it_was_made_and_the_velocity_there(divergence):
    field = mlp(2, 3)
    x, context = rows_for(field, 4)
    evaluation = divergence(field, T, x, divergence.draw_probes(x), context)
    assert evaluation.t is T
    assert evaluation.x is x
    torch.testing.assert_close(evaluation.velocity, field(T, x, context), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", ["sin then silu", "linear with context", "user with context"])
def test_the_mean_of_estimates_is_the_exact_divergence(name, noise):
    field = FIELDS[name]()
    x, context = rows_for(field, 3)
    draws = estimates(Hutchinson(noise=noise), field, x, 4000, context)
    assert_mean_within_four_errors(draws, Exact()(field, T, x, None, context).divergence.detach())


@pytest.mark.parametrize("noise", NOISES)
def test_variance_of_one_probe_is_the_known_formula(noise):
    field = perturbed(LinearField(4), 1.0)
    draws = estimates(Hutchinson(noise=noise), field, torch.zeros(4), 400_000)
    symmetric = 0.5 * (field.weight + field.weight.T)
    variance = 2 * symmetric.square().sum()
    if noise == "rademacher":
        variance = variance - 2 * symmetric.diagonal().square().sum()
    assert draws.var().item() == pytest.approx(variance.item(), rel=0.03)


@pytest.mark.parametrize("noise", NOISES)
def test_variance_falls_as_one_over_the_probes(noise):
    field = perturbed(LinearField(4), 1.0)
    one, four, sixteen = (
        estimates(Hutchinson(noise=noise, probes=probes), field, torch.zeros(4), 50_000).var()
        for probes in (1, 4, 16)
    )
    assert (one / four).item() == pytest.approx(4, rel=0.1)
    assert (one / sixteen).item() == pytest.approx(16, rel=0.1)


def test_rademacher_probes_are_exact_on_a_diagonal_field():
    field = LinearField(5)
    with torch.no_grad():
        field.weight.copy_(torch.diag(torch.randn(5)))
    draws = estimates(Hutchinson(), field, torch.zeros(5), 1000)
    expected = field.weight.trace().detach().expand(1000)
    torch.testing.assert_close(draws, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("noise", NOISES)
def test_on_one_feature_an_estimate_is_the_squared_probe_times_the_divergence(noise):
    field = mlp(1)
    x = torch.randn(100, 1)
    hutchinson = Hutchinson(noise=noise)
    probes = hutchinson.draw_probes(x)
    estimate = hutchinson(field, T, x, probes).divergence
    exact = Exact()(field, T, x).divergence
    torch.testing.assert_close(estimate, exact * probes[0, :, 0] ** 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("direction", ["to_base_and_ladj", "to_data_and_ladj"])
def test_probes_are_the_same_throughout_a_solve(direction, noise):
    field = perturbed(LinearField(3), 1.0)
    hutchinson = Hutchinson(noise=noise, probes=2)
    transform = ContinuousTransform(
        field, divergence=hutchinson, solver=ODESolver(method="rk4", steps=7)
    )
    x = torch.randn(4, 3)
    _, ladj = getattr(transform, direction)(x, generator=seeded(3))

    probes = hutchinson.draw_probes(x, generator=seeded(3))
    rate = torch.einsum("pbi,ij,pbj->pb", probes, field.weight, probes).mean(0)
    sign = -1 if direction == "to_base_and_ladj" else 1
    torch.testing.assert_close(ladj, sign * rate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", NOISES)
def test_log_prob_with_probes_is_unbiased(noise):
    flow = cnf(solver=ODESolver(rtol=1e-6, atol=1e-6))
    x = torch.randn(3, 2)
    many = x.expand(1000, 3, 2)
    with torch.no_grad():
        exact = flow.log_prob(x)
        estimated = flow.using(divergence=Hutchinson(noise=noise))
        draws = estimated.log_prob(many, generator=seeded(0))
    assert (draws.std(0) > 1e-3).all()
    assert_mean_within_four_errors(draws, exact)


def test_log_prob_gradients_with_probes_are_unbiased():
    flow = cnf(solver=ODESolver(method="rk4", steps=10, gradient="backprop"))
    x = torch.randn(2)

    def gradient(flow, rows, **arguments):
        points = x.expand(rows, 2).clone().requires_grad_()
        log_prob = flow.log_prob(points, **arguments)
        return torch.autograd.grad(log_prob.sum(), points)[0]

    draws = gradient(flow.using(divergence=Hutchinson()), 1000, generator=seeded(0))
    assert_mean_within_four_errors(draws, gradient(flow, 1)[0])


def test_the_generator_makes_log_prob_reproducible():
    flow = cnf(divergence=Hutchinson())
    x = torch.randn(3, 2)
    with torch.no_grad():
        first = flow.log_prob(x, generator=seeded(5))
        torch.manual_seed(99)
        assert torch.equal(flow.log_prob(x, generator=seeded(5)), first)
        assert not torch.equal(flow.log_prob(x, generator=seeded(6)), first)


def test_exactness_is_declared():
    assert Exact().is_exact
    assert not Hutchinson(probes=1000).is_exact


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"noise": "normal"},
            ValueError,
            r"noise must be one of rademacher, gaussian; got 'normal'\.",
        ),
        ({"probes": 0}, ValueError, r"probes must be at least 1; got 0\."),
        ({"probes": -3}, ValueError, r"probes must be at least 1; got -3\."),
        ({"probes": 1.0}, TypeError, r"probes must be an int; got 1\.0\."),
        ({"probes": True}, TypeError, r"probes must be an int; got True\."),
        ({"probes": None}, TypeError, r"probes must be an int; got None\."),
    ],
)
def test_a_bad_setting_is_refused(arguments, error, message, shapes_unchecked):
    with pytest.raises(error, match=message):
        Hutchinson(**arguments)


def test_an_estimate_without_probes_is_refused():
    with pytest.raises(ValueError, match=r"probes must be the result of draw_probes; got None\."):
        Hutchinson()(mlp(), T, torch.zeros(3, 2), None)


@pytest.mark.parametrize(
    "divergence", [Exact(), Hutchinson(), Hutchinson(noise="gaussian", probes=4)], ids=repr
)
def test_settings_are_values(divergence):
    again = eval(repr(divergence))  # noqa: S307 - that repr can be read back is the law
    assert again == divergence
    assert hash(again) == hash(divergence)
    with pytest.raises(FrozenInstanceError):
        divergence.probes = 2
    assert Hutchinson(probes=2) != Hutchinson(probes=3)


def test_the_interface_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Divergence()


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_standard_error_is_the_spread_of_the_estimate(noise, bottleneck):
    flow = cnf(4, hidden_features=(8, 3, 6), activation="tanh", frequency=None, blocks=2)
    flow = flow.using(
        divergence=Hutchinson(noise=noise, probes=6, bottleneck=bottleneck),
        solver=ODESolver(rtol=1e-5, atol=1e-5),
    )
    x = torch.randn(4).expand(3000, 4)
    log_prob, error = flow.log_prob_and_error(x)
    exact = flow.using(divergence=Exact()).log_prob(x[:1])
    assert (log_prob.mean() - exact).abs() < 4 * log_prob.std() / 3000**0.5
    # The mean of the squared errors is an unbiased estimate of the variance.
    squares = error.square()
    deviations = (log_prob - exact).square()
    spread = (squares - deviations).std() / 3000**0.5
    assert (squares.mean() - deviations.mean()).abs() < 4 * spread


def test_standard_error_leaves_the_log_density_as_it_is():
    flow = cnf().using(divergence=Hutchinson(probes=3))
    x = torch.randn(5, 2)
    log_prob, error = flow.log_prob_and_error(x, generator=torch.Generator().manual_seed(1))
    expected = flow.log_prob(x, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-9)
    assert (error > 0).all()


def test_an_exact_likelihood_has_no_standard_error():
    flow = cnf()
    x = torch.randn(5, 2)
    log_prob, error = flow.log_prob_and_error(x)
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=0, atol=0)
    assert (error == 0).all()


def test_only_estimated_blocks_contribute_to_the_standard_error():
    first, second = cnf(blocks=2).chain
    estimated = first.using(divergence=Hutchinson(probes=4))
    x = torch.randn(5, 2)
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    _, mixed = Flow([estimated, second]).log_prob_and_error(x, generator=seeds[0])
    _, alone = Flow([estimated]).log_prob_and_error(x, generator=seeds[1])
    torch.testing.assert_close(mixed, alone, rtol=0, atol=1e-9)


def test_bad_calls_for_a_standard_error_are_refused():
    flow, x = cnf(), torch.randn(5, 2)
    with pytest.raises(ValueError, match="at least 2"):
        flow.using(divergence=Hutchinson()).log_prob_and_error(x)
    blocks = [cnf().chain[0].using(divergence=Hutchinson(probes=n)) for n in (2, 3)]
    with pytest.raises(ValueError, match=r"the same number of probes.*got \[2, 3\]"):
        Flow(blocks).log_prob_and_error(x)

    class Unknown(Exact):
        is_exact = False

    mixed = [blocks[0], blocks[1].using(divergence=Unknown())]
    with pytest.raises(ValueError, match=r"by Hutchinson only; got \['Unknown'\]"):
        Flow(mixed).log_prob_and_error(x)
    with pytest.raises(ValueError, match="it is 'lower_bound'"):
        cnf(augment=1).log_prob_and_error(x)


def test_bottleneck_probes_give_no_products_for_regularizers():
    transform = ContinuousTransform(
        mlp(5, hidden_features=(8, 3)), divergence=Hutchinson(bottleneck=True)
    )
    with pytest.raises(ValueError, match=r"use Hutchinson\(bottleneck=False\)"):
        transform.to_base_with_costs(torch.randn(2, 5), regularizers=[jacobian_frobenius])


def test_a_bottleneck_must_be_there():
    transform = ContinuousTransform(mlp(2), divergence=Hutchinson(bottleneck=True))
    with pytest.raises(ValueError, match=r"this MLPField has no bottleneck; use Hutchinson"):
        transform.to_base_and_ladj(torch.randn(2, 2))
