"""Laws of columns with a support: the densities they give, and what lies outside."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import LogNormal, Normal, TransformedDistribution, constraints, transforms
from zoo import cnf, perturbed, seeded

from cnf import CNF, Flow, Hutchinson, Standardize, TrainingConfig, fit
from cnf.bases import StandardNormal
from cnf.manifolds import Euclidean, Product, Torus
from cnf.transforms import Affine, Logit, Unconstrain, transforms_for
from cnf.transforms.support.unconstrain import rarest_place

CIRCLE = 2 * math.pi


def sigmoid_of_a_normal(low, high):
    return TransformedDistribution(
        Normal(0.0, 1.0),
        [transforms.SigmoidTransform(), transforms.AffineTransform(low, high - low)],
    )


def test_positive_numbers_have_the_density_of_a_log_normal():
    x = torch.randn(50, 1).exp() * 3
    found = Flow([Unconstrain(["positive"])]).log_prob(x)
    torch.testing.assert_close(found, LogNormal(0.0, 1.0).log_prob(x[:, 0]), rtol=0, atol=1e-12)


def test_numbers_of_an_interval_have_the_density_of_a_logit_normal():
    x = 2 + 5 * torch.rand(50, 1)
    found = Flow([Unconstrain([("interval", 2, 7)])]).log_prob(x)
    expected = sigmoid_of_a_normal(2.0, 7.0).log_prob(x[:, 0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [-1.0, 0.3, 2.5, 3.0])
def test_a_circle_is_an_interval_from_the_cut_once_around(cut):
    flow = Flow([Unconstrain([("periodic", -1, 3, cut)])])
    x = -1 + 4 * torch.rand(50, 1)
    after_cut = torch.where(x > cut, x, x + 4)[:, 0]
    expected = sigmoid_of_a_normal(cut, cut + 4).log_prob(after_cut)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-9)
    ends = flow.log_prob(torch.tensor([[-1.0], [3.0]]))
    assert ends[0] == ends[1]
    draws = flow.sample(500, generator=seeded())
    assert flow.support.check(draws).all()
    assert draws.max() - draws.min() > 3


CIRCLES = [("circle", 0, 24), "positive", ("circle", -1, 1)]


def test_a_circle_becomes_an_angle_of_a_flow_on_a_manifold():
    x = torch.tensor([[0.0, 1.0, -1.0], [24.0, 1.0, 1.0], [18.0, 2.0, 0.5]])
    transform = Unconstrain(CIRCLES)
    z, ladj = transform.to_base_and_ladj(x)
    angles = [[-math.pi, -math.pi], [math.pi, math.pi], [math.pi / 2, math.pi / 2]]
    torch.testing.assert_close(z[:, [0, 2]], torch.tensor(angles))
    expected = math.log(CIRCLE / 24) + math.log(CIRCLE / 2) - x[:, 1].log()
    torch.testing.assert_close(ladj, expected)
    assert transform.codomain.manifold == Product([Torus(1), Euclidean(1), Torus(1)])
    assert Unconstrain([("circle", 0, 1)] * 2).codomain.manifold == Torus(2)
    uniform = Flow([Unconstrain([("circle", 0, 24)])])
    torch.testing.assert_close(uniform.log_prob(x[:, :1]), torch.full((3,), -math.log(24.0)))


def test_the_density_of_a_circle_has_no_seam_and_integrates_to_one():
    hours = torch.linspace(0, 24, 401).unsqueeze(-1)
    transforms = transforms_for(24 * torch.rand(50, 1), [("circle", 0, 24)])
    flow = cnf(1, transforms=transforms)
    with torch.no_grad():
        density = flow.log_prob(hours).exp()
    assert density.max() > 1.1 * density.min()
    torch.testing.assert_close(density[0], density[-1], rtol=1e-6, atol=0)
    slopes = (density[1] - density[0], density[-1] - density[-2])
    torch.testing.assert_close(*slopes, rtol=0.05, atol=1e-6)
    assert abs(float(torch.trapezoid(density, hours[:, 0])) - 1) < 1e-4
    draws = flow.sample(500, generator=seeded())
    assert flow.support.check(draws).all()
    assert draws.max() - draws.min() > 23


def test_what_follows_a_circle_must_be_on_its_manifold():
    circle = Unconstrain([("circle", 0, 24), "real"])
    for make in (
        lambda: Flow([circle], StandardNormal(2)),
        lambda: Flow([circle, Affine(2)]),
        lambda: Flow([circle, cnf(2, manifold=Torus(2)).chain[-1]]),
        lambda: Flow([Unconstrain(["real", "positive"]), *cnf(2, transforms=[circle]).chain[1:]]),
    ):
        with pytest.raises(ValueError, match="must have its density within the codomain of"):
            make()
    with pytest.raises(ValueError, match="do not map to the manifold, must be left out with Torus"):
        CNF(2, transforms=[circle], manifold=Torus(2))


def test_angles_of_a_table_are_not_standardised():
    x = torch.cat([3 + torch.rand(50, 1), 7 + 2 * torch.rand(50, 1)], -1)
    unconstrain, standardize = transforms_for(x, [("circle", 0, 24), "positive"])
    z = Flow([unconstrain, standardize]).to_base(x)
    torch.testing.assert_close(z[:, 0], math.pi * (x[:, 0] / 12 - 1))
    torch.testing.assert_close(z[:, 1].mean(), torch.tensor(0.0), rtol=0, atol=1e-9)


def test_integers_have_a_bound_of_their_probability():
    flow = Flow([Unconstrain(["integer"]), perturbed(Affine(1))])
    x = torch.arange(-3.0, 3.0).unsqueeze(-1)
    affine = flow.chain[-1]
    normal = Normal(affine.loc, affine.log_scale.exp())
    truth = (normal.cdf(x + 1) - normal.cdf(x))[:, 0]
    with torch.no_grad():
        bound = flow.log_prob(x.expand(20_000, 6, 1))
    weights = bound.exp()
    assert (bound.mean(0) < truth.log() + 4 * bound.std(0) / 20_000**0.5).all()
    assert ((weights.mean(0) - truth).abs() < 4 * weights.std(0) / 20_000**0.5).all()
    assert flow.likelihood == "lower_bound"


def test_noise_stays_between_integers_of_either_sign():
    x = torch.arange(-8192.0, 8192, dtype=torch.float32).repeat(10).unsqueeze(-1)
    transform = Unconstrain(["integer"])
    z, ladj = transform.to_base_and_ladj(x)
    assert torch.equal(transform.to_data(z), x)
    assert (ladj == 0).all()
    noise = (z.double() - x.double()).flatten()
    assert (noise.mean() - 0.5).abs() < 4 * (1 / 12 / len(noise)) ** 0.5
    assert (noise.var() - 1 / 12).abs() < 4 * (1 / 180 / len(noise)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "column",
    [
        "positive",
        ("interval", 0, 1),
        ("interval", 1000, 1001),
        ("interval", -1, 1e-30),
        ("interval", 0, 1e-20),
        ("periodic", 0, 360, 359.9),
        ("periodic", -math.pi, math.pi),
        ("periodic", 1e5, 1e5 + 1, 1e5 + 0.3),
        ("circle", 0, 360),
        ("circle", 1e5, 1e5 + 1),
    ],
    ids=str,
)
def test_whatever_is_drawn_is_inside_and_has_a_density(dtype, column):
    transform = Unconstrain([column])
    z = torch.tensor([-1e4, -200.0, -20.0, -1.0, 0.0, 1.0, 20.0, 200.0, 1e4], dtype=dtype)
    x, ladj = transform.to_data_and_ladj(z.unsqueeze(-1))
    assert transform.support.check(x).all()
    assert ladj.isfinite().all()
    again, ladj = transform.to_base_and_ladj(x)
    assert again.isfinite().all()
    assert ladj.isfinite().all()


COLUMNS = ["real", "positive", ("interval", 0, 1), ("periodic", 0, 24, 3), "integer"]
INSIDE = [-1e6, 2.0, 0.5, 24.0, -7.0]
OUTSIDE = [
    (1, 0.0, "numbers greater than 0 in column 1"),
    (1, -2.0, "numbers greater than 0 in column 1"),
    (2, 0.0, "strictly between 0 and 1 in column 2"),
    (2, 1.0, "strictly between 0 and 1 in column 2"),
    (2, 1.5, "strictly between 0 and 1 in column 2"),
    (3, -0.1, "numbers from 0 to 24 in column 3"),
    (3, 24.1, "numbers from 0 to 24 in column 3"),
    (4, 0.5, "integers in column 4"),
]


@pytest.mark.parametrize(("column", "value", "message"), OUTSIDE)
def test_what_is_outside_is_refused_by_column_but_has_density_zero(column, value, message):
    x = torch.tensor([INSIDE, INSIDE, INSIDE])
    x[1, column] = value
    transform = Unconstrain(COLUMNS)
    flow = Flow([transform])
    for refuses in (transform.to_base, flow.to_base, flow.to_base_and_ladj):
        with pytest.raises(ValueError, match=rf"x must be {message}; got other values in row 1\."):
            refuses(x)
    assert flow.log_prob(x).isneginf().tolist() == [False, True, False]
    assert flow.support.check(x).tolist() == [True, False, True]


def test_a_message_names_every_column_that_is_wrong_and_no_other():
    x = torch.tensor([[*INSIDE[:4], 0.5], [-1.0, -1.0, 0.5, 24.0, 0.0]])
    message = "x must be numbers greater than 0 in column 1, integers in column 4; got other values"
    with pytest.raises(ValueError, match=message):
        Unconstrain(COLUMNS).to_base(x)


FLOWS_WITH_SUPPORT = {
    "unconstrain": lambda: cnf(transforms=[Unconstrain(["positive", ("interval", -1, 1)])]),
    "with context": lambda: cnf(2, 3, transforms=[Unconstrain(["positive", ("interval", -1, 1)])]),
    "logit": lambda: cnf(transforms=[Logit(2)]),
}
with_support = pytest.mark.parametrize("make", FLOWS_WITH_SUPPORT.values(), ids=FLOWS_WITH_SUPPORT)


@with_support
def test_rows_outside_leave_the_others_as_they_are(make):
    flow = make()
    x = torch.rand(2, 3, 2).requires_grad_()
    context = torch.randn(3, 3) if flow.context_features else None
    inside = torch.tensor([[True, False, True], [False, False, True]])
    mixed = torch.where(inside.unsqueeze(-1), x, -7.0)

    found = flow.log_prob(mixed, context)
    assert found.shape == (2, 3)
    assert (found.isneginf() == ~inside).all()
    expected = flow.log_prob(x, context)[inside]
    torch.testing.assert_close(found[inside], expected, rtol=0, atol=1e-6)

    parameters = [x, *flow.parameters()]
    gradients = torch.autograd.grad(found[inside].sum(), parameters)
    plain = torch.autograd.grad(expected.sum(), parameters)
    torch.testing.assert_close(gradients, plain, rtol=0, atol=1e-5)


@with_support
def test_batches_of_any_shape_may_be_outside(make):
    flow = make()
    context = torch.randn(3) if flow.context_features else None
    for batch in ((), (1,), (4,), (2, 3)):
        found = flow.log_prob(torch.full((*batch, 2), -7.0), context)
        assert found.shape == batch
        assert found.isneginf().all()
    contexts = torch.randn(5, 1, 3) if flow.context_features else None
    x = torch.tensor([[0.5, 0.5], [-7.0, 0.5]])
    found = flow.log_prob(x, contexts)
    assert found.shape == ((5, 2) if flow.context_features else (2,))
    assert found[..., 0].isfinite().all()
    assert found[..., 1].isneginf().all()


def test_the_standard_error_of_density_zero_is_zero():
    flow = FLOWS_WITH_SUPPORT["unconstrain"]().using(divergence=Hutchinson(probes=3))
    log_prob, error = flow.log_prob_and_error(torch.tensor([[1.0, 0.5], [-1.0, 0.5]]))
    assert log_prob[0].isfinite()
    assert log_prob[1].isneginf()
    assert error[0] > 0
    assert error[1] == 0


def test_bounds_and_distributions_know_density_zero_too():
    flow = cnf(transforms=[Unconstrain(["integer", "positive"])])
    x = torch.tensor([[1.0, 0.5], [0.5, 0.5], [2.0, -1.0]])
    outside = [False, True, True]
    assert flow.log_prob(x, importance_samples=3).isneginf().tolist() == outside
    distribution = flow()
    assert distribution.log_prob(x).isneginf().tolist() == outside
    assert distribution.expand((2, 3)).log_prob(x).isneginf().tolist() == [outside, outside]


def test_nan_and_infinity_are_refused_as_ever():
    flow = FLOWS_WITH_SUPPORT["unconstrain"]()
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="x must be finite; got NaN or inf in row 0"):
            flow.log_prob(torch.tensor([[value, 0.0]]))


def test_data_to_train_on_must_be_inside():
    flow = FLOWS_WITH_SUPPORT["unconstrain"]()
    x = torch.rand(20, 2)
    config = TrainingConfig(steps=1, progress=False)
    for data, validation, name in ((-x, x, "data"), (x, -x, "validation")):
        with pytest.raises(ValueError, match=f"{name} must be numbers greater than 0 in column 0"):
            fit(flow, data, config, validation=validation)


def table(rows=400):
    """One column of each kind; the angles lie around 0."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(rows, 5, generator=generator)
    columns = [
        3 * normal[:, 0] + 10,
        (2 * normal[:, 1]).exp(),
        normal[:, 2].sigmoid(),
        (0.3 * normal[:, 3]).remainder(CIRCLE),
        (4 * normal[:, 4]).round(),
    ]
    return torch.stack(columns, -1)


