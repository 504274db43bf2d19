"""Laws of planar and radial flows: one-to-one whatever the parameters are, and undone exactly."""

import math

import pytest
import torch
from torch import nn
from training_runs import config
from zoo import perturbed

from cnf import Flow, fit
from cnf.transforms import Planar, Radial

both = pytest.mark.parametrize("kind", [Planar, Radial])


class Call(nn.Module):
    """`to_base_and_ladj` as the forward of a module, for `functional_call`."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part.to_base_and_ladj(x)


def with_parameters(part, x, **parameters):
    """z and ladj of the rows x, for each of many values of the parameters."""

    def call(values):
        named = {f"part.{name}": value for name, value in values.items()}
        return torch.func.functional_call(Call(part), named, (x,))

    return torch.vmap(call)(parameters)


def assert_undone(part, x, *, atol):
    z, ladj = part.to_base_and_ladj(x)
    back, ladj_back = part.to_data_and_ladj(z)
    torch.testing.assert_close(back, x, rtol=0, atol=atol)
    torch.testing.assert_close(ladj_back, -ladj, rtol=0, atol=10 * atol)


@both
@pytest.mark.parametrize("features", [1, 2, 5])
def test_a_new_one_is_the_identity(kind, features):
    x = 3 * torch.randn(20, features)
    z, ladj = kind(features).to_base_and_ladj(x)
    torch.testing.assert_close(z, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(ladj, torch.zeros(20), rtol=0, atol=1e-13)


def test_a_planar_map_is_one_to_one_whatever_its_parameters_are():
    """Across the plane its slope is least, or greatest, at the plane: there it is positive."""
    part = Planar(3)
    normal, direction = 2 * torch.randn(10_000, 3), 5 * torch.randn(10_000, 3)
    products = torch.tensor([-50.0, -1.0, 0.0, 200.0, -1e5, 1e5])
    size = normal[:6].square().sum(-1)
    direction[:6] = products.unsqueeze(-1) * normal[:6] / size.unsqueeze(-1)

    def moved(x):
        return with_parameters(part, x, normal=normal, direction=direction)

    _, ladj = moved(torch.zeros(3))
    assert ladj.isfinite().all()
    assert (ladj > math.log(0.99e-3)).all()

    far = 1e3 * torch.randn(3)  # where tanh is 1, for these normals
    step = moved(far)[0] - far
    inside = (normal @ far).abs() > 50
    across = (step * normal).sum(-1) * (normal @ far).sign()
    torch.testing.assert_close(across[inside], ladj.expm1()[inside], rtol=1e-6, atol=1e-8)


def test_volumes_far_from_the_plane_are_kept():
    part = perturbed(Planar(2))
    normal = part.normal.detach()
    x = torch.randn(10, 2) + 100 * normal / normal.square().sum()
    torch.testing.assert_close(part.to_base_and_ladj(x)[1], torch.zeros(10), rtol=0, atol=1e-14)


@pytest.mark.parametrize("product", [-50.0, -2.0, 3.0, 200.0])
@pytest.mark.parametrize("distance", [1e-3, 1.0, 100.0])
def test_a_steep_or_flat_planar_map_is_undone(product, distance):
    part = perturbed(Planar(3))
    with torch.no_grad():
        part.direction.copy_(product * part.normal / part.normal.square().sum())
    assert_undone(part, distance * torch.randn(50, 3), atol=1e-9)


@pytest.mark.parametrize("strength", [-50.0, -2.0, 3.0, 200.0])
@pytest.mark.parametrize("distance", [0.0, 1e-6, 1.0, 1e4])
def test_a_steep_or_flat_radial_map_is_undone(strength, distance):
    part = perturbed(Radial(3))
    with torch.no_grad():
        part.strength.fill_(strength)
    assert_undone(part, part.centre.detach() + distance * torch.randn(50, 3), atol=1e-9)


@both
def test_float32_is_undone_to_its_digits(kind):
    assert_undone(perturbed(kind(3)).float(), torch.randn(100, 3).float(), atol=1e-5)


@pytest.mark.parametrize("features", [1, 3])
def test_the_centre_of_a_radial_map_stays_and_space_is_stretched_alike_around_it(features):
    part = perturbed(Radial(features))
    x = part.centre.detach().requires_grad_()
    z, ladj = part.to_base_and_ladj(x)
    assert torch.equal(z, x)
    radius = part.log_radius.exp()
    rest = 1e-3 * radius + part.strength.exp().log1p()
    torch.testing.assert_close(ladj, features * (rest / radius).log(), rtol=0, atol=1e-12)
    assert torch.autograd.grad(ladj + part.to_data(z).sum(), x)[0].isfinite().all()


@both
def test_a_stack_of_eight_has_a_density_that_integrates_to_one(kind):
    flow = Flow([perturbed(kind(2)) for _ in range(8)])
    axis = torch.linspace(-20, 20, 401)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().reshape(401, 401)
    mass = torch.trapezoid(torch.trapezoid(density, axis), axis)
    assert abs(float(mass) - 1) < 1e-3


@both
@pytest.mark.parametrize("call", ["to_base_and_ladj", "to_data_and_ladj"])
def test_gradcheck(kind, call):
    part = perturbed(kind(2))
    x = torch.randn(3, 2, requires_grad=True)

    def moved(x, *_):  # the parameters are perturbed in place
        return getattr(part, call)(x)

    assert torch.autograd.gradcheck(moved, (x, *part.parameters()))


@pytest.mark.slow
@both
def test_fit_lowers_the_loss(kind):
    x = torch.randn(200, 2) * 0.3 + torch.tensor([[1.5, 0.0], [-1.5, 0.0]]).repeat(100, 1)
    flow = Flow([kind(2) for _ in range(4)])
    start = -flow.log_prob(x).mean()
    fit(flow, x, config(200, learning_rate=0.03))
    assert -flow.log_prob(x).mean() < start - 0.2
