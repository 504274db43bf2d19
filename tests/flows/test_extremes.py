"""Laws of numbers at the ends of the range: a right number, a density of 0, or an error of ours."""

import math
import re
from functools import partial

import pytest
import torch
from zoo import (
    ESTIMATES,
    EVERY_FLOW,
    TRANSFORMS,
    base_rows_for,
    fitting_flow,
    lipschitz,
    perturbed,
    rows_for,
    seeded,
)

from cnf import (
    CNF,
    Flow,
    FlowMatching,
    MaximumLikelihood,
    ODEError,
    ODESolver,
    TrainingConfig,
    TrainingError,
    fit,
)
from cnf.transforms import Affine, ExactLipschitz, Planar, Radial

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

GRID = ODESolver(method="midpoint", steps=1, gradient="backprop")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
EVERY = {**TRANSFORMS, **ESTIMATES}
OURS = r"(finite|NaN or inf|fixed-point iteration of a ResidualFlow|lie on the surface).* rows? "


def rows_at(size, dtype, shape):
    """Rows of one number each, of either sign."""
    size = torch.finfo(dtype).tiny * size if size < 1 else size
    return torch.tensor([size, -size], dtype=dtype).reshape(-1, *[1] * len(shape)).expand(2, *shape)


SIZES = [0, 1 / 8, 1 - 1e-9, 1e10, 1e20, 3e38]
"""Those below 1 are in units of the least normal number."""


UNBOUNDED = {
    "torch": "the exponential of 1e10 is infinite",
    "augment learnt": "the standard deviation is the exponential of what is affine in x",
    "augment learnt with context": "the same",
    "factor out of an augmented part": "the same",
    "augmented with context": "the same",
    "augmented without context in a conditional flow": "the same",
    "augmented inside": "the same",
    "inverse augmentation": "the same",
    "inverse slice with context": "the same",
    "convolutional funnel": "the same",
    "convolutional funnel with context": "the same",
    "funnel": "the same",
    "funnel with context": "the same",
    "funnelled": "the same",
    "maximum with context": "the same",
    "max pooling": "the same",
    "slice": "the same",
    "slice with context": "the same",
    "slice by a flow with context": "the same",
    "sliced with context": "the same",
    "sliced by a flow with context": "the same",
    "autoencoder": "the same",
    "autoencoder with context": "the same",
    "dequantized and sliced": "the same",
    "logarithms of gaps": "the exponential of 1e10 is infinite",
    "inverse": "the same",
    "sorted and an ODE": "the same",
}
"""What has no finite value at 1e10, and why; everything else has one, and at smaller sizes."""


def answer(call, *, required):
    """What a call returns, or None where it says in our words, with the row, why it cannot."""
    try:
        return call()
    except (ValueError, RuntimeError) as error:
        if required or not re.search(OURS, str(error)):
            raise
        return None


def obeys(name, flow, dtype):
    flow = flow.to(dtype).using(solver=GRID)
    _, context = rows_for(flow, 2)
    context = None if context is None else context.to(dtype)
    for size in SIZES:
        required = size < 1 or (size <= 1e10 and name not in UNBOUNDED)
        answered = partial(answer, required=required)
        x = rows_at(size, dtype, flow.event_shape)
        has_density = flow.likelihood != "on_manifold"
        log_prob = answer(
            lambda x=x: flow.log_prob(x, context, generator=seeded()),
            required=required and has_density,
        )
        if log_prob is not None:
            assert not log_prob.isnan().any()
            assert not (log_prob == math.inf).any()
        z = rows_at(size, dtype, (flow.base.features,))
        if flow.support.check(x).all():
            moved = answered(lambda x=x: flow.to_base(x, context, generator=seeded()))
            assert moved is None or moved.isfinite().all()
            z = z if moved is None else torch.cat([z, moved])
        for each in z.split(2):
            if flow.chain.codomain is not None and not flow.chain.codomain.check(each).all():
                continue
            made = answered(lambda z=each: flow.to_data_and_ladj(z, context, generator=seeded()))
            if made is not None:
                assert made[0].isfinite().all()
                assert not made[1].isnan().any()


@DTYPES
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_every_transform_gives_finite_numbers_or_says_why_not(name, dtype):
    obeys(name, fitting_flow(EVERY[name]()), dtype)


@pytest.mark.parametrize("name", EVERY_FLOW)
@torch.no_grad()
def test_every_flow_gives_finite_numbers_or_says_why_not(name):
    obeys(name, EVERY_FLOW[name](), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e10), (torch.float64, 1e150)], ids=str
)
@pytest.mark.parametrize("name", [name for name in EVERY if name not in UNBOUNDED])
def test_derivatives_far_away_are_finite(name, dtype, size):
    flow = fitting_flow(EVERY[name]()).to(dtype).using(solver=GRID)
    x, context = rows_for(flow, 2)
    context = None if context is None else context.to(dtype)
    parameters = [part for part in flow.parameters() if part.requires_grad]
    moves = {"to_data_and_ladj": base_rows_for(flow.chain, 2)}
    if flow.support.check(size * x).all():
        moves["to_base_and_ladj"] = x
    for move, rows in moves.items():
        rows[1] = 1.0  # whose features differ by nothing but rounding, after a layer
        far = (size * rows).to(dtype).requires_grad_()
        moved, ladj = getattr(flow.chain[0], move)(far, context, generator=seeded())
        for each in (*moved.flatten(1).unbind(-1), ladj):
            if each.requires_grad:
                found = torch.autograd.grad(
                    each.sum(), [far, *parameters], retain_graph=True, allow_unused=True
                )
                assert all(part.isfinite().all() for part in found if part is not None)


