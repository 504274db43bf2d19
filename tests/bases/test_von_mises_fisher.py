"""Laws of von Mises-Fisher mixtures: constants, draws and fit."""

import math

import pytest
import torch
from torch.distributions import VonMises
from zoo import seeded

from cnf.bases import VonMisesFisherMixture
from cnf.manifolds import Sphere, Torus

POLE = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)


def single(concentration):
    base = VonMisesFisherMixture(Sphere(3), 1)
    base.set_components(torch.zeros(1), POLE, torch.tensor([[concentration]]))
    return base


def weighted(*log_weights):
    base = VonMisesFisherMixture(Sphere(3), 2)
    base.set_components(torch.tensor(log_weights), POLE.expand(2, 3), torch.ones(2, 1))
    return base


def test_a_component_of_weight_zero_takes_no_part():
    x = Sphere(3).project(torch.randn(5, 3))
    expected = single(1.0).log_prob(x)
    torch.testing.assert_close(weighted(0.0, -math.inf).log_prob(x), expected)


@pytest.mark.parametrize("concentration", [0.0, 1e-9, 1e-6, 1e-3, 1.0, 30.0, 1e5, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_distribution_on_the_sphere_is_normalised_at_every_concentration(concentration, dtype):
    base = single(concentration).to(dtype)
    # By the angle from the pole, on a grid of its logarithm.
    log_angle = torch.linspace(-14, math.log(math.pi), 4001)
    angle = log_angle.exp()
    x = torch.stack([angle.sin(), torch.zeros_like(angle), angle.cos()], -1).to(dtype)
    density = base.log_prob(x).double().exp() * 2 * math.pi * angle.sin() * angle
    mass = torch.trapezoid(density, log_angle)
    assert abs(float(mass) - 1) < (1e-2 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("concentration", [0.0, 1e-6, 1.0, 30.0, 1e4])
def test_an_angle_has_the_density_of_torch(concentration):
    base = VonMisesFisherMixture(Torus(1), 1)
    base.set_components(torch.zeros(1), torch.tensor([[0.4]]), torch.tensor([[concentration]]))
    x = torch.linspace(-3, 3, 11)
    expected = VonMises(torch.tensor(0.4), torch.tensor(concentration)).log_prob(x)
    torch.testing.assert_close(base.log_prob(x.unsqueeze(-1)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("concentration", [0.0, 1e-7, 1.0, 50.0, 1e5])
def test_draws_on_the_sphere_have_the_mean_cosine(concentration):
    """Within 4 standard errors."""
    cosine = single(concentration).rsample(torch.Size([20_000]), generator=seeded())[:, 2]
    some = max(concentration, 1e-3)
    expected = 0.0 if concentration < 1e-3 else 1 / math.tanh(some) - 1 / some
    assert abs(cosine.mean() - expected) < 4 * cosine.std() / len(cosine) ** 0.5


@pytest.mark.parametrize("concentration", [0.0, 0.5, 40.0])
def test_draws_of_angles_have_the_mean_cosine(concentration):
    """Within 4 standard errors."""
    base = VonMisesFisherMixture(Torus(1), 1)
    base.set_components(torch.zeros(1), torch.tensor([[3.0]]), torch.tensor([[concentration]]))
    angle = base.rsample(torch.Size([20_000]), generator=seeded())[:, 0]
    cosine = (angle - 3.0).cos()
    k = torch.tensor(concentration)
    expected = torch.special.i1e(k) / torch.special.i0e(k)
    assert abs(cosine.mean() - expected) < 4 * cosine.std() / len(cosine) ** 0.5


@pytest.mark.parametrize("manifold", [Sphere(3), Torus(2)], ids=str)
def test_a_fit_finds_the_components_of_its_data(manifold):
    truth = VonMisesFisherMixture(manifold, 2)
    means = manifold.project(
        torch.tensor([[2.0, -3.0, 1.0], [-1.0, 1.0, 1.0]])[:, : truth.features]
    )
    truth.set_components(
        torch.tensor([0.7, 0.3]).log(),
        means,
        torch.tensor([[20.0], [60.0]]).expand(-1, truth.angles),
    )
    z = truth.rsample(torch.Size([4000]), generator=seeded())
    fitted = VonMisesFisherMixture.from_data(z, manifold, 2)
    order = fitted.log_weights.argsort(descending=True)
    weights = fitted.log_weights[order].exp()
    torch.testing.assert_close(weights, truth.log_weights.exp(), rtol=0, atol=0.03)
    torch.testing.assert_close(fitted.means[order], truth.means, rtol=0, atol=0.02)
    torch.testing.assert_close(
        fitted.concentrations[order], truth.concentrations, rtol=0.15, atol=0.0
    )
    assert abs(float((fitted.log_prob(z) - truth.log_prob(z)).mean())) < 5e-3


def test_repeated_rows_do_not_make_a_component_infinite():
    z = Sphere(3).project(torch.randn(30, 3))
    z[10:] = z[0]
    fitted = VonMisesFisherMixture.from_data(z, Sphere(3), 5)
    assert fitted.concentrations.isfinite().all()
    assert fitted.log_prob(z).isfinite().all()


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: single(-1.0), "concentrations must be finite and at least 0; they go from -1"),
        (lambda: single(math.inf), "concentrations must be finite"),
        (lambda: weighted(-math.inf, -math.inf), "log_weights must be finite or -inf, and not all"),
        (lambda: weighted(0.0, math.nan), "log_weights must be finite or -inf"),
        (lambda: weighted(0.0, math.inf), "log_weights must be finite or -inf"),
        (lambda: VonMisesFisherMixture.from_data(2 * POLE, Sphere(3), 1), "z must be rows on"),
        (lambda: VonMisesFisherMixture.from_data(POLE, Sphere(3), 2), "at least 2 rows"),
        (
            lambda: VonMisesFisherMixture.from_data(POLE, Torus(2), 1),
            r"z must have shape \(\*batch, 2\); got \(1, 3\)",
        ),
        (
            lambda: VonMisesFisherMixture.from_data(POLE[0], Sphere(3), 1),
            r"z must have shape \(rows, 3\); got \(3,\)",
        ),
        (
            lambda: VonMisesFisherMixture(Torus(2), 1).set_components(
                torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 1)
            ),
            "parameters of shapes",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
