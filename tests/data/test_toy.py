import math
from functools import cache

import pytest
import torch
from scipy import stats

from cnf.data.curves import NoisyCircles, NoisyCurves, TwoSpirals
from cnf.data.toy import TOY_NAMES, GaussianMixture, Pinwheel, toy_density

# Nearest-neighbour estimates (Kozachenko-Leonenko, k = 5) from a million points of FFJORD's
# formulas written in numpy; standard error and bias together below 0.005.
ENTROPIES = {
    "swissroll": 2.6687,
    "circles": 3.2681,
    "rings": 2.6190,
    "moons": 2.3927,
    "8gaussians": 2.8305,
    "pinwheel": 2.3162,
    "2spirals": 2.6435,
    "checkerboard": math.log(32),
}
EYE = torch.eye(2)[None]
SMOOTH = [name for name in TOY_NAMES if name != "checkerboard"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def midpoints(extent, cells):
    left, right, bottom, top = extent
    middles = (torch.arange(cells) + 0.5) / cells
    return torch.cartesian_prod(left + (right - left) * middles, bottom + (top - bottom) * middles)


@cache
def probabilities_of_cells(name):
    density = toy_density(name)
    left, right, bottom, top = density.extent
    area = (right - left) * (top - bottom) / 120**2
    return density.log_prob(midpoints(density.extent, 120)).exp().reshape(120, 120) * area


@cache
def entropy_of(name):
    return toy_density(name).entropy()


@pytest.mark.parametrize("name", TOY_NAMES)
def test_density_integrates_to_one_over_its_extent(name):
    assert float(probabilities_of_cells(name).sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", TOY_NAMES)
def test_counts_of_samples_follow_the_density(name):
    density = toy_density(name)
    left, right, bottom, top = density.extent
    x = density.sample(50000, generator=seeded())

    expected = 50000 * probabilities_of_cells(name).reshape(20, 6, 20, 6).sum(dim=(1, 3)).flatten()
    column = (20 * (x[:, 0] - left) / (right - left)).floor().clamp(0, 19).long()
    row = (20 * (x[:, 1] - bottom) / (top - bottom)).floor().clamp(0, 19).long()
    counts = torch.bincount(20 * column + row, minlength=400).double()

    # Cells too rare for the chi-square limit are pooled, and the pool judged by its deviation.
    rare = expected < 10
    chi_square = float(((counts - expected).square() / expected)[~rare].sum())
    assert stats.chi2.sf(chi_square, df=int((~rare).sum()) - 1) > 1e-3
    pool = float(expected[rare].sum())
    assert abs(float(counts[rare].sum()) - pool) <= 5 * max(1, pool) ** 0.5


@pytest.mark.parametrize("name", SMOOTH)
def test_entropy_is_the_mean_of_minus_log_prob(name):
    density = toy_density(name)

    surprise = -density.log_prob(density.sample(5000, generator=seeded(1)))

    standard_error = float(surprise.std()) / 5000**0.5
    assert float(surprise.mean()) == pytest.approx(entropy_of(name), abs=4 * standard_error)


@pytest.mark.parametrize("name", TOY_NAMES)
def test_entropy_agrees_with_nearest_neighbours_of_ffjords_points(name):
    assert entropy_of(name) == pytest.approx(ENTROPIES[name], abs=0.006)


@pytest.mark.parametrize("name", ["swissroll", "moons", "2spirals"])
def test_twice_the_nodes_change_nothing(name):
    density = toy_density(name)
    nodes = 2 * density.nodes
    if name == "2spirals":
        finer = TwoSpirals(nodes=nodes)
    else:
        finer = NoisyCurves(density.curves, density.noise, nodes=nodes)
    samples = density.sample(1000, generator=seeded())
    grid = midpoints(density.extent, 40)

    torch.testing.assert_close(
        density.log_prob(samples), finer.log_prob(samples), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(density.log_prob(grid), finer.log_prob(grid), rtol=0, atol=1e-4)


def polar(angle):
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def centres_and_noise(name):
    u = (torch.arange(2000) + 0.5) / 2000
    circle, half, t = polar(2 * math.pi * u), polar(math.pi * u), 1.5 * math.pi * (1 + 2 * u)
    if name == "circles":
        return 3 * torch.cat((circle, circle / 2)), 3 * 0.08
    if name == "rings":
        return 3 * torch.cat((circle, 0.75 * circle, 0.5 * circle, 0.25 * circle)), 0.08
    if name == "swissroll":
        return t[:, None] * polar(t) / 5, 1 / 5
    if name == "moons":
        moons = torch.cat((half, torch.tensor([1.0, 0.5]) - half))
        return 2 * moons + torch.tensor([-1.0, -0.2]), 2 * 0.1
    return 4 * polar(math.pi / 4 * torch.arange(8)) / 1.414, 0.5 / 1.414


@pytest.mark.parametrize("name", ["circles", "rings", "swissroll", "moons", "8gaussians"])
def test_blurred_sets_are_mixtures_of_many_gaussians(name):
    centres, noise = centres_and_noise(name)
    density = toy_density(name)
    x = midpoints(density.extent, 15)

    squares = ((x[:, None] - centres) / noise).square().sum(dim=-1)
    expected = (-squares / 2).logsumexp(dim=-1) - math.log(len(centres) * 2 * math.pi * noise**2)

    torch.testing.assert_close(density.log_prob(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [0.3, 1, 4, 7, 30, 1000])
def test_two_spirals_hold_near_and_far(scale):
    x = scale * torch.tensor([[1.0, 0.3], [-0.2, 0.7], [-0.5, -0.9], [1.0, 0.0]])
    n = 3 * math.pi * (torch.arange(20000) + 0.5) / 20000
    middles = torch.stack((-n * n.cos(), n * n.sin()), dim=-1) / 3
    terms = []
    for arm in (x, -x):
        # In the lower tail the difference does not cancel.
        upper, lower = (arm[:, None] - middles) / 0.1, (arm[:, None] - middles - 0.5 / 3) / 0.1
        flip = upper + lower > 0
        upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
        upper, lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
        between = upper + torch.log1p(-torch.exp(lower - upper))
        terms.append((between + math.log(6)).sum(dim=-1) + n.log().log_softmax(dim=0))

    expected = torch.cat(terms, dim=-1).logsumexp(dim=-1) - math.log(2)

    torch.testing.assert_close(TwoSpirals().log_prob(x), expected, rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("name", SMOOTH)
def test_log_prob_is_finite_however_far_away(name):
    x = torch.randn(200, 2, generator=seeded()) * torch.logspace(-6, 6, 200)[:, None]

    assert toy_density(name).log_prob(x).isfinite().all()
    assert toy_density(name).log_prob(torch.zeros(2)).isfinite()


def pinwheel_map(f, blade):
    angle = 2 * math.pi * blade / 5 + 0.25 * f[0].exp()
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).reshape(2, 2)
    return 2 * f @ turn


@cache
def pinwheel_points_and_terms():
    mean, std = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.3, 0.1]).double()
    f = mean + std * torch.randn(2000, 2, generator=seeded(), dtype=torch.float64)
    blade = torch.arange(2000, dtype=torch.float64) % 5
    x = torch.func.vmap(pinwheel_map)(f, blade)
    jacobian = torch.func.vmap(torch.func.jacrev(pinwheel_map))(f, blade)
    normal = torch.distributions.Normal(mean, std).log_prob(f).sum(dim=-1)
    return x, normal - torch.linalg.slogdet(jacobian).logabsdet - math.log(5)


def test_pinwheel_is_at_least_the_term_of_the_blade_it_came_from():
    x, term = pinwheel_points_and_terms()

    assert (Pinwheel().log_prob(x) >= term - 1e-9).all()


def test_pinwheel_is_that_term_alone_where_blades_do_not_overlap():
    x, term = pinwheel_points_and_terms()

    excess = Pinwheel().log_prob(x) - term

    assert float((excess.abs() < 1e-6).double().mean()) > 0.8


def test_pinwheel_is_alike_in_every_blade():
    x = Pinwheel().sample(500, generator=seeded())
    angle = torch.tensor(2 * math.pi / 5)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).reshape(2, 2)

    torch.testing.assert_close(Pinwheel().log_prob(x @ turn), Pinwheel().log_prob(x))


def test_checkerboard_is_its_dark_squares():
    dark = torch.tensor([[0.5, 0.5], [-1, -1], [-3, 1], [1, -3], [3, 3], [-3.9, -3.9]])
    light = torch.tensor([[1.0, 3.0], [-1, 1], [3, 1], [4.1, 3], [3, 4.1], [-4.1, -3], [5, 5]])
    edges = torch.tensor([[0.0, 0.0], [4, 3], [-4, -3], [2, 3], [2, 2], [-4, -4], [1, 2]])

    torch.testing.assert_close(
        toy_density("checkerboard").log_prob(torch.cat((dark, edges))),
        torch.full((13,), -math.log(32)),
    )
    assert (toy_density("checkerboard").log_prob(light) == -math.inf).all()
    assert toy_density("checkerboard").log_prob(torch.tensor([4.0, 1.0])) == -math.inf


def test_checkerboard_holds_its_samples_in_every_dtype():
    x = toy_density("checkerboard").sample(20000, generator=seeded())

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert toy_density("checkerboard").log_prob(x.to(dtype)).isfinite().all()


def random_mixture(features):
    means = 2 * torch.randn(3, features, generator=seeded(5))
    roots = torch.randn(3, features, features, generator=seeded(6))
    covariances = roots @ roots.mT + 0.1 * torch.eye(features)
    return means, covariances, torch.tensor([0.5, 0.2, 0.3])


@pytest.mark.parametrize("features", [1, 2, 5])
def test_gaussian_mixture_agrees_with_torch(features):
    means, covariances, weights = random_mixture(features)
    expected = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights),
        torch.distributions.MultivariateNormal(means, covariances),
    )
    x = 3 * torch.randn(4, 7, features, generator=seeded())

    mixture = GaussianMixture(means, covariances, weights)

    torch.testing.assert_close(mixture.log_prob(x), expected.log_prob(x))
    torch.testing.assert_close(
        GaussianMixture(means, covariances, 7 * weights).log_prob(x), mixture.log_prob(x)
    )
    samples = mixture.sample(20000, generator=seeded())
    errors = 4 * (expected.variance / 20000).sqrt()
    assert ((samples.mean(dim=0) - expected.mean).abs() < errors).all()
    torch.testing.assert_close(samples.var(dim=0), expected.variance, rtol=0.05, atol=0)


