"""Laws of the bottleneck: a smaller matrix of the same trace, with fewer probes to sum over."""

import pytest
import torch
from test_vector_fields import gradients, leaves
from zoo import BOTTLENECKS, FIELDS, mlp, rows_for

from cnf import count_evaluations
from cnf.vector_fields.layers import LAYERS


def basis_of(width, *batch):
    basis = torch.eye(width).view(width, *(1,) * len(batch), width)
    return basis.expand(width, *batch, width)


def matrices(field, t, x, context=None):
    """The matrix at the bottleneck, for each row."""
    basis = basis_of(field.bottleneck, *x.shape[:-1])
    _, columns = field.velocity_and_bottleneck_products(t, x, basis, context)
    return columns.movedim(0, -1)


@pytest.mark.parametrize("make", BOTTLENECKS.values(), ids=BOTTLENECKS)
@pytest.mark.parametrize("batch", [(), (4,), (3, 4)], ids=str)
@pytest.mark.parametrize("own_times", [False, True])
def test_the_trace_at_the_bottleneck_is_the_divergence_and_has_its_gradients(
    make, batch, own_times
):
    field = make()
    assert field.bottleneck < field.features
    rows, row_contexts = rows_for(field, *batch)
    times = torch.rand(batch if own_times else ())
    (t, x, context), inputs = leaves(field, times, rows, row_contexts)
    _, divergence = field.velocity_and_divergence(t, x, context)
    matrix = matrices(field, t, x, context)
    traces = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(traces, divergence, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(traces)
    torch.testing.assert_close(
        gradients(traces, weights, inputs),
        gradients(divergence, weights, inputs),
        rtol=1e-10,
        atol=1e-10,
    )


WITHOUT_SKIP = {name: make for name, make in BOTTLENECKS.items() if "skip" not in name}


@pytest.mark.parametrize("make", WITHOUT_SKIP.values(), ids=WITHOUT_SKIP)
def test_the_matrix_at_the_bottleneck_has_the_eigenvalues_of_the_jacobian(make):
    """Those of AB and BA agree but for zeros."""
    field = make()
    x, context = rows_for(field)
    t = torch.rand(())
    jacobian = torch.autograd.functional.jacobian(lambda y: field(t, y, context), x)
    small = torch.linalg.matrix_power(matrices(field, t, x, context), 3).trace()
    large = torch.linalg.matrix_power(jacobian, 3).trace()
    torch.testing.assert_close(small, large, rtol=1e-8, atol=0)
    assert large.abs() > 1e-9


@pytest.mark.parametrize("hidden", [(3,), (8, 3), (3, 8), (8, 3, 6), (7, 3, 3)], ids=str)
def test_the_bottleneck_of_an_mlp_is_behind_its_first_narrowest_layer(hidden):
    """The matrix is ∂h/∂x ∂g/∂h by autograd, with h after the activation."""
    field = mlp(5, 2, hidden_features=hidden, activation="tanh", layer="concatsquash")
    x, context = rows_for(field)
    t = torch.rand(())
    stages = field.stages(t, x, context)
    split = hidden.index(3) + 1

    def through(some, value):
        for stage in some:
            value = stage.value(value)
        return value

    h = through(stages[:split], x)
    inner = torch.autograd.functional.jacobian(lambda y: through(stages[:split], y), x)
    outer = torch.autograd.functional.jacobian(lambda y: through(stages[split:], y), h)
    assert field.bottleneck == 3
    torch.testing.assert_close(matrices(field, t, x, context), inner @ outer)


@pytest.mark.parametrize("make", BOTTLENECKS.values(), ids=BOTTLENECKS)
def test_velocity_is_the_same_and_counts_once(make):
    field = make()
    x, context = rows_for(field, 3, 4)
    t = torch.rand(3, 4)
    with count_evaluations(field) as nfe:
        velocity, products = field.velocity_and_bottleneck_products(
            t, x, torch.randn(2, 3, 4, field.bottleneck), context
        )
    assert nfe.value == 1
    assert products.shape == (2, 3, 4, field.bottleneck)
    torch.testing.assert_close(velocity, field(t, x, context), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("make", BOTTLENECKS.values(), ids=BOTTLENECKS)
def test_variance_of_rademacher_probes_is_the_formula_at_the_bottleneck(make):
    """``2 (‖S‖² - Σ s_ii²)`` with S the symmetric part; by all signs, and by a sample of them."""
    field = make()
    x, context = rows_for(field)
    t, width = torch.rand(()), field.bottleneck
    symmetric = matrices(field, t, x, context)
    symmetric = 0.5 * (symmetric + symmetric.T)
    formula = 2 * (symmetric.square().sum() - symmetric.diagonal().square().sum())

    signs = torch.cartesian_prod(*(torch.tensor([-1.0, 1.0]),) * width).view(-1, width)
    drawn = 2.0 * torch.randint(0, 2, (40_000, width)) - 1
    exhaustive, estimates = (
        (p * field.velocity_and_bottleneck_products(t, x, p, context)[1]).sum(-1)
        for p in (signs, drawn)
    )
    torch.testing.assert_close(exhaustive.var(correction=0), formula, rtol=1e-9, atol=1e-12)

    squares = (estimates - exhaustive.mean()).square()
    error = squares.std() / len(squares) ** 0.5
    assert (squares.mean() - formula).abs() <= 4 * error  # p < 1e-4


@pytest.mark.parametrize("layer", LAYERS)
def test_no_probes_give_the_velocity(layer):
    field = mlp(5, layer=layer, hidden_features=(8, 3))
    x, _ = rows_for(field, 4)
    t = torch.rand(())
    velocity, products = field.velocity_and_bottleneck_products(t, x, torch.zeros(0, 4, 3))
    torch.testing.assert_close(velocity, field(t, x), rtol=1e-13, atol=1e-13)
    assert products.shape == (0, 4, 3)


@pytest.mark.parametrize("make", [make for name, make in FIELDS.items() if name not in BOTTLENECKS])
def test_a_field_without_a_bottleneck_says_so(make):
    field = make()
    x, context = rows_for(field, 3)
    assert field.bottleneck is None
    with pytest.raises(
        NotImplementedError, match=r"has no bottleneck; .* narrower than its \d+ features"
    ):
        field.velocity_and_bottleneck_products(torch.rand(()), x, torch.ones(1, 3, 2), context)


def test_a_layer_as_wide_as_x_is_no_bottleneck():
    assert mlp(5, hidden_features=(8, 5)).bottleneck is None
    assert mlp(5, hidden_features=(8, 4)).bottleneck == 4
