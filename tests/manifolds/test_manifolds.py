"""Laws of manifolds, and of flows on them: geodesics, divergence, densities, samples."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo import MANIFOLDS, PRECISE, cnf, rows_for, seeded, tangent

from cnf import (
    CNF,
    Flow,
    FlowMatching,
    Hutchinson,
    ODESolver,
    Standardize,
    TrainingConfig,
    certify,
    fit,
    load,
    save,
)
from cnf.bases import (
    HalfNormal,
    ProductBase,
    StandardNormal,
    UniformOnManifold,
    VonMisesFisherMixture,
)
from cnf.flows import MixtureOfFlows
from cnf.manifolds import Euclidean, Product, Sphere, Torus
from cnf.objectives import GeodesicPath, LinearPath
from cnf.transforms import Affine, ContinuousTransform
from cnf.vector_fields import LinearField, TangentField

every_manifold = pytest.mark.parametrize("manifold", MANIFOLDS.values(), ids=MANIFOLDS)


def pairs(manifold, number=20):
    return (manifold.project(3 * torch.randn(number, manifold.features)) for _ in range(2))


def on_the_sphere(latitude: Tensor, longitude: Tensor) -> Tensor:
    around = latitude.cos()
    return torch.stack([around * longitude.cos(), around * longitude.sin(), latitude.sin()], -1)


def sphere_quadrature(size=60):
    """Points and weights of a quadrature over the sphere, exact for smooth functions."""
    heights, weights = map(torch.as_tensor, np.polynomial.legendre.leggauss(size))
    longitudes = math.pi * torch.arange(2 * size, dtype=torch.float64) / size
    latitude, longitude = torch.meshgrid(heights.arcsin(), longitudes, indexing="ij")
    weight = (weights * math.pi / size).unsqueeze(-1).expand_as(latitude)
    return on_the_sphere(latitude, longitude).flatten(0, 1), weight.flatten()


def angles(size=40):
    return -math.pi + 2 * math.pi * (torch.arange(size) + 0.5) / size


@every_manifold
def test_a_geodesic_leads_from_start_to_end_on_the_manifold_at_constant_speed(manifold):
    x0, x1 = pairs(manifold)
    t = torch.rand(20)
    point, velocity = manifold.geodesic(t, x0, x1)
    assert manifold.contains(point).all()
    torch.testing.assert_close(velocity.norm(dim=-1), manifold.distance(x0, x1))

    _, slope = torch.func.jvp(
        lambda t: manifold.embed(manifold.geodesic(t, x0, x1)[0]), (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(manifold.embed_derivative(point, velocity), slope)
    for time, end in ((0.0, x0), (1.0, x1)):
        reached = manifold.geodesic(torch.tensor(time), x0, x1)[0]
        torch.testing.assert_close(manifold.embed(reached), manifold.embed(end))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beside", [0.0, 1e-12, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_a_geodesic_to_nearly_the_antipode_stays_on_the_sphere_and_is_tangent(beside, dtype):
    sphere, rounding = Sphere(3), 10 * torch.finfo(dtype).eps
    x0 = sphere.project(torch.randn(500, 3, dtype=dtype))
    x1 = sphere.project(-x0 + beside * torch.randn(500, 3, dtype=dtype))
    point, velocity = sphere.geodesic(torch.rand(500, dtype=dtype), x0, x1)
    end, _ = sphere.geodesic(torch.ones(500, dtype=dtype), x0, x1)
    assert (point.norm(dim=-1) - 1).abs().max() < rounding
    assert (point * velocity).sum(-1).abs().max() < rounding
    torch.testing.assert_close(end, x1, rtol=0, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wrapped_angles_are_from_minus_pi_to_pi_and_the_same_points(dtype):
    limit, step = torch.tensor(math.pi, dtype=dtype), torch.finfo(dtype).eps
    seams = torch.cat(
        [turns * limit * (1 + step * torch.arange(-9, 10)) for turns in (-3, -1, 1, 5)]
    )
    x = torch.cat([seams, 1e6 * torch.randn(1000, dtype=dtype)]).to(dtype).unsqueeze(-1)
    wrapped = Torus(1).project(x)
    assert wrapped.abs().max() <= limit
    torch.testing.assert_close(Torus(1).embed(wrapped), Torus(1).embed(x))


def test_angles_rounded_beyond_pi_are_on_the_torus():
    single = torch.tensor([[math.pi]], dtype=torch.float32)
    assert single.double() > math.pi
    assert cnf(1, manifold=Torus(1)).log_prob(single.double()).isfinite()


@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-3, 1.0, math.pi - 1e-3, math.pi])
def test_geodesics_of_the_sphere_are_precise_near_and_at_antipodes(distance):
    x0, ahead = torch.eye(3)[:2]
    x1 = math.cos(distance) * x0 + math.sin(distance) * ahead
    x1 = -x0 if distance == math.pi else x1
    middle, velocity = Sphere(3).geodesic(torch.tensor(0.5), x0.float(), x1.float())
    assert abs(float(velocity.norm()) - distance) < 1e-6
    assert abs(float(middle.norm()) - 1) < 1e-6
    assert abs(float(Sphere(3).distance(x0.float(), middle)) - distance / 2) < 1e-6


def test_divergence_on_the_sphere_is_the_one_in_latitude_and_longitude():
    field, t = tangent(Sphere(3)), torch.tensor(0.3)
    latitude = torch.rand(5).requires_grad_()
    longitude = torch.randn(5).requires_grad_()
    x = on_the_sphere(latitude, longitude)
    north = on_the_sphere(latitude + math.pi / 2, longitude)
    east = on_the_sphere(torch.zeros(5), longitude + math.pi / 2)
    velocity = field(t, x)
    northward, eastward = ((velocity * way).sum(-1) for way in (north, east))
    (up,) = torch.autograd.grad((latitude.cos() * northward).sum(), latitude, retain_graph=True)
    (across,) = torch.autograd.grad(eastward.sum(), longitude)
    expected = (up + across) / latitude.cos()
    divergence = field.velocity_and_divergence(t, x.detach())[1]
    torch.testing.assert_close(divergence, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", ["uniform", "mixture"])
def test_density_on_the_sphere_integrates_to_one(base):
    mixture = VonMisesFisherMixture(Sphere(3), 1)
    mixture.set_components(torch.zeros(1), torch.eye(3)[:1], torch.tensor([[5.0]]))
    flow = cnf(3, manifold=Sphere(3), base=mixture if base == "mixture" else None)
    x, weight = sphere_quadrature()
    with torch.no_grad():
        log_prob = flow.log_prob(x)
    assert log_prob.std() > 0.1
    assert abs(float(weight @ log_prob.exp()) - 1) < 1e-4


def test_density_on_the_torus_integrates_to_one():
    flow = cnf(2, manifold=Torus(2))
    with torch.no_grad():
        log_prob = flow.log_prob(torch.cartesian_prod(angles(), angles()))
    assert log_prob.std() > 0.1
    assert abs(float(log_prob.exp().mean()) * (2 * math.pi) ** 2 - 1) < 1e-4


def test_density_of_an_angle_and_a_number_integrates_to_one():
    flow = cnf(2, manifold=Product([Torus(1), Euclidean(1)]))
    line = torch.linspace(-12, 12, 101)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(angles(), line)).exp().view(40, 101)
    assert abs(float(torch.trapezoid(density, line).mean()) * 2 * math.pi - 1) < 1e-3


def test_a_rotation_keeps_the_uniform_density_and_turns_points():
    turn = LinearField(3)
    generator = torch.tensor([[0.0, -0.3, 0.2], [0.3, 0.0, -0.9], [-0.2, 0.9, 0.0]])
    with torch.no_grad():
        turn.weight.copy_(generator)
    flow = Flow([ContinuousTransform(TangentField(turn, Sphere(3)), solver=PRECISE)])
    assert isinstance(flow.base, UniformOnManifold)
    z = Sphere(3).project(torch.randn(6, 3))
    x, ladj = flow.to_data_and_ladj(z)
    torch.testing.assert_close(x, z @ generator.matrix_exp().T, rtol=0, atol=1e-7)
    torch.testing.assert_close(ladj, torch.zeros(6), rtol=0, atol=1e-12)


@every_manifold
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_are_on_the_manifold_also_by_a_coarse_solver(manifold, dtype):
    flow = cnf(manifold.features, manifold=manifold).to(dtype)
    coarse = flow.using(solver=ODESolver(method="euler", steps=3))
    x = coarse.sample(500, generator=seeded())
    assert manifold.contains(x).all()
    assert (manifold.project(x) - x).abs().max() < 10 * torch.finfo(dtype).eps
    assert coarse.log_prob(x).isfinite().all()


@every_manifold
@pytest.mark.parametrize("way", [(1.0, 0.6, 0.0), (0.0, 0.6, 1.0)], ids=str)
def test_a_trajectory_stays_on_the_manifold_and_ends_where_the_flow_does(manifold, way):
    flow = cnf(manifold.features, manifold=manifold)
    coarse = flow.using(solver=ODESolver(method="euler", steps=3))
    start = manifold.project(3 * torch.randn(50, manifold.features))
    states = coarse.trajectory(start, torch.tensor(way))
    torch.testing.assert_close(states, manifold.project(states), rtol=0, atol=1e-12)
    precise = flow.trajectory(start, torch.tensor(way))[-1]
    end = flow.to_base(start) if way[0] == 1 else flow.to_data(start)
    assert manifold.distance(precise, end).max() < 1e-6


@pytest.mark.parametrize(
    ("manifold", "off"), [(Sphere(3), [1.0, 0.1, 0.0]), (Torus(2), [0.0, 3.2])], ids=str
)
def test_points_off_the_manifold_have_no_density_and_are_refused(manifold, off):
    flow = cnf(manifold.features, manifold=manifold)
    x = torch.tensor([off])
    assert flow.log_prob(x) == -math.inf
    with pytest.raises(ValueError, match=r"x must be on .*; got other values in row 0"):
        flow.to_base(x)
    with pytest.raises(ValueError, match="rows 0, 1"):
        fit(flow, x.expand(20, -1), TrainingConfig(steps=1, progress=False))


@pytest.mark.slow
def test_the_way_around_the_circle_has_no_seam():
    flow = cnf(1, manifold=Torus(1))
    seam = torch.tensor([[-math.pi], [math.pi]])
    first, last = flow.log_prob(seam)
    torch.testing.assert_close(first, last, rtol=0, atol=1e-6)
    t, x0, x1 = torch.rand(1), torch.tensor([[3.0]]), torch.tensor([[-3.0]])
    _, velocity = FlowMatching(flow).path.state_and_velocity(t, x0, x1)
    torch.testing.assert_close(velocity, torch.tensor([[2 * math.pi - 6]]))
    torch.testing.assert_close(flow.distance(seam), torch.zeros(2), rtol=0, atol=1e-6)
    assert certify(flow, seam.expand(2, 1))["round_trip"].verdict == "pass"


def test_only_euclidean_columns_are_standardised():
    manifold = Product([Torus(1), Euclidean(2), Sphere(3)])
    x = torch.cat([torch.rand(50, 1), 5 + 3 * torch.randn(50, 2), torch.randn(50, 3)], -1)
    x = manifold.project(x)
    flow = CNF(6, manifold=manifold)
    flow.initialize(x)
    z = flow.chain[0].to_base(x)
    torch.testing.assert_close(z[:, 1:3].mean(0), torch.zeros(2), rtol=0, atol=1e-9)
    torch.testing.assert_close(z[:, 1:3].std(0), torch.ones(2), rtol=0, atol=1e-9)
    assert torch.equal(z[:, [0, 3, 4, 5]], x[:, [0, 3, 4, 5]])
    assert len(CNF(3, manifold=Sphere(3)).chain) == 1  # nothing to standardise


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNF(2, manifold=Sphere(3)), "features must be the 3 of Sphere"),
        (lambda: CNF(3, manifold=Sphere(3), augment=1), "got augment=1 and transforms to"),
        (lambda: CNF(3, transforms=[Affine(3)], manifold=Sphere(3)), "do not map to the manifold"),
        (lambda: Standardize(2, manifold=Sphere(3)), "features must be the 3 of Sphere"),
        (lambda: CNF(3, manifold=Sphere(3), skip=True), "skip must be None or False with a manif"),
        (lambda: TangentField(LinearField(2), Torus(2)), "must have the 4 embedded_features"),
        (lambda: UniformOnManifold(Euclidean(2)), "manifold must be compact"),
        (lambda: Sphere(1), "features must be at least 2"),
        (lambda: Product([]), "factors must hold at least one"),
        (lambda: ProductBase([HalfNormal(1)]), "each of bases must be on a manifold or on all"),
        (lambda: VonMisesFisherMixture(Sphere(4)), "must be Sphere.3. or a Torus"),
        (lambda: Flow([Affine(3), CNF(3, manifold=Sphere(3)).chain[0]]), "codomain of Affine"),
        (lambda: FlowMatching(CNF(3, manifold=Sphere(3)), LinearPath()), "path must stay on"),
        (lambda: FlowMatching(CNF(3), GeodesicPath(Sphere(3))), "path must stay on.*LinearPath"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_product_takes_a_list_of_manifolds():
    with pytest.raises(TypeError, match=r"factors must be .* got Sphere.* into a list"):
        Product(Sphere(3))
    with pytest.raises(TypeError, match="each of factors must be a Manifold; got int"):
        Product([3])


def test_sizes_may_be_numpy_integers():
    two = np.int64(2)
    manifold = Product([Torus(two), Sphere(two), Euclidean(two)])
    assert repr(manifold) == repr(Product([Torus(2), Sphere(2), Euclidean(2)]))
    assert CNF(6, manifold=manifold).support.manifold == manifold


def test_a_product_of_lines_is_the_space_of_real_vectors():
    flow = Flow([Affine(2)], ProductBase([StandardNormal(1), StandardNormal(1)]))
    x = torch.randn(4, 2)
    torch.testing.assert_close(flow.log_prob(x), Flow([Affine(2)]).log_prob(x))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_calibration")
def test_products_of_products_are_calibrated():
    manifold = Product([Product([Torus(1), Sphere(2)]), Euclidean(1)])
    flow = cnf(4, manifold=manifold)
    x, _ = rows_for(flow, 50)
    expected = flow.log_prob(x)
    flow.calibrate(x)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-3)


def test_bases_side_by_side_keep_the_needs_of_their_parts():
    chart = Flow([Standardize(2), cnf(divergence=Hutchinson()).transforms[0]])
    base = ProductBase([MixtureOfFlows([chart]), UniformOnManifold(Torus(1))])
    flow = Flow([], base)
    assert base.needs_initialization
    assert not base.has_rsample
    x = torch.cat([5 + torch.randn(50, 2), torch.rand(50, 1)], -1)
    flow.initialize(x)
    torch.testing.assert_close(chart.transforms[0].mean, x[:, :2].mean(0))
    first, second = (flow.log_prob(x, generator=seeded()) for _ in range(2))
    assert torch.equal(first, second)


def test_a_saved_flow_keeps_its_manifold(tmp_path):
    manifold = MANIFOLDS["sphere, circle and line"]
    flow = cnf(5, manifold=manifold)
    save(flow, tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors")
    assert again.support.manifold == manifold
    x, _ = rows_for(flow, 4)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))


def narrow(rows):
    """Draws around one place, and their entropy in nats by quadrature."""
    base = VonMisesFisherMixture(Sphere(3), 1)
    base.set_components(torch.zeros(1), torch.eye(3)[2:], torch.tensor([[20.0]]))
    points, weight = sphere_quadrature()
    log_prob = base.log_prob(points)
    x = base.rsample(torch.Size([rows]), generator=seeded())
    return x.float(), -float(weight @ (log_prob.exp() * log_prob))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_calibration")
def test_fit_without_settings_learns_a_density_on_the_sphere_and_certify_agrees():
    x, entropy = narrow(600)
    torch.set_default_dtype(torch.float32)
    flow = CNF(3, manifold=Sphere(3), hidden_features=(16, 16))
    fit(flow, x[:400])
    assert isinstance(flow.base, UniformOnManifold)
    assert flow.accuracy == 1e-3
    error = -flow.log_prob(x[400:]).detach().mean() - entropy
    assert -0.2 < error < 0.3
    assert certify(flow, x[400:440]).passed


class Slipping(TangentField):
    """A field that forgets the curvature of the sphere in its divergence."""

    def _velocity_and_divergence(self, t, x, context):
        velocity, divergence = super()._velocity_and_divergence(t, x, context)
        return velocity, divergence + 2 * (x * self.vector_field._velocity(t, x, context)).sum(-1)


@pytest.mark.slow
def test_certify_finds_a_divergence_that_is_not_the_one_on_the_sphere():
    inner = LinearField(3)
    with torch.no_grad():
        inner.weight.copy_(0.2 * torch.eye(3) + 0.3 * torch.randn(3, 3))
    right, wrong = TangentField(inner, Sphere(3)), Slipping(inner, Sphere(3))
    x = Sphere(3).project(torch.randn(20, 3))
    solver = ODESolver(method="rk4", steps=20)
    flows = [Flow([ContinuousTransform(field, solver=solver)]) for field in (right, wrong)]
    assert [certify(flow, x)["integral"].verdict for flow in flows] == ["pass", "fail"]
