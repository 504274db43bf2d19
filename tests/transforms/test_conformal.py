"""Laws of conformal maps and the surfaces they make, and of densities on these."""

import math

import pytest
import torch
from torch import Tensor, nn
from zoo import CONFORMAL_MAPS, cnf, conformal_embedding, perturbed, seeded

from cnf import CNF, Flow, MaximumLikelihood, Standardize, certify
from cnf.bases import StandardNormal
from cnf.flows import MixtureOfFlows
from cnf.objectives import ManifoldLikelihood
from cnf.transforms import (
    Affine,
    Augment,
    Chain,
    ConformalEmbedding,
    Flatten,
    Orthogonal,
    Permute,
    PiecewiseConformal,
    Similarity,
    SpecialConformal,
    Transform,
    TransformedBase,
)

MAPS = {
    **CONFORMAL_MAPS,
    "orthogonal": lambda: perturbed(Orthogonal(3)),
    "permutation": lambda: Permute([2, 0, 1]),
    "all of them": lambda: Chain(make() for make in CONFORMAL_MAPS.values()),
}


def gram(move, point: Tensor) -> Tensor:
    """The matrix J^T J of the Jacobian of a map."""
    jacobian = torch.autograd.functional.jacobian(move, point)
    return jacobian.mT @ jacobian


def surface_flow(features: int = 3, base_features: int = 2) -> Flow:
    """A flow on a curved surface."""
    torch.manual_seed(0)
    embedding = conformal_embedding(features, base_features)
    return Flow([embedding, perturbed(Affine(base_features), 0.2)])


@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("direction", ["to_base", "to_data"])
def test_a_conformal_map_stretches_all_directions_alike(make, direction):
    transform = make()
    assert all(part.is_conformal for part in transform.modules() if type(part) is not Chain)
    for point in torch.randn(5, 3):
        found = gram(getattr(transform, direction), point)
        _, ladj = getattr(transform, f"{direction}_and_ladj")(point)
        expected = torch.eye(3) * (2 * ladj / 3).exp()
        torch.testing.assert_close(found / expected[0, 0], torch.eye(3), rtol=0, atol=1e-9)


def test_the_ladj_of_an_embedding_is_that_of_its_gram_matrix():
    embedding = conformal_embedding(4, 2)
    for z in torch.randn(5, 2):
        x, ladj = embedding.to_data_and_ladj(z)
        expected = 0.5 * torch.linalg.slogdet(gram(embedding.to_data, z)).logabsdet
        torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(embedding.to_base(x), z, rtol=0, atol=1e-9)