KINDS = ["real", "positive", ("interval", 0, 1), ("periodic", 0, CIRCLE), "integer"]


def test_a_table_reaches_the_ode_standardised():
    x = table()
    parts = transforms_for(x, KINDS)
    assert [type(part) for part in parts] == [Unconstrain, Standardize]
    z = Flow(parts).to_base(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(5), rtol=0, atol=0.02)
    torch.testing.assert_close(z.std(0), torch.ones(5), rtol=0, atol=0.02)
    cut = parts[0].columns[3][3]
    assert abs(cut - math.pi) < 1.5
    assert z[:, 3].abs().max() < 5
    assert Flow(parts).support.check(Flow(parts).sample(1000)).all()


def test_the_transforms_of_a_table_are_always_the_same():
    first, second = (transforms_for(table(), KINDS) for _ in range(2))
    assert first[0].columns == second[0].columns
    assert torch.equal(first[1].mean, second[1].mean)


def test_real_columns_are_only_standardised():
    x = torch.randn(50, 2)
    (part,) = transforms_for(x, ["real", "real"])
    assert torch.equal(part.mean, Standardize.from_data(x).mean)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_with_supports_can_be_trained_on(dtype):
    x = table().to(dtype)
    flow = CNF(5, transforms=transforms_for(x.double(), KINDS), hidden_features=(8, 8)).to(dtype)
    fit(flow, x, TrainingConfig(steps=2, progress=False))
    assert flow.log_prob(x[:5]).isfinite().all()