@pytest.mark.parametrize("features", [1, 2, 5])
def test_entropy_of_a_mixture_is_the_mean_of_minus_log_prob(features):
    mixture = GaussianMixture(*random_mixture(features))

    surprise = -mixture.log_prob(mixture.sample(100000, generator=seeded(2)))

    error = float(surprise.std()) / 100000**0.5
    assert mixture.entropy() == pytest.approx(float(surprise.mean()), abs=4 * error + 0.008)


def test_entropy_of_one_gaussian_is_closed_form():
    means, covariances, _ = random_mixture(5)
    expected = torch.distributions.MultivariateNormal(means[0], covariances[0]).entropy()

    assert GaussianMixture(means[:1], covariances[:1]).entropy() == pytest.approx(float(expected))


def test_extent_of_a_mixture_follows_each_feature():
    mixture = GaussianMixture(
        torch.tensor([[0.0, 0.0, 7.0]]), torch.diag(torch.tensor([1.0, 4.0, 0.01]))[None]
    )

    assert mixture.extent == pytest.approx((-5, 5, -10, 10, 6.5, 7.5))


@pytest.mark.parametrize("name", TOY_NAMES)
def test_seeds_make_samples(name):
    density = toy_density(name)
    state = torch.get_rng_state()

    first = density.sample(50, generator=seeded(3))

    assert torch.equal(first, density.sample(50, generator=seeded(3)))
    assert not torch.equal(first, density.sample(50, generator=seeded(4)))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    assert torch.equal(first, density.sample(50))


