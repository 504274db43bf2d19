"""Laws of log-determinants: right, bounded, and where estimated, right in the mean."""

import math
from dataclasses import dataclass

import pytest
import torch
from zoo import LinearContraction, lipschitz_attention, lipschitz_mlp, rows_for, seeded

from cnf.transforms import ExactLogDet, LipschitzMLP, RussianRoulette, TruncatedSeries
from cnf.transforms.residual.log_det import power_series
from cnf.vector_fields.jacobian.autograd import standard_basis


def strong(coefficient, context_features=0):
    """A network in four dimensions that comes near its coefficient."""
    network = lipschitz_mlp(
        4, context_features, hidden_features=(8,), activation="elu", coefficient=coefficient
    )
    with torch.no_grad():
        for layer in network.layers:
            layer.weight.copy_(5 * torch.nn.init.orthogonal_(layer.weight))
            layer.bias.copy_(0.7 + 0.1 * torch.randn_like(layer.bias))
    return network


def jacobian(network, x):
    return torch.autograd.functional.jacobian(network, x)


def exactly_traced(contraction, x, weights):
    """The power series with probes whose mean of products is the trace itself."""
    return power_series(contraction, x, standard_basis(x) * x.shape[-1] ** 0.5, weights)


def slopes(value, network, *inputs):
    parts = torch.autograd.grad(
        value.sum(), [*inputs, *network.parameters()], retain_graph=True, materialize_grads=True
    )
    return torch.cat([part.flatten() for part in parts])


def exact_slopes(network, x):
    x = x.clone().requires_grad_()
    return slopes(ExactLogDet()(network.given(None), x)[1], network, x)


@pytest.mark.parametrize("coefficient", [0.3, 0.8])
def test_the_networks_of_these_tests_come_near_their_coefficient(coefficient):
    norm = torch.linalg.matrix_norm(jacobian(strong(coefficient), torch.randn(4)), 2)
    assert 0.6 * coefficient < norm <= coefficient


@pytest.mark.parametrize("coefficient", [0.3, 0.8])
def test_the_exact_one_is_that_of_the_jacobian_and_within_its_bounds(coefficient):
    network, x = strong(coefficient), torch.randn(5, 4)
    change, ladj = ExactLogDet()(network.given(None), x)
    expected = torch.stack(
        [torch.linalg.slogdet(torch.eye(4) + jacobian(network, row)).logabsdet for row in x]
    )
    torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(change, network(x), rtol=0, atol=1e-12)
    assert (4 * math.log(1 - coefficient) <= ladj).all()
    assert (ladj <= 4 * math.log(1 + coefficient)).all()
    ends = [LinearContraction(sign * coefficient * torch.eye(4)) for sign in (-1, 1)]
    low, high = (ExactLogDet()(end.given(None), x[0])[1].item() for end in ends)
    assert low == pytest.approx(4 * math.log(1 - coefficient))
    assert high == pytest.approx(4 * math.log(1 + coefficient))