@pytest.mark.parametrize("centre", [0.0, 1.0, 11.9])
def test_a_circle_is_cut_opposite_to_a_single_hump(centre):
    hump = (centre + torch.randn(2000)).remainder(12)
    cut = rarest_place(hump, 0.0, 12.0)
    assert abs((cut - centre) % 12 - 6) < 2.5


def test_a_circle_is_cut_where_rounded_data_are_rarest_and_between_them():
    hours = torch.arange(24.0).repeat_interleave(
        torch.tensor([9] * 12 + [8, 7, 5, 3, 2, 1, 2, 3, 5, 7, 8, 9])
    )
    cut = rarest_place(hours, 0.0, 24.0)
    assert 16 <= cut <= 18
    assert cut % 1 == 0.5


def test_a_circle_of_one_value_is_cut_opposite():
    assert rarest_place(torch.full((3,), 3.0), 0.0, 8.0) == 7.0


def test_a_single_value_in_a_desert_does_not_draw_the_cut():
    values = torch.cat([torch.linspace(0, 5, 100), torch.tensor([8.0])])
    cut = rarest_place(values, 0.0, 10.0)
    assert 5.5 < cut < 9.5
    assert (values - cut).abs().min() > 0.6


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("x", "support", "message"),
    [
        (torch.randn(5, 2), ["real"], r"got 1 and x of shape \(5, 2\)"),
        (torch.randn(5), ["real"] * 5, r"got 5 and x of shape \(5,\)"),
        (torch.ones(5, 1), ["positive"], r"vary in every feature; it is constant in \[0\]"),
        (-torch.rand(5, 1), ["positive"], r"x must be numbers greater than 0 in column 0"),
        (1e6 * torch.ones(5, 1, dtype=torch.float32), ["integer"], "finer dtype .* up to 1e"),
        (torch.tensor([[-3e38], [3e38]], dtype=torch.float32), ["real"], r"too large in \[0\]"),
    ],
)
def test_tables_that_do_not_fit_are_refused(x, support, message):
    with pytest.raises(ValueError, match=message):
        transforms_for(x, support)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    "column",
    [
        "Real",
        "interval",
        ("interval", 0),
        ("interval", 1, 0),
        ("interval", 0, 0),
        ("circle", 1, 0),
        ("circle", 0, math.inf),
        ("circle", 0, 1, 0.5),
        ("interval", 0, math.inf),
        ("interval", math.nan, 1),
        ("interval", "0", "1"),
        ("positive", 1),
        ("periodic", 0, 1, 2),
        None,
        3,
        ["real", ["real"]],
    ],
    ids=str,
)
def test_other_supports_are_refused(column):
    with pytest.raises(ValueError, match=r"each column must be 'real'.*for column 1\."):
        Unconstrain(["real", column])


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_support_alone_is_no_list():
    for columns in ("real", None, 3):
        with pytest.raises(TypeError, match="columns must be a list with one entry for each"):
            Unconstrain(columns)


def test_the_settings_are_shown():
    assert repr(Unconstrain(["real", ["interval", 0, 1]])) == (
        "Unconstrain(columns=['real', ('interval', 0, 1)])"
    )
    assert isinstance(Unconstrain(["real"]).support, constraints.Constraint)


def test_bounds_may_be_numbers_of_numpy(shapes_unchecked):
    columns = [("interval", np.int64(0), np.int64(5)), ("periodic", np.float32(0), np.float64(24))]
    x = torch.tensor([[1.0, 3.0], [4.5, 20.0]])
    expected = Unconstrain([("interval", 0, 5), ("periodic", 0, 24)]).to_base(x)
    assert {type(entry) for column in Unconstrain(columns).columns for entry in column} == {
        str,
        float,
    }
    assert torch.equal(Unconstrain(columns).to_base(x), expected)
