"""Laws of surjections: exact ones have the mass 1, symmetric ones are symmetric, bad z is told."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal
from zoo import cnf, distances, perturbed, seeded

from cnf import Flow, TrainingConfig, fit
from cnf.baselines import build
from cnf.bases import ConditionalNormal, HalfNormal, OrderedNormal, StandardNormal
from cnf.saving import load, save
from cnf.transforms import (
    Abs,
    Affine,
    Augment,
    ConditionalAffine,
    Inverse,
    LogGaps,
    Maximum,
    MaxPool2d,
    MLPFunnel,
    Round,
    Slice,
    Sort,
    Transform,
    TransformedBase,
    Unconstrain,
)


@torch.no_grad()
def mass(flow, reach, features, points=401):
    """Integral of the density over an interval or a square."""
    side = torch.linspace(-reach, reach, points)
    x = torch.cartesian_prod(*[side] * features).reshape(-1, features)
    return float(flow.log_prob(x).exp().sum() * (side[1] - side[0]) ** features)


def gaussian_slice(covariance, kept):
    """The slice by the true conditional of a centred Gaussian, and the base of what it keeps."""
    gain = covariance[kept:, :kept] @ covariance[:kept, :kept].inverse()
    rest = covariance[kept:, kept:] - gain @ covariance[:kept, kept:]
    dropped = ConditionalNormal(len(rest), kept, hidden_features=())
    with torch.no_grad():
        dropped.network[0].weight[: len(rest)] = gain
        dropped.network[0].bias[len(rest) :] = 0.5 * rest.diagonal().log()
    return Slice(len(covariance), kept, dropped=dropped)


EXACT = {
    "absolute values": (1, lambda: Flow([perturbed(Affine(1)), Abs(1)], HalfNormal(1))),
    "absolute values of two": (2, lambda: Flow([perturbed(Affine(2)), Abs(2)], HalfNormal(2))),
    "sort": (2, lambda: Flow([perturbed(Affine(2)), Sort(2)], OrderedNormal(2))),
    "sort and gaps": (2, lambda: Flow([Sort(2), LogGaps(2), perturbed(Affine(2))])),
    "maximum": (2, lambda: Flow([perturbed(Affine(2)), Maximum(2)])),
    "conditional maximum": (2, lambda: Flow([Maximum(2, offsets=distances(1, 1))])),
    "slice": (
        2,
        lambda: Flow(
            [perturbed(Slice(2, 1, dropped=ConditionalNormal(1, 1, hidden_features=(3,))))]
        ),
    ),
    "slice by a flow": (
        2,
        lambda: Flow(
            [Slice(2, 1, dropped=Flow([perturbed(ConditionalAffine(1, 1))], StandardNormal(1)))]
        ),
    ),
}


@pytest.mark.parametrize("name", [name for name in EXACT if name != "sort and gaps"])
def test_an_exact_surjection_has_the_mass_one(name):
    torch.manual_seed(1)
    features, make = EXACT[name]
    flow = make()
    assert flow.likelihood == "exact"
    # A grid is coarse at a pole, and where the density jumps. Gaps have a tail beyond any grid.
    assert mass(flow, 12.0, features, 1201) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("name", EXACT)
def test_draws_have_the_density(name):
    """E[q / p] = 1 under p, for a narrow normal density q."""
    torch.manual_seed(1)
    flow = EXACT[name][1]()
    x, log_prob = flow.sample_and_log_prob((20_000,), generator=seeded())
    torch.testing.assert_close(log_prob, flow.log_prob(x).detach())
    q = Normal(x.median(0).values, 0.3)
    ratio = (q.log_prob(x).sum(-1) - log_prob).exp()
    error = ratio.std() / len(ratio) ** 0.5
    assert abs(ratio.mean() - 1) < 4 * error  # 4 standard errors: 6e-5
    assert error < 0.1


@pytest.mark.slow
def test_sorting_is_invariant_to_the_order_of_points_and_absolute_values_to_signs():
    flow = cnf(6, transforms=[Sort(6, point_features=2), LogGaps(6, point_features=2)])
    x = torch.randn(5, 6)
    for order in itertools.permutations(range(3)):
        other = x.unflatten(-1, (3, 2))[:, list(order)].flatten(-2)
        torch.testing.assert_close(flow.log_prob(other), flow.log_prob(x))
    flow = cnf(6, transforms=[Abs(6), Unconstrain(["positive"] * 6)])
    torch.testing.assert_close(flow.log_prob(x.abs()), flow.log_prob(x))


class NotANumber(Transform):
    """Its last feature is NaN where it is above 1."""

    def _to_base(self, x, context, generator):
        bad = torch.nn.functional.pad(x[..., -1:] > 1, (x.shape[-1] - 1, 0))
        return x.masked_fill(bad, math.nan), x.new_zeros(x.shape[:-1])

    def _to_data(self, z, context, generator):
        return z, z.new_zeros(z.shape[:-1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Slice(2, 1),
        lambda: Slice(2, 1, dropped=Flow([Affine(1)])),
        lambda: MLPFunnel(2, 1, dropped=Flow([Unconstrain(["real"]), Affine(1)])),
        lambda: Maximum(2),
    ],
)
def test_a_dropped_feature_that_is_no_number_is_an_error(make):
    flow = Flow([NotANumber(2), make()])
    x = torch.tensor([[0.0, 0.5], [0.0, 2.0]])
    assert flow.log_prob(x[:1]).isfinite()
    with pytest.raises(ValueError, match="row 1"):
        flow.log_prob(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zeros_and_ties_stay_within_a_positive_support(dtype):
    positive = Unconstrain(["positive"])
    flows = [
        Flow([Abs(1), positive]),
        Flow([Sort(2), LogGaps(2)]),
        Flow([Maximum(2, offsets=Flow([positive, Affine(1)]))]),
    ]
    for flow in flows:
        x = torch.zeros(3, flow.features, dtype=dtype)
        assert flow.to(dtype).log_prob(x).isfinite().all()
        z = flow.to_base(x)
        torch.testing.assert_close(flow.to_base(flow.to_data(z)), z)


def test_sorted_normals_are_normals():
    flow = Flow([Sort(6, point_features=2)], OrderedNormal(6, point_features=2))
    x = torch.randn(5, 6)
    torch.testing.assert_close(flow.log_prob(x), StandardNormal(6).double().log_prob(x))


def test_the_maximum_of_two_normals_has_its_closed_form():
    """By the density of the larger z, 2 N(z) Phi(z), and of the other one below it."""
    x = torch.randn(50, 2)
    z, ladj = Maximum(2, offsets=HalfNormal(1)).to_base_and_ladj(x)
    offset = x.amax(-1) - x.amin(-1)
    expected = math.log(2) + Normal(0.0, 1.0).log_prob(offset) - math.log(2)
    torch.testing.assert_close((z[:, 0], ladj), (x.amax(-1), expected))


def test_max_pooling_is_that_of_torch():
    x = torch.randn(3, 2, 4, 6)
    pool = MaxPool2d((2, 4, 6))
    expected = nn.functional.max_pool2d(x, 2)
    torch.testing.assert_close(pool.to_base(x.flatten(1)), expected.flatten(1))
    assert pool.pooled_shape == expected.shape[1:]


def test_the_place_of_a_maximum_is_uniform():
    pool = MaxPool2d((1, 2, 2))
    x = pool.to_data(torch.zeros(8000, 1), generator=seeded())
    counts = x.argmax(-1).bincount(minlength=4)
    assert (counts - 2000).abs().max() < 4 * (8000 * 0.25 * 0.75) ** 0.5


def test_a_slice_of_a_gaussian_is_the_gaussian():
    factor = torch.randn(3, 3)
    covariance = factor @ factor.T + torch.eye(3)
    part = gaussian_slice(covariance, 2)
    part.dropped.double()
    scale = torch.linalg.cholesky(covariance[:2, :2])
    x = torch.randn(50, 3)
    z, ladj = part.to_base_and_ladj(x)
    found = MultivariateNormal(torch.zeros(2), scale_tril=scale).log_prob(z) + ladj
    expected = MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_inverse_of_a_slice_is_augmentation():
    augment = perturbed(Augment(2, 3, 1, hidden_features=(4,)))
    inverse = Inverse(Slice(5, 2, 1, dropped=augment.q))
    x, context = torch.randn(5, 2), torch.randn(5, 1)
    found = inverse.to_base_and_ladj(x, context, generator=seeded())
    torch.testing.assert_close(found, augment.to_base_and_ladj(x, context, generator=seeded()))
    torch.testing.assert_close(
        inverse.to_data_and_ladj(found[0], context), augment.to_data_and_ladj(found[0], context)
    )
    assert (inverse.likelihood, inverse.base_features) == ("lower_bound", 5)


@pytest.mark.parametrize("make", [lambda: Abs(2), lambda: Sort(2), lambda: Affine(2)])
def test_the_inverse_of_the_inverse_is_the_transform(make):
    part = perturbed(make())
    twice = Inverse(Inverse(part))
    x = torch.randn(5, 2)
    z, ladj = part.to_base_and_ladj(x)
    torch.testing.assert_close(twice.to_base_and_ladj(x), (z, ladj))
    found = twice.to_data_and_ladj(z, generator=seeded())
    torch.testing.assert_close(found, part.to_data_and_ladj(z, generator=seeded()))
    for name in ("likelihood", "is_bijective", "stochastic_to_data", "stochastic_to_base"):
        assert getattr(twice, name) == getattr(part, name)


def folded(x):
    return (Normal(0.5, 1.0).log_prob(x).exp() + Normal(0.5, 1.0).log_prob(-x).exp()).log()[..., 0]


def of_integers(x):
    return (Normal(0.5, 1.0).cdf(x + 1) - Normal(0.5, 1.0).cdf(x)).log()[..., 0]


def of_sorted(x):
    """Three independent normals with means of 0, 1 and 2, in any order."""
    orders = torch.tensor(list(itertools.permutations(range(3))))
    each = Normal(torch.arange(3.0).double(), 1.0).log_prob(x[..., orders]).sum(-1)
    return each.logsumexp(-1)


def moved(loc):
    affine = Affine(len(loc))
    with torch.no_grad():
        affine.loc.copy_(torch.tensor(loc))
    return affine


BOUNDS = {
    "absolute values": (lambda: Flow([Inverse(Abs(1)), moved([0.5])]), folded, [1.2]),
    "rounding": (lambda: Flow([Inverse(Round(1)), moved([0.5])]), of_integers, [1.0]),
    "sorting": (
        lambda: Flow([Inverse(Sort(3)), moved([0.0, 1.0, 2.0])]),
        of_sorted,
        [-0.3, 0.5, 2.0],
    ),
}


@pytest.mark.parametrize(("make", "marginal", "x"), BOUNDS.values(), ids=BOUNDS)
def test_the_bound_of_an_inverse_lies_below_the_marginal_and_rises(make, marginal, x):
    flow, x = make(), torch.tensor(x)
    truth, gaps = marginal(x), []
    for count in (1, 4, 64):
        with torch.no_grad():
            bound = flow.log_prob(x.expand(4000, -1), importance_samples=count, generator=seeded())
        gap = truth - bound
        error = gap.std() / 4000**0.5
        assert gap.mean() > -4 * error  # 4 standard errors: 3e-5
        gaps.append((gap.mean(), error))
    for (looser, first), (tighter, second) in itertools.pairwise(gaps):
        assert tighter < looser - 4 * math.hypot(first, second)
    assert gaps[-1][0] < 0.1 * gaps[0][0]


def test_a_nested_conditional_flow_is_initialised_with_a_context_of_its_own_size():
    dropped = build("realnvp", 2, 5, size=4)
    flow = Flow([Slice(4, 2, 3, dropped=dropped)])
    assert flow.transforms.needs_initialization
    x, context = torch.randn(50, 4), 3 + 2 * torch.randn(50, 3)
    flow.initialize(x, context)
    assert not flow.transforms.needs_initialization
    part = flow.transforms[0]
    assert isinstance(part.dropped, TransformedBase)
    torch.testing.assert_close(part.context_scaling.mean, context.mean(0))
    for scaling in (m for m in part.dropped.modules() if hasattr(m, "context_features")):
        assert scaling.context_features in (0, 5)


def test_an_augment_of_an_older_file_has_the_numbers_that_it_had():
    """Before the network of q was that of a ConditionalNormal."""
    part = perturbed(Augment(2, 1, hidden_features=(4,)))
    older = {name.removeprefix("q."): value for name, value in part.state_dict().items()}
    new = Augment(2, 1, hidden_features=(4,))
    new.load_state_dict(older)
    x = torch.randn(5, 2)
    found = new.to_base_and_ladj(x, generator=seeded())
    torch.testing.assert_close(found, part.to_base_and_ladj(x, generator=seeded()))


def test_a_slice_by_a_flow_is_saved_as_a_base(tmp_path):
    flow = Flow([Slice(4, 2, dropped=perturbed(build("realnvp", 2, 2, size=4), 0.1))])
    save(flow, tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors")
    x = torch.randn(5, 4)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))


@pytest.mark.slow
def test_absolute_values_learn_four_corners_from_one():
    """As well as from four times as many rows of the corner."""
    signs = torch.randint(0, 2, (400, 2), generator=seeded()) * 2 - 1
    x = signs * (2 + 0.3 * torch.randn(400, 2, generator=seeded()))
    flow = Flow([Abs(2), Unconstrain(["positive", "positive"]), Affine(2)])
    fit(flow, x, TrainingConfig(steps=200, learning_rate=0.05, progress=False), validation=None)
    truth = Normal(2.0, 0.3).log_prob(x.abs()).sum(-1) - math.log(4)
    assert (truth - flow.log_prob(x)).mean() < 0.05


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Inverse(Abs(2)).to_base(torch.tensor([[1.0, 2.0], [1.0, -3.0]])),
            ValueError,
            r"at least 0 for Abs .* got \[1.0, -3.0\] in row 1.* Take absolute values",
        ),
        (
            lambda: Inverse(Sort(2)).to_base(torch.tensor([[2.0, 1.0]])),
            ValueError,
            r"in ascending order for Sort .* got \[2.0, 1.0\] in row 0.*Sort these rows",
        ),
        (
            lambda: Inverse(Round(1)).to_base(torch.tensor([0.5])),
            ValueError,
            r"integers for Round .* got \[0.5\] in the only row",
        ),
        (
            lambda: Flow([Inverse(Sort(2))]).to_base(torch.tensor([[2.0, 1.0]])),
            ValueError,
            "x must be numbers in ascending order; got other values in row 0",
        ),
        (lambda: Sort(3, point_features=2), ValueError, "must divide the 3 features; got 2"),
        (lambda: Slice(2, 2), ValueError, "kept must be less than the 2 features; got 2"),
        (lambda: Slice(3, 1, dropped=StandardNormal(1)), ValueError, "the 2 features that Slice"),
        (
            lambda: Slice(3, 1, dropped=ConditionalNormal(2, 3)),
            ValueError,
            "context_features=1 for Slice.* got 3",
        ),
        (lambda: Slice(3, 1, dropped=nn.Linear(1, 2)), TypeError, "or a Flow; got Linear"),
        (
            lambda: Slice(3, 1, dropped=Flow([Augment(2, 1)])),
            ValueError,
            "exact likelihood.* 'lower_bound'",
        ),
        (lambda: Maximum(1), ValueError, "features must be at least 2; got 1"),
        (
            lambda: Maximum(3, offsets=StandardNormal(2)),
            ValueError,
            "must have its density on .* for Maximum.* at least 0 HalfNormal",
        ),
        (lambda: Slice(3, 1, dropped=HalfNormal(2)), ValueError, "ConditionalNormal for real"),
        (lambda: MaxPool2d((1, 3, 4)), ValueError, "the last two even; got"),
        (lambda: Inverse(nn.Linear(2, 2)), TypeError, "transform must be a Transform"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