@pytest.mark.parametrize("name", TOY_NAMES)
def test_shapes_and_dtypes(name):
    density = toy_density(name)
    x = density.sample(600, generator=seeded())
    expected = density.log_prob(x)
    torch.set_default_dtype(torch.float32)

    assert density.features == 2
    assert density.sample(3).dtype == torch.float32
    assert density.sample(0).shape == (0, 2)
    assert density.log_prob(x[:0]).shape == (0,)
    in_blocks = density.log_prob(x.reshape(30, 20, 2))
    torch.testing.assert_close(in_blocks, expected.reshape(30, 20), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(density.log_prob(x[0]), expected[0], rtol=1e-12, atol=1e-12)
    assert density.log_prob(x.float()).dtype == torch.float32
    torch.testing.assert_close(density.log_prob(x.float()), expected.float(), rtol=0, atol=1e-4)


def test_names_are_ffjords():
    assert TOY_NAMES == (
        "swissroll",
        "circles",
        "rings",
        "moons",
        "8gaussians",
        "pinwheel",
        "2spirals",
        "checkerboard",
    )
    with pytest.raises(ValueError, match=r"name must be one of swissroll, .*; got 'spiral'"):
        toy_density("spiral")


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[0.0, 0.0]], TypeError, r"x must be a torch\.Tensor; got list"),
        (torch.zeros(3, 2, dtype=torch.long), ValueError, "x must have a floating dtype"),
        (torch.zeros(3, 5), ValueError, r"x must have shape \(\*batch, 2\); got \(3, 5\)"),
        (torch.tensor([[0.0, 0.0], [math.nan, 0.0]]), ValueError, "x must be finite.* row 1"),
        (torch.tensor([[0.0, math.inf]]), ValueError, "x must be finite.* row 0"),
    ],
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_points_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        toy_density("moons").log_prob(x)