def test_terms_of_the_series_are_weighted_traces_of_powers():
    network, x = strong(0.8), torch.randn(4)
    weights = [1.0, 0.5, 3.0, 2.0]
    _, found = exactly_traced(network.given(None), x, weights)
    powers = [torch.linalg.matrix_power(jacobian(network, x), k).trace() for k in range(1, 5)]
    signs = [1, -1 / 2, 1 / 3, -1 / 4]
    expected = sum(w * s * p for w, s, p in zip(weights, signs, powers, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_the_weighted_series():
    """Against brute force through powers of a Jacobian that keeps its graph."""
    network, x = strong(0.8), torch.randn(4, requires_grad=True)
    weights = [1.0, 0.5, 3.0]
    _, found = exactly_traced(network.given(None), x, weights)
    matrix = torch.autograd.functional.jacobian(network, x, create_graph=True)
    brute = sum(
        w * (-1) ** k / (k + 1) * torch.linalg.matrix_power(matrix, k + 1).trace()
        for k, w in enumerate(weights)
    )
    torch.testing.assert_close(
        slopes(found, network, x), slopes(brute, network, x), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("context_features", [0, 3])
def test_a_long_series_has_the_exact_value_and_gradient(context_features):
    network = strong(0.5, context_features)
    x, context = rows_for(network, 3)
    inputs = [x.requires_grad_()]
    if context is not None:
        inputs.append(context.requires_grad_())
    _, exact = ExactLogDet()(network.given(context), x)
    _, series = exactly_traced(network.given(context), x, [1.0] * 50)
    torch.testing.assert_close(series, exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        slopes(series, network, *inputs), slopes(exact, network, *inputs), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("coefficient", [0.3, 0.8])
@pytest.mark.parametrize("terms", [1, 2, 5, 10])
def test_the_bias_of_a_truncated_series_is_within_its_bound_which_is_reached(coefficient, terms):
    bound = -4 * (math.log(1 - coefficient) + sum(coefficient**k / k for k in range(1, terms + 1)))
    worst = LinearContraction(-coefficient * torch.eye(4))
    for network in (strong(coefficient), lipschitz_attention(2, 2, coefficient=coefficient), worst):
        x = torch.randn(20, 4)
        _, truncated = exactly_traced(network.given(None), x, [1.0] * terms)
        _, exact = ExactLogDet()(network.given(None), x)
        bias = (truncated - exact).abs().max().item()
        assert bias <= bound + 1e-12
    assert bias == pytest.approx(bound)


@pytest.mark.parametrize("log_det", [TruncatedSeries(), RussianRoulette()], ids=repr)
def test_the_value_is_the_estimate_whether_or_not_a_gradient_is_asked_for(log_det):
    """Not the trace whose gradient is right and whose value is not, as in other libraries."""
    network, x = strong(0.8), torch.randn(5, 4)
    with_gradient = log_det(network.given(None), x, generator=seeded())
    assert with_gradient[1].requires_grad
    with torch.no_grad():
        without = log_det(network.given(None), x, generator=seeded())
    assert not without[0].requires_grad
    assert not without[1].requires_grad
    torch.testing.assert_close(with_gradient, without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("log_det", [ExactLogDet(), RussianRoulette(probability=0.1)], ids=repr)
def test_the_value_in_one_dimension_is_the_logarithm_of_the_slope(log_det):
    """g = 0.9 x: 0.642, where the trap in other libraries gives 0.474."""
    contraction, x = LinearContraction(torch.tensor([[0.9]])).given(None), torch.ones(1)
    generator = seeded()
    draws = torch.stack([log_det(contraction, x, generator=generator)[1] for _ in range(200)])
    assert abs(draws.mean() - math.log(1.9)) <= 4 * draws.std() / len(draws) ** 0.5 + 1e-12


def seeded_by(seed):
    return torch.Generator().manual_seed(seed)


def means_of_draws(log_det, network, x, calls, rows):
    """Means over `rows` draws of each call, which share the number of terms: independent calls."""
    generator = seeded()
    contraction = network.given(None)
    with torch.no_grad():
        return torch.stack(
            [
                log_det(contraction, x.expand(rows, 4), generator=generator)[1].mean()
                for _ in range(calls)
            ]
        )


ROULETTES = [
    (0.3, RussianRoulette(exact_terms=0, probability=0.5)),
    (0.3, RussianRoulette(exact_terms=2, probability=0.5, probes=2)),
    (0.8, RussianRoulette(exact_terms=0)),
    (0.8, RussianRoulette(exact_terms=5)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("coefficient", "log_det"), ROULETTES, ids=str)
def test_roulette_is_unbiased(coefficient, log_det):
    network, x = strong(coefficient), torch.randn(4)
    means = means_of_draws(log_det, network, x, calls=500, rows=4)
    _, exact = ExactLogDet()(network.given(None), x)
    assert (means.mean() - exact).abs() < 4 * means.std() / len(means) ** 0.5


def test_a_truncated_series_is_biased_and_its_mean_is_that_of_its_traces():
    network, x = LinearContraction(0.1 - 0.7 * torch.eye(4)), torch.randn(4)
    means = means_of_draws(TruncatedSeries(terms=2), network, x, calls=50, rows=20)
    error = means.std() / len(means) ** 0.5
    _, expected = exactly_traced(network.given(None), x, [1.0, 1.0])
    _, exact = ExactLogDet()(network.given(None), x)
    assert (means.mean() - expected).abs() < 4 * error
    assert (means.mean() - exact).abs() > 10 * error


@pytest.mark.slow
@pytest.mark.parametrize(("coefficient", "log_det"), ROULETTES[1:], ids=str)
def test_the_gradient_of_roulette_is_unbiased(coefficient, log_det):
    """Along three random directions of the parameters and x."""
    network, x = strong(coefficient), torch.randn(4)
    exact = exact_slopes(network, x)
    directions = torch.randn(3, len(exact))
    generator, draws = seeded(), []
    for _ in range(200):
        rows = x.expand(8, 4).clone().requires_grad_()
        _, ladj = log_det(network.given(None), rows, generator=generator)
        inputs = [rows, *network.parameters()]
        parts = torch.autograd.grad(ladj.mean(), inputs, materialize_grads=True)
        found = torch.cat([parts[0].sum(0), *(part.flatten() for part in parts[1:])])
        draws.append(directions @ found)
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - directions @ exact).abs() < 4 * error).all()


@dataclass(frozen=True)
class FixedRoulette(RussianRoulette):
    """With a number of further terms that is given, and the value that it then has."""

    further: int = 1

    def draw_terms(self, *, generator=None):
        return self.further


@pytest.mark.parametrize(("probability", "finite"), [(None, True), (0.2, False)])
def test_the_variance_is_finite_under_the_default_coefficient_as_said(probability, finite):
    """The second moment sums P(N = n) X(n)^2, which falls with large n, or grows for ever."""
    coefficient = LipschitzMLP(1).coefficient
    settings = {} if probability is None else {"probability": probability}
    worst, x = LinearContraction(torch.tensor([[-coefficient]])).given(None), torch.zeros(1)
    shares = []
    for further in (150, 300, 600):
        roulette = FixedRoulette(further=further, **settings)
        stop = roulette.probability
        value = roulette(worst, x)[1].item()
        shares.append((1 - stop) ** (further - 1) * stop * value**2)
    assert (shares[0] > shares[1] > shares[2]) == finite
    assert (shares[0] < shares[1] < shares[2]) != finite
    assert RussianRoulette(**settings).has_finite_variance(coefficient) == finite


def test_the_number_of_terms_is_geometric():
    """P(N >= m) = (1 - p)^(m - 1), within 4 standard errors of a proportion."""
    roulette, generator = RussianRoulette(probability=0.3), seeded()
    draws = torch.tensor([roulette.draw_terms(generator=generator) for _ in range(4000)])
    assert draws.min() == 1
    for least in (2, 3, 5, 8):
        share = 0.7 ** (least - 1)
        error = (share * (1 - share) / len(draws)) ** 0.5
        assert abs((draws >= least).double().mean() - share) < 4 * error


@pytest.mark.parametrize("log_det", [TruncatedSeries(probes=2), RussianRoulette()], ids=repr)
def test_draws_come_from_the_generator_alone(log_det):
    contraction, x = strong(0.8).given(None), torch.randn(5, 4)
    before = torch.get_rng_state()
    first, again, other = (
        log_det(contraction, x, generator=seeded_by(seed))[1] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_map_that_ignores_x_has_none():
    def constant(x):
        return torch.ones_like(x)

    for log_det in (ExactLogDet(), TruncatedSeries(), RussianRoulette()):
        assert torch.equal(log_det(constant, torch.randn(3, 2))[1], torch.zeros(3))


def test_each_says_what_it_gives():
    kinds = [part.likelihood for part in (ExactLogDet(), RussianRoulette(), TruncatedSeries())]
    assert kinds == ["exact", "estimate", "biased_estimate"]


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TruncatedSeries(terms=0), ValueError, "terms must be at least 1; got 0"),
        (lambda: TruncatedSeries(probes=1.5), TypeError, "probes must be an int; got 1.5"),
        (lambda: RussianRoulette(exact_terms=-1), ValueError, "exact_terms must be at least 0"),
        (lambda: RussianRoulette(probes=0), ValueError, "probes must be at least 1; got 0"),
        (lambda: RussianRoulette(probability=1.0), ValueError, "between 0 and 1, .*; got 1.0"),
        (lambda: RussianRoulette(probability=0.0), ValueError, "between 0 and 1, .*; got 0.0"),
        (
            lambda: RussianRoulette(probability=1e-12),
            ValueError,
            "at least 0.0001; got 1e-12.*Exact",
        ),
        (
            lambda: RussianRoulette(exact_terms=10**9),
            ValueError,
            "exact_terms must be at most 10000",
        ),
        (
            lambda: TruncatedSeries(terms=10**9),
            ValueError,
            "at most 10000, .*; got 1000000000. Take",
        ),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()