CLOSED = {
    "planar": lambda: perturbed(Planar(3)),
    "radial": lambda: perturbed(Radial(3)),
    "exact lipschitz": lambda: lipschitz(3, hidden_features=()),
}


@pytest.mark.parametrize("make", CLOSED.values(), ids=CLOSED)
@pytest.mark.parametrize("size", [1e10, 1e19, 1e20, 1e30, 1e37])
def test_far_away_single_precision_gives_what_double_does_and_finite_gradients(make, size):
    x = size * torch.tensor([[1.0, -0.5, 0.3], [-1.0, 1.0, 1.0]])
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(1)
        transform = make().to(dtype)
        rows = x.to(dtype, copy=True).requires_grad_()
        z, ladj = transform.to_base_and_ladj(rows)
        gradients = torch.autograd.grad(
            (z / size).sum() + ladj.sum(), [rows, *transform.parameters()], allow_unused=True
        )
        back = transform.to_data(z.detach())
        assert all(part.isfinite().all() for part in gradients if part is not None)
        made = (z / size, ladj, back / size)
        found.append([part.detach().double() for part in made])
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-5)


def test_a_radial_flow_far_away_is_its_limit():
    transform = perturbed(Radial(3)).float()
    x = torch.tensor([[3e38, -3e38, 3e38], [1e20, 0.0, 0.0]], dtype=torch.float32)
    z, ladj = transform.to_base_and_ladj(x)  # the step is at most beta, less than x is rounded
    torch.testing.assert_close(z, x, rtol=1e-6, atol=0)
    torch.testing.assert_close(ladj, torch.zeros(2, dtype=torch.float32), rtol=0, atol=1e-6)
    torch.testing.assert_close(transform.to_data(z), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "size", "nearer"),
    [(torch.float32, 1e20, 1e8), (torch.float32, 1e30, 1e8), (torch.float64, 1e200, 1e50)],
    ids=str,
)
@pytest.mark.parametrize("hidden_features", [(), (8, 6)], ids=str)
def test_the_jacobian_of_an_exact_lipschitz_flow_far_away_is_that_of_its_limit(
    dtype, size, nearer, hidden_features
):
    transform = lipschitz(3, hidden_features=hidden_features).to(dtype)
    x = torch.tensor([1.0, -0.5, 0.3], dtype=dtype)  # far along it the map is homogeneous
    found, expected = (
        torch.autograd.functional.jacobian(transform.to_base, factor * x)
        for factor in (size, nearer)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    moved, ladj = transform.to_base_and_ladj(size * x)
    nearby, ladj_nearby = transform.to_base_and_ladj(nearer * x)
    torch.testing.assert_close((moved / size, ladj), (nearby / nearer, ladj_nearby))


def test_an_exact_lipschitz_flow_at_the_end_of_the_range_is_right_or_says_why_not():
    x = torch.tensor([[3e38, -3e38, 1e38], [-3e38, 2e38, 3e38]], dtype=torch.float64)
    transform = lipschitz(3, hidden_features=())
    expected = transform.to_base(x).float()
    assert expected.isinf().any()
    torch.testing.assert_close(transform.float().to_base(x.float()), expected, rtol=1e-5, atol=0)
    deep = perturbed(ExactLipschitz(3)).float()
    with pytest.raises(
        ValueError, match=r"x must be where the output of the network is finite .* rows 0, 1\."
    ):
        deep.to_base(x.float())


@pytest.mark.parametrize("size", [1e15, 1e20, 3e38])
def test_a_loss_beyond_the_range_is_an_error_that_names_the_row(size):
    flow = CNF(2, hidden_features=(4, 4), solver=GRID, standardize=False).float()
    x = torch.zeros(3, 2, dtype=torch.float32)
    x[1] = size
    objective = FlowMatching(flow)
    if size < 1e18:  # whose square is in the range
        assert objective(x, generator=seeded()).isfinite()
        return
    with pytest.raises(ValueError, match=r"loss of flow matching is finite .* in row 1\."):
        objective(x, generator=seeded())


def test_a_row_of_weight_0_without_a_density_does_not_count():
    flow = Flow([Radial(2)]).float()
    x = torch.zeros(2, 2, dtype=torch.float32)
    x[1] = 1e30  # whose density is 0 in single precision
    assert flow.log_prob(x)[1] == -math.inf
    weight = torch.tensor([1.0, 0.0], dtype=torch.float32)
    loss = MaximumLikelihood(flow)(x, weight=weight)
    torch.testing.assert_close(loss, -flow.log_prob(x)[0] / 2)


def test_training_that_leaves_the_range_stops_with_the_rows_and_the_last_good_weights():
    flow, x = Flow([Affine(2)]).float(), torch.randn(8, 2).float()
    settings = TrainingConfig(steps=9, learning_rate=1e9, schedule="constant")
    with pytest.raises(TrainingError, match=r"is finite in torch.float32; got .* in rows 0, 1"):
        fit(flow, x, settings, validation=None)
    assert flow.log_prob(x).isfinite().all()


def test_a_solve_that_starts_from_infinity_names_the_row():
    part = Affine(2)
    with torch.no_grad():
        part.loc.zero_(), part.log_scale.fill_(-80.0)
    flow = CNF(2, transforms=[part], solver=GRID, standardize=False).float()
    x = torch.zeros(3, 2, dtype=torch.float32)
    x[2] = 3e30
    with pytest.raises(
        ODEError, match=r"starts from NaN or inf in row 2: the transforms before it"
    ):
        flow.to_base(x)
