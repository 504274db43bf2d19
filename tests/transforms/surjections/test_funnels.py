"""Laws of funnels: the square map has the stated Jacobian, and a Gaussian its closed form."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from zoo import perturbed, seeded

from cnf import Flow
from cnf.baselines import build
from cnf.bases import ConditionalNormal, StandardNormal
from cnf.transforms import Affine, ConvFunnel, MLPFunnel

FUNNELS = {
    "mlp": lambda: perturbed(MLPFunnel(4, 2), 0.2),
    "conv": lambda: perturbed(ConvFunnel((2, 2, 4), hidden_channels=(3,)), 0.2),
    "conv of three": lambda: perturbed(ConvFunnel((1, 3, 3), kernel_size=3), 0.2),
}


@pytest.mark.parametrize("make", FUNNELS.values(), ids=FUNNELS)
def test_the_contribution_is_the_jacobian_of_the_square_map_and_the_density_of_the_rest(make):
    """The square map is x to (z, y); y, the dropped part, is some of the entries of x."""
    funnel = make()
    x = torch.randn(funnel.features)

    def square(x):
        z, y, _ = funnel._split(x)
        return torch.cat([z, y])

    jacobian = torch.autograd.functional.jacobian(square, x)
    z, ladj = funnel.to_base_and_ladj(x)
    y = square(x)[funnel.kept :]
    assert all((entry == x).any() for entry in y)
    expected = torch.linalg.slogdet(jacobian).logabsdet + funnel.dropped.log_prob(y, z)
    torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-9)


def test_a_funnel_of_a_gaussian_with_the_true_conditional_is_the_gaussian():
    factor = torch.randn(5, 5)
    covariance = factor @ factor.T + torch.eye(5)
    kept, dropped = 3, 2
    funnel = perturbed(MLPFunnel(5, kept))
    matrix = torch.cat([funnel.mix.matrix.value(), funnel.shift.weight], 1).detach()
    joint = torch.cat([matrix, torch.eye(5)[kept:]])  # x to (z, y)
    moved = joint @ covariance @ joint.T
    gain = moved[kept:, :kept] @ moved[:kept, :kept].inverse()
    rest = moved[kept:, kept:] - gain @ moved[:kept, kept:]
    y_given_z = _Gaussian(gain, funnel.shift.bias.detach(), rest)
    funnel.dropped = y_given_z

    x = torch.randn(20, 5)
    z, ladj = funnel.to_base_and_ladj(x)
    of_z = MultivariateNormal(funnel.shift.bias, moved[:kept, :kept]).log_prob(z)
    expected = MultivariateNormal(torch.zeros(5), covariance).log_prob(x)
    torch.testing.assert_close(of_z + ladj, expected, rtol=0, atol=1e-9)
    assert dropped == y_given_z.features


class _Gaussian(StandardNormal):
    """Gaussian whose mean is ``gain @ (context - loc)``."""

    def __init__(self, gain, loc, covariance):
        super().__init__(len(gain))
        self.context_features = gain.shape[1]
        self.gain, self.offset, self.covariance = gain, loc, covariance

    def _log_prob(self, z, context, generator):
        mean = (context - self.offset) @ self.gain.T
        return MultivariateNormal(mean, self.covariance).log_prob(z)


@torch.no_grad()
def test_a_funnel_from_two_features_to_one_has_the_mass_one():
    torch.manual_seed(0)
    dropped = ConditionalNormal(1, 1, hidden_features=(3,))
    flow = Flow([perturbed(MLPFunnel(2, 1, dropped=dropped)), perturbed(Affine(1))])
    side = torch.linspace(-14, 14, 301)
    x = torch.cartesian_prod(side, side)
    assert float(flow.log_prob(x).exp().sum() * (side[1] - side[0]) ** 2) == pytest.approx(
        1, abs=2e-3
    )


def test_a_funnel_is_the_convolution_with_its_stride():
    funnel = perturbed(ConvFunnel((2, 4, 6)))
    with torch.no_grad():
        kept = funnel.mix.matrix.value()
        kernel = torch.cat(
            [kept[:, :, None], funnel.shift.weight[..., 0, 0].unflatten(1, (2, 3))], 2
        ).unflatten(2, (2, 2))
    x = torch.randn(3, 2, 4, 6)
    expected = nn.functional.conv2d(x, kernel, funnel.shift.bias, stride=2)
    torch.testing.assert_close(funnel.to_base(x.flatten(1)), expected.flatten(1))
    assert funnel.funnelled_shape == expected.shape[1:]


def test_a_conditional_flow_models_the_dropped_part():
    dropped = perturbed(build("realnvp", 2, 2, size=4), 0.1)
    funnel = MLPFunnel(4, 2, dropped=dropped)
    x = torch.randn(5, 4)
    z, ladj = funnel.to_base_and_ladj(x)
    expected = dropped.log_prob(x[:, 2:], z) + funnel.mix.matrix.log_abs_det()
    torch.testing.assert_close(ladj, expected)


def test_draws_of_the_dropped_part_come_from_its_distribution():
    funnel = perturbed(MLPFunnel(2, 1, dropped=ConditionalNormal(1, 1, hidden_features=())))
    z = torch.tensor([0.7]).expand(20_000, 1)
    y = funnel.to_data(z, generator=seeded())[:, 1].detach()
    mean, log_std = funnel.dropped.network(z[0]).detach()
    assert (y.mean() - mean).abs() < 4 * log_std.exp() / math.sqrt(20_000)
    assert float(y.std() / log_std.exp()) == pytest.approx(1, abs=0.02)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPFunnel(3, 3), "kept must be less than the 3 features; got 3"),
        (lambda: MLPFunnel(3, 2, dropped=StandardNormal(2)), "the 1 features that MLPFunnel drops"),
        (lambda: MLPFunnel(3, 2, dropped=Flow([build("realnvp", 1, 3).chain[0]])), "got 3"),
        (lambda: ConvFunnel((1, 4, 4), kernel_size=3), "kernel_size must divide .* got 3"),
        (lambda: ConvFunnel((1, 4, 4), dropped=StandardNormal(3)), "the 12 features"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
