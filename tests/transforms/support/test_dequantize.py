"""Laws of discrete and of bounded data: bounds of probabilities, and what is refused."""

import math

import pytest
import torch
from scipy.stats import kstest
from torch.distributions import Normal, Uniform

from cnf import Flow
from cnf.transforms import Affine, Dequantize, Logit, Permute


def probability_of_each_integer(flow, levels):
    """Of one feature, by the cumulative distribution of the affine flow's Gaussian."""
    affine = flow.chain[-1]
    edges = torch.arange(levels + 1) / levels
    below = Normal(affine.loc, affine.log_scale.exp()).cdf(edges)
    return below.diff()


def small_flow(levels=4):
    """Gaussian noise of one feature, centred and wide enough to cover the unit interval."""
    affine = Affine(1)
    with torch.no_grad():
        affine.loc.fill_(0.45)
        affine.log_scale.fill_(math.log(0.3))
    return Flow([Dequantize(1, levels), affine])


def test_log_prob_is_a_bound_of_the_log_probability_of_the_integers():
    flow = small_flow()
    truth = probability_of_each_integer(flow, 4).log()
    x = torch.arange(4.0).unsqueeze(-1)
    with torch.no_grad():
        bound = flow.log_prob(x.expand(20_000, 4, 1))
    assert (bound.mean(0) < truth + 4 * bound.std(0) / 20_000**0.5).all()
    weights = bound.exp()
    assert ((weights.mean(0) - truth.exp()).abs() < 4 * weights.std(0) / 20_000**0.5).all()


def test_the_ladj_is_the_log_volume_of_a_cell():
    ladj = Dequantize(3, 256).to_base_and_ladj(torch.zeros(2, 3))[1]
    torch.testing.assert_close(ladj, torch.full((2,), -3 * math.log(256)))


def test_noise_is_uniform_in_the_cell_of_each_integer():
    x = torch.tensor([0.0, 3.0, 6.0]).expand(4000, 3)
    noise = 7 * Dequantize(3, 7).to_base(x) - x
    assert ((noise >= 0) & (noise < 1)).all()
    assert (noise.mean() - 0.5).abs() < 4 * (1 / 12 / noise.numel()) ** 0.5
    assert (noise.var() - 1 / 12).abs() < 4 * (1 / 180 / noise.numel()) ** 0.5


def test_no_integer_is_rounded_into_the_next_in_single_precision():
    levels = 200  # not a power of 2, so dividing and multiplying rounds too
    x = torch.arange(levels, dtype=torch.float32).expand(5000, levels)
    dequantize = Dequantize(levels, levels)
    assert torch.equal(dequantize.to_data(dequantize.to_base(x)), x)


def test_draws_are_integers_whatever_the_base_gives():
    flow = Flow([Dequantize(2, 3)])
    x = flow.sample(1000)
    assert set(x.unique().tolist()) == {0.0, 1.0, 2.0}
    assert flow.log_prob(x).isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.05])
def test_logit_gives_the_density_of_a_logistic_variable(alpha):
    """A uniform variable is the sigmoid of a logistic one."""
    x = torch.rand(50, 3)
    z, ladj = Logit(3, alpha=alpha).to_base_and_ladj(x)
    log_logistic = (-z - 2 * torch.nn.functional.softplus(-z)).sum(-1)
    uniform = Uniform(-alpha / (1 - 2 * alpha), 1 + alpha / (1 - 2 * alpha)).log_prob(x).sum(-1)
    torch.testing.assert_close(log_logistic + ladj, uniform, rtol=0, atol=1e-9)


def test_draws_beyond_the_unit_interval_have_a_density():
    flow = Flow([Logit(1, alpha=0.2)])
    x = flow.sample(1000)
    assert (x < 0).any()
    assert (x > 1).any()
    assert flow.log_prob(x).isfinite().all()


NOT_LEVELS = [
    (torch.tensor([[0.0, 1.0], [0.0, 0.5]]), "row 1"),
    (torch.tensor([[0.0, 4.0], [-1.0, 0.0]]), "rows 0, 1"),
    (torch.tensor([256.0, 0.0]), "the only row"),
]


@pytest.mark.parametrize(("x", "rows"), NOT_LEVELS)
@pytest.mark.parametrize("part", [Dequantize(2, 4), Flow([Permute([1, 0]), Dequantize(2, 4)])])
def test_what_is_no_level_is_refused(part, x, rows):
    with pytest.raises(ValueError, match=f"integers from 0 to 3; got other values in {rows}"):
        part.to_base_and_ladj(x)


@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize("value", [-0.1, 1.1, 255.0])
def test_what_is_out_of_bounds_is_refused(alpha, value):
    x = torch.tensor([[0.5, 0.5], [0.5, value]])
    for part in (Logit(2, alpha=alpha), Flow([Logit(2, alpha=alpha)])):
        with pytest.raises(ValueError, match=r"x must be .* got other values in row 1\. Resc"):
            part.to_base(x)


def test_without_alpha_the_ends_of_the_interval_are_outside():
    flow, x = Flow([Logit(1, alpha=0.0)]), torch.tensor([[0.0], [0.5], [1.0]])
    with pytest.raises(ValueError, match="strictly between 0 and 1; got other values in rows 0, 2"):
        flow.to_base(x)
    assert flow.log_prob(x).isneginf().tolist() == [True, False, True]


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Dequantize(2, 1), ValueError, "levels must be at least 2; got 1"),
        (lambda: Dequantize(2, 256.0), TypeError, "levels must be an int; got 256.0"),
        (lambda: Logit(2, alpha=0.5), ValueError, "less than 0.5; got 0.5"),
        (lambda: Logit(2, alpha=-0.1), ValueError, "at least 0 and less than 0.5; got -0.1"),
        (lambda: Logit(2, alpha=math.nan), ValueError, "got nan"),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.05, 0.0, 1e-6])
def test_whatever_logit_gives_has_a_logit(dtype, alpha):
    logit = Logit(5, alpha=alpha)
    z = torch.tensor([-1e4, -40.0, -17.0, 17.0, 1e4], dtype=dtype)
    x, ladj = logit.to_data_and_ladj(z)
    back, _ = logit.to_base_and_ladj(x)
    assert back.isfinite().all()
    assert logit.support.check(x)
    assert ladj.isfinite()
    assert (back.sign() == z.sign()).all()


@pytest.mark.parametrize(("dtype", "levels"), [(torch.float32, 65536), (torch.float64, 2**20)])
def test_noise_stays_between_its_levels(dtype, levels):
    dequantize = Dequantize(20_000, levels)
    x = torch.randint(levels, (20_000,)).to(dtype)
    x[-1] = levels - 1
    z, _ = dequantize.to_base_and_ladj(x)
    assert (dequantize.to_data(z) == x).all()
    noise = (z.double() * levels - x.double()).numpy()
    assert kstest(noise, "uniform", (0, 1)).pvalue > 1e-3


def test_a_dtype_too_coarse_for_the_noise_is_refused():
    for dtype, levels in ((torch.bfloat16, 256), (torch.float16, 1024)):
        with pytest.raises(ValueError, match=f"x must have a finer dtype than {dtype}"):
            Dequantize(3, levels).to_base(torch.zeros(3, dtype=dtype))
