"""Laws of invertible mixing: one matrix for every pixel, a rotation at first, never singular."""

import pytest
import torch
from training_runs import config
from zoo import perturbed, seeded

from cnf import Flow, fit
from cnf.transforms import Conv1x1

every_form = pytest.mark.parametrize("lu", [True, False], ids=["lu", "dense"])
SHAPES = {"vector": 5, "one channel": (1, 2, 2), "image": (4, 2, 3)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@every_form
@every_shape
def test_a_new_mixing_is_a_rotation(lu, shape):
    transform = Conv1x1(shape, lu=lu)
    weight = transform.matrix.value()
    torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-12)
    assert torch.linalg.det(weight).item() == pytest.approx(1.0, abs=1e-12)
    x = torch.randn(3, transform.features)
    z, ladj = transform.to_base_and_ladj(x)
    torch.testing.assert_close(ladj, torch.zeros(3), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.norm(dim=-1), x.norm(dim=-1), rtol=0, atol=1e-12)


@every_form
def test_every_pixel_is_multiplied_by_the_same_matrix(lu):
    transform = perturbed(Conv1x1((3, 2, 4), lu=lu), 0.2)
    x = torch.randn(24)
    z, ladj = transform.to_base_and_ladj(x)
    weight = transform.matrix.value()
    image, mixed = x.view(3, 2, 4), z.view(3, 2, 4)
    for row in range(2):
        for column in range(4):
            expected = weight @ image[:, row, column]
            torch.testing.assert_close(mixed[:, row, column], expected, rtol=0, atol=1e-12)
    per_pixel = torch.linalg.slogdet(weight).logabsdet
    torch.testing.assert_close(ladj, 8 * per_pixel, rtol=0, atol=1e-12)


@every_form
def test_both_forms_hold_any_matrix(lu):
    matrix = torch.randn(6, 6)
    mixing = Conv1x1(6, lu=lu).matrix
    mixing.set_to(matrix)
    torch.testing.assert_close(mixing.value(), matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixing.inverse() @ matrix, torch.eye(6), rtol=0, atol=1e-10)
    expected = torch.linalg.slogdet(matrix).logabsdet
    torch.testing.assert_close(mixing.log_abs_det(), expected, rtol=0, atol=1e-12)


def test_both_forms_have_as_many_parameters_as_the_matrix_has_entries():
    for lu in (True, False):
        assert sum(p.numel() for p in Conv1x1((7, 2, 2), lu=lu).parameters()) == 49


def test_a_permutation_alone_has_no_ladj():
    transform = Conv1x1(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    transform.matrix.set_to(torch.eye(6)[order])
    assert (transform.matrix.packed == 0).all()
    x = torch.randn(2, 6)
    z, ladj = transform.to_base_and_ladj(x)
    torch.testing.assert_close(z, x[:, order], rtol=0, atol=0)
    assert (ladj == 0).all()


def test_learning_never_changes_the_sign_of_the_determinant_in_the_triangular_form():
    for sign in (1, -1):
        transform = Conv1x1(4)
        transform.matrix.set_to(sign * torch.eye(4)[[1, 0, 2, 3]])
        before = torch.linalg.det(transform.matrix.value()).sign()
        for _ in range(20):
            value = perturbed(transform, 1.0).matrix.value()
            assert torch.linalg.det(value).sign() == before


def test_a_generator_fixes_the_start_and_leaves_the_global_one():
    transform = Conv1x1(3)
    before = torch.get_rng_state()
    starts = []
    for _ in range(2):
        transform.reset_parameters(generator=seeded())
        starts.append(transform.matrix.value().detach())
    assert torch.equal(*starts)
    assert torch.equal(torch.get_rng_state(), before)
    transform.reset_parameters()
    assert not torch.equal(transform.matrix.value(), starts[0])


def test_starts_are_uniform_among_rotations():
    """Under the uniform distribution the trace has mean 0 and variance 1 (4 standard errors)."""
    transform = Conv1x1(3)
    starts = []
    for _ in range(1000):
        transform.reset_parameters()
        starts.append(transform.matrix.value().detach())
    starts = torch.stack(starts)
    torch.testing.assert_close(torch.linalg.det(starts), torch.ones(1000), rtol=0, atol=1e-12)
    traces = starts.diagonal(dim1=1, dim2=2).sum(-1)
    assert abs(traces.mean()) < 4 / len(traces) ** 0.5
    assert abs(traces.var() - 1) < 0.3


@every_form
def test_a_ladj_in_float32_is_that_in_float64_rounded(lu):
    transform = perturbed(Conv1x1((48, 4, 4), lu=lu), 0.05).float()
    x = torch.randn(2, 768, dtype=torch.float32)
    _, ladj = transform.to_base_and_ladj(x)
    _, expected = transform.double().to_base_and_ladj(x.double())
    assert torch.equal(ladj, expected.float())


@every_form
def test_under_autocast_points_keep_their_precision(lu):
    transform = perturbed(Conv1x1((3, 2, 2), lu=lu), 0.1).float()
    x = torch.randn(2, 12, dtype=torch.float32)
    expected = transform.to_base_and_ladj(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = transform.to_base_and_ladj(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
@every_form
def test_fit_learns_the_covariance_of_a_gaussian(lu):
    scale = torch.tensor([[1.0, 0.0], [0.9, 0.5]])
    x = torch.randn(400, 2) @ scale.T
    flow = Flow([Conv1x1(2, lu=lu)])
    fit(flow, x, config(200, learning_rate=3e-2))
    fitted = flow.log_prob(x).mean().item()
    second_moment = x.T @ x / len(x)
    best = torch.distributions.MultivariateNormal(torch.zeros(2), second_moment).log_prob(x).mean()
    assert fitted == pytest.approx(best.item(), abs=0.02)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Conv1x1(0), ValueError, "shape must be at least 1; got 0"),
        (lambda: Conv1x1("ab"), TypeError, "each of shape must be an int; got 'a'"),
        (lambda: Conv1x1((3, 4)), ValueError, r"\(channels, height, width\); got \(3, 4\)"),
    ],
)
def test_constructor_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