@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_numbers_of_points_are_refused():
    with pytest.raises(ValueError, match="n must be at least 0; got -1"):
        toy_density("moons").sample(-1)
    with pytest.raises(TypeError, match=r"n must be an int; got 2\.5"):
        toy_density("moons").sample(2.5)


@pytest.mark.parametrize(
    ("means", "covariances", "weights", "message"),
    [
        (torch.zeros(2), EYE, None, r"means must have shape \(components, features\)"),
        (torch.zeros(0, 2), torch.zeros(0, 2, 2), None, r"means must have .*; got \(0, 2\)"),
        (torch.zeros(1, 2).long(), EYE, None, "means must have a floating dtype; got torch.int64"),
        (torch.zeros(1, 2), torch.eye(3)[None], None, r"covariances must have shape \(1, 2, 2\)"),
        (torch.zeros(1, 2), math.nan * EYE, None, "covariances must be finite"),
        (torch.zeros(1, 2), -EYE, None, "positive definite; component 0"),
        (torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0, 1]]]), None, "must be symmetric"),
        (torch.zeros(1, 2), EYE, torch.ones(2), r"weights must have shape \(1\); got \(2,\)"),
        (torch.zeros(1, 2), EYE, -torch.ones(1), "weights must be at least 0"),
        (torch.zeros(1, 2), EYE, torch.zeros(1), "not all 0"),
    ],
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_mixtures_are_refused(means, covariances, weights, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(means, covariances, weights)


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_mixture_of_lists_is_refused():
    with pytest.raises(TypeError, match=r"means must be a torch\.Tensor; got list"):
        GaussianMixture([[0.0, 0.0]], EYE)


def test_bad_curves_are_refused():
    with pytest.raises(ValueError, match="curves must hold at least one curve"):
        NoisyCurves([], 0.1)
    with pytest.raises(ValueError, match="noise must be positive and finite; got 0"):
        NoisyCurves(toy_density("moons").curves, 0.0)
    with pytest.raises(ValueError, match="nodes must be at least 1; got 0"):
        TwoSpirals(nodes=0)
    with pytest.raises(ValueError, match="radii must be at least one number, none negative"):
        NoisyCircles([1.0, -1.0], 0.1)
    with pytest.raises(ValueError, match="noise must be positive and finite; got nan"):
        NoisyCircles([1.0], math.nan)