def test_a_special_conformal_map_takes_a_plane_to_a_sphere():
    special = SpecialConformal(3)
    with torch.no_grad():
        special.b.copy_(torch.tensor([0.0, 0.0, 0.5]))
    plane = torch.cat([3 * torch.randn(50, 2), torch.zeros(50, 1)], -1)
    distance = (special.to_data(plane) - torch.tensor([0.0, 0.0, -1.0])).norm(dim=-1)
    torch.testing.assert_close(distance, torch.ones(50), rtol=0, atol=1e-12)


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4])
@torch.no_grad()
def test_a_special_conformal_map_is_precise_near_the_point_that_goes_to_infinity(distance):
    """In single precision, up to the rounding of that distance."""
    special = SpecialConformal(3)
    special.b.copy_(torch.tensor([0.3, -0.4, 1.2]))
    pole = special.b / special.b.square().sum()
    z = pole + distance * nn.functional.normalize(torch.randn(200, 3), dim=-1)
    expected, expected_ladj = special.to_data_and_ladj(z.float().double())
    x, ladj = special.float().to_data_and_ladj(z.float())
    rounding = 20 * torch.finfo(torch.float32).eps / distance
    torch.testing.assert_close(ladj.double(), expected_ladj, rtol=0, atol=3 * rounding)
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=rounding * float(x.abs().max()))
    back, ladj_back = special.to_base_and_ladj(x)
    torch.testing.assert_close(back, z.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ladj_back, -ladj, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_density_on_a_curve_integrates_to_one_by_arc_length():
    flow = surface_flow(2, 1)
    u = torch.linspace(-12, 12, 200_001).unsqueeze(-1)
    x = flow.transforms[0].to_data(u)
    length = x.diff(dim=0).norm(dim=-1)
    jump = length > 0.01  # where the two rotations tear the curve
    middle = flow.transforms[0].to_data((u[1:] + u[:-1]) / 2)
    mass = (flow.log_prob(middle).exp() * length)[~jump].sum()
    assert 0 < int(jump.sum()) <= 2
    assert float(mass) == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_the_density_on_a_surface_integrates_to_one_by_the_area_of_triangles():
    embedding = ConformalEmbedding(
        [perturbed(Similarity(3)), perturbed(Orthogonal(3)), perturbed(SpecialConformal(3))], 2
    )
    flow = Flow([embedding, perturbed(Affine(2), 0.2)])
    side = torch.linspace(-8, 8, 401)
    x = embedding.to_data(torch.cartesian_prod(side, side)).view(401, 401, 3)
    right, up = x[1:, :-1] - x[:-1, :-1], x[:-1, 1:] - x[:-1, :-1]
    area = torch.linalg.cross(right, up).norm(dim=-1)
    middles = torch.cartesian_prod(*2 * [(side[1:] + side[:-1]) / 2])
    density = flow.log_prob(embedding.to_data(middles)).exp().view(400, 400)
    assert float((density * area).sum()) == pytest.approx(1, abs=2e-3)


def test_a_row_off_the_surface_has_a_distance_and_no_density():
    flow = Flow([ConformalEmbedding([Similarity(3)], 2)])
    x = torch.randn(4, 3)
    x[:, 2] = torch.tensor([0.0, 0.5, 0.0, -2.0])
    torch.testing.assert_close(flow.distance(x), x[:, 2].abs())
    with pytest.raises(ValueError, match=r"up to 2 in rows 1, 3\. Ask for the density of the proj"):
        flow.log_prob(x)
    projected = flow.to_data(flow.to_base(x))
    expected = StandardNormal(2).log_prob(x[:, :2])
    torch.testing.assert_close(flow.log_prob(projected), expected)
    torch.testing.assert_close(flow.distance(x[0]), torch.zeros(()))
    with pytest.raises(ValueError, match="x must lie on the surface"):
        Flow([*flow.transforms, Augment(2, 1)]).log_prob(x)


def test_a_flow_that_covers_space_has_distance_zero():
    assert cnf().distance(torch.randn(5, 2)).max() < 1e-6
    assert Flow([Flatten((1, 2)), Affine(2)]).distance(torch.randn(5, 1, 2)).shape == (5,)


def test_the_loss_is_the_density_of_the_projection_and_the_squared_distance():
    flow = Flow([conformal_embedding(), *cnf(context_features=2).transforms])
    x, context = torch.randn(6, 3), torch.randn(6, 2)
    objective = ManifoldLikelihood(flow, weight=3.0, solver=flow.only_ode.solver)
    projected = flow.to_data(flow.to_base(x, context), context)
    expected = -flow.log_prob(projected, context) + 3 * flow.distance(x, context).square()
    torch.testing.assert_close(objective(x, context), expected.mean(), rtol=0, atol=1e-6)
    weighted = objective(x, context, weight=2.0 * (torch.arange(6) < 3))
    torch.testing.assert_close(weighted, expected[:3].mean(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_flow_finds_the_circle_of_its_data():
    torch.manual_seed(0)
    angle = 0.5 * torch.randn(500)
    x = torch.stack([2 * angle.cos(), 2 * angle.sin() + 1], -1)
    flow = Flow([ConformalEmbedding([Similarity(2), Orthogonal(2), SpecialConformal(2)], 1)])
    objective = ManifoldLikelihood(Flow([*flow.transforms, Affine(1)]), weight=1000.0)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        objective(x).backward()
        optimizer.step()
    assert objective.flow.distance(x).square().mean().sqrt() < 0.02


class Circle(Transform):
    """A circle of radius 2, by the tangent of half of the angle; right or wrong."""

    base_features = 1

    def __init__(self, wrong):
        super().__init__(2)
        self.wrong = wrong

    def _to_base(self, x, context, generator):
        z = x[..., 1:] / (2 + x[..., :1])
        return z * (1.1 if self.wrong == "inverse" else 1), -self._stretch(z)

    def _to_data(self, z, context, generator):
        square = z.square()
        x = torch.cat([(1 - square), 2 * z], -1) * 2 / (1 + square)
        return x, self._stretch(z)

    def _stretch(self, z):
        stretch = math.log(4) - z.square().squeeze(-1).log1p()
        return stretch * (2 if self.wrong == "ladj" else 1)


@pytest.mark.parametrize(
    ("wrong", "fails"),
    [(None, set()), ("ladj", {"ladj"}), ("inverse", {"round_trip", "sampled_log_prob"})],
)
def test_a_wrong_surface_is_found(wrong, fails):
    flow = Flow([Circle(wrong), perturbed(Affine(1), 0.1)])
    report = certify(flow, torch.randn(100, 2), generator=seeded())
    assert {check.name for check in report.checks if check.verdict == "fail"} >= fails
    assert report.passed == (not fails), report
    assert report["integral"].verdict == "skip"
    assert report["round_trip"].meaning.startswith("largest error of z -> x -> z")


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConformalEmbedding([Affine(3)], 2), "conformal maps of vectors.*got Affine"),
        (lambda: ConformalEmbedding([Flatten((1, 3))], 2), "got Flatten"),
        (lambda: ConformalEmbedding([Similarity(3)], 3), "base_features must be .* 2; got 3"),
        (lambda: Flow([Standardize(3), conformal_embedding()]), "must stand first of the"),
        (
            lambda: Flow([Affine(3)], MixtureOfFlows([Flow([conformal_embedding()])])),
            "flows must have densities in all of space",
        ),
        (
            lambda: Flow([Affine(3)], TransformedBase([conformal_embedding()])),
            "must cover all of space.*into the flow",
        ),
        (lambda: MaximumLikelihood(surface_flow()), r"with ManifoldLikelihood\(flow\)"),
        (
            lambda: surface_flow().rsample_and_log_weight(lambda x: -x.square().sum(-1), 5),
            "flow must have a density in all of space.*'on_manifold'",
        ),
        (lambda: ManifoldLikelihood(CNF(2)), "likelihood is 'exact'. Use MaximumLikelihood"),
        (lambda: ManifoldLikelihood(surface_flow(), weight=-1.0), "weight must be finite"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_new_maps_are_the_identity():
    x = torch.randn(5, 3)
    for each in (Similarity, SpecialConformal, PiecewiseConformal):
        torch.testing.assert_close(each(3).to_data(x), x)
    assert isinstance(SpecialConformal(3).b, nn.Parameter)
