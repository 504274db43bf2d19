"""Laws of transforms: each is undone, and its ladj is that of its map."""

import math
import warnings

import pytest
import torch
from laws import every_parameter_matters, ladj_is_slogdet_of_the_jacobian, to_data_undoes_to_base
from zoo import (
    BIJECTIONS,
    EMBEDDINGS,
    ESTIMATES,
    INFERENCE_SURJECTIONS,
    PRECISE,
    TRANSFORMS,
    UNDONE,
    UserNetwork,
    base_rows_for,
    in_turn,
    mlp,
    perturbed,
    rows_for,
    seeded,
)

from cnf import Exact, Hutchinson, MLPField, ModuleField, ODESolver, Standardize, count_evaluations
from cnf.regularizers import kinetic_energy
from cnf.transforms import Affine, ContinuousTransform, Transform
from cnf.transforms.continuous import map_continuous
from cnf.vector_fields import LinearField

EVERY = {**TRANSFORMS, **ESTIMATES}
UNDONE_FROM_BASE = {**INFERENCE_SURJECTIONS, **EMBEDDINGS}
every_transform = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
every_bijection = pytest.mark.parametrize("make", BIJECTIONS.values(), ids=BIJECTIONS)


@pytest.mark.parametrize(("name", "batch"), in_turn(UNDONE, [(), (4,), (3, 2)]), ids=str)
def test_to_data_undoes_to_base(name, batch):
    transform = UNDONE[name]()
    to_data_undoes_to_base(transform, *rows_for(transform, *batch), atol=1e-6)


@pytest.mark.parametrize(("name", "batch"), in_turn(UNDONE_FROM_BASE, [(), (4,), (3, 2)]), ids=str)
def test_to_base_undoes_to_data(name, batch):
    transform = UNDONE_FROM_BASE[name]()
    _, context = rows_for(transform, *batch)
    z = base_rows_for(transform, *batch)

    x, ladj = transform.to_data_and_ladj(z, context, generator=seeded())
    again, ladj_back = transform.to_base_and_ladj(x, context)

    torch.testing.assert_close(again, z, rtol=0, atol=1e-9)
    torch.testing.assert_close(ladj_back, -ladj, rtol=0, atol=1e-9)
    torch.testing.assert_close(transform.to_base(x, context), z, rtol=0, atol=1e-9)
    same = transform.to_data(z, context, generator=seeded())
    torch.testing.assert_close(same, x, rtol=0, atol=1e-9)


@every_bijection
def test_ladj_is_slogdet_of_the_jacobian(make):
    transform = make()
    ladj_is_slogdet_of_the_jacobian(transform, *rows_for(transform, 3), atol=1e-6)


@every_transform
def test_gradient_reaches_every_parameter(make):
    transform = make()
    if transform.likelihood == "on_manifold":
        moved, ladj = transform.to_data_and_ladj(base_rows_for(transform, 20))
    else:
        moved, ladj = transform.to_base_and_ladj(*rows_for(transform, 20))
    if list(transform.parameters()):
        every_parameter_matters(transform, (1 + moved).square().sum(-1) + ladj)


@every_transform
def test_dtype_is_kept(make):
    loose = ODESolver(rtol=1e-4, atol=1e-4)
    for dtype in (torch.float32, torch.float64):
        transform = map_continuous(make().to(dtype), lambda part: part.using(solver=loose))
        x, context = rows_for(transform, 3)
        context = None if context is None else context.to(dtype)
        z, ladj = transform.to_base_and_ladj(x.to(dtype), context)
        assert z.dtype == ladj.dtype == transform.to_data(z, context).dtype == dtype


@every_transform
def test_an_empty_batch_gives_an_empty_result(make):
    transform = make()
    z, ladj = transform.to_base_and_ladj(*rows_for(transform, 0))
    assert z.shape == (0, transform.base_features)
    assert ladj.shape == (0,)


@every_transform
def test_only_what_draws_on_the_way_to_the_base_is_a_bound_and_no_bijection(make):
    transform = make()
    x, context = rows_for(transform, 4)
    before = torch.get_rng_state()
    transform.to_base(x, context)
    draws = not torch.equal(torch.get_rng_state(), before)
    assert draws == (transform.likelihood == "lower_bound") == transform.stochastic_to_base
    same_size = transform.base_features == transform.features
    assert transform.is_bijective == (same_size and not draws and not transform.stochastic_to_data)


@every_transform
def test_a_generator_fixes_what_is_drawn_and_leaves_the_global_one(make):
    transform = make()
    x, context = rows_for(transform, 4)
    before = torch.get_rng_state()
    first = transform.to_base_and_ladj(x, context, generator=seeded())
    second = transform.to_base_with_costs(x, context, regularizers=[], generator=seeded())
    torch.testing.assert_close(first, second[:2], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


@every_transform
def test_costs_stand_beside_the_same_map_and_are_those_of_the_continuous_parts(make):
    transform = make()
    x, context = rows_for(transform, 3, 2)
    z, ladj, costs = transform.to_base_with_costs(
        x, context, regularizers=[kinetic_energy], generator=seeded()
    )
    torch.testing.assert_close(
        (z, ladj), transform.to_base_and_ladj(x, context, generator=seeded()), rtol=0, atol=1e-9
    )
    moves = any(isinstance(part, ContinuousTransform) for part in transform.modules())
    assert costs.shape == (1, 3, 2)
    assert bool((costs > 0).all()) == moves
    assert bool((costs == 0).all()) != moves


@every_transform
def test_rebuilding_changes_every_continuous_part_and_shares_every_parameter(make):
    transform = make()
    other = map_continuous(transform, lambda part: part.using(divergence=Hutchinson()))
    assert [id(p) for p in other.parameters()] == [id(p) for p in transform.parameters()]
    divergences = [p.divergence for p in other.modules() if isinstance(p, ContinuousTransform)]
    assert all(divergence == Hutchinson() for divergence in divergences)
    x, context = rows_for(transform, 4)
    expected = transform.to_base(x, context, generator=seeded())
    assert torch.equal(other.to_base(x, context, generator=seeded()), expected)


@pytest.mark.parametrize("rate", [0.7, -1.3])
def test_sign_of_the_ladj(rate):
    """For v = c x the map to the data expands by e^c in each of d directions."""
    field = LinearField(3)
    with torch.no_grad():
        field.weight.copy_(rate * torch.eye(3))
    transform = ContinuousTransform(field, solver=PRECISE)
    z = torch.randn(5, 3)

    x, ladj = transform.to_data_and_ladj(z)

    torch.testing.assert_close(x, z * torch.tensor(rate).exp(), rtol=0, atol=1e-7)
    torch.testing.assert_close(ladj, torch.full((5,), 3 * rate), rtol=0, atol=1e-7)


def test_standardized_data_have_mean_zero_and_standard_deviation_one():
    x = torch.randn(100, 3) * torch.tensor([1e-3, 1.0, 1e3]) + torch.tensor([5.0, 0.0, -2e3])
    z = Standardize.from_data(x).to_base(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=1e-9)
    torch.testing.assert_close(z.std(0), torch.ones(3), rtol=0, atol=1e-12)


def test_standardize_keeps_the_dtype_of_its_data():
    transform = Standardize.from_data(torch.randn(10, 2, dtype=torch.float32))
    assert transform.mean.dtype == torch.float32


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(1, 2), ValueError, "at least 2 rows; got \\(1, 2\\)"),
        (torch.randn(5), ValueError, "shape \\(rows, features\\)"),
        (torch.tensor([[1.0, 2.0], [1.0, 3.0]]), ValueError, "constant in \\[0\\]"),
        (torch.tensor([[1.0], [torch.nan]]), ValueError, "NaN or inf in row 1"),
        (torch.tensor([[1], [2]]), ValueError, "floating dtype; got torch.int64"),
        ([[1.0], [2.0]], TypeError, "torch.Tensor; got list"),
    ],
)
def test_standardize_refuses(x, error, message):
    with pytest.raises(error, match=message):
        Standardize.from_data(x)


def test_map_without_ladj_does_not_evaluate_a_divergence():
    class NoDivergence(MLPField):
        def _velocity_and_divergence(self, *_):
            raise AssertionError

        _velocity_and_products = _velocity_and_divergence

    transform = ContinuousTransform(perturbed(NoDivergence(2, hidden_features=(4, 4))))
    z = transform.to_base(torch.randn(3, 2))
    assert z.isfinite().all()
    with pytest.raises(AssertionError):
        transform.to_base_and_ladj(z)


def test_using_shares_the_field_and_leaves_the_original():
    transform = ContinuousTransform(mlp(), solver=PRECISE, divergence=Exact())
    other = transform.using(divergence=Hutchinson())
    assert other.vector_field is transform.vector_field
    assert other.solver == PRECISE
    assert (transform.likelihood, other.likelihood) == ("exact", "estimate")


def test_probes_are_frozen_for_a_solve_and_drawn_from_the_generator():
    transform = ContinuousTransform(mlp(3), divergence=Hutchinson(), solver=PRECISE)
    x = torch.randn(4, 3)
    before = torch.get_rng_state()

    def ladj(seed):
        return transform.to_base_and_ladj(x, generator=torch.Generator().manual_seed(seed))[1]

    assert torch.equal(ladj(1), ladj(1))
    assert not torch.equal(ladj(1), ladj(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unwise_exact_divergence_warns_and_says_what_to_do():
    field = ModuleField(UserNetwork(65), 65)
    solver = ODESolver(method="euler", steps=1)
    x = torch.randn(1, 65)
    with pytest.warns(UserWarning, match="65 Jacobian products .* divergence=Hutchinson"):
        ContinuousTransform(field, solver=solver).to_base_and_ladj(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ContinuousTransform(field, solver=solver, divergence=Exact()).to_base_and_ladj(x)
        ContinuousTransform(MLPField(65), solver=solver).to_base_and_ladj(x)


def test_a_solve_of_an_empty_batch_evaluates_nothing():
    transform = ContinuousTransform(mlp())
    with count_evaluations(transform) as nfe:
        transform.to_base_and_ladj(torch.zeros(0, 2))
    assert nfe.value == 0


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ContinuousTransform(torch.nn.Linear(2, 2)), TypeError, "ModuleField"),
        (lambda: ContinuousTransform(mlp(), solver="rk4"), TypeError, "ODESolver\\(method"),
        (lambda: ContinuousTransform(mlp(), divergence="exact"), TypeError, "Hutchinson\\(\\)"),
        (lambda: Affine(0), ValueError, "features must be at least 1; got 0"),
        (lambda: Affine(2.0), TypeError, "features must be an int; got 2.0"),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
def test_the_end_time_has_the_gradient_of_the_closed_form(gradient):
    field = perturbed(LinearField(2))
    solver = ODESolver(rtol=1e-9, atol=1e-9, gradient=gradient)
    transform = ContinuousTransform(field, solver=solver, end_time=0.8, learn_end_time=True)
    x = torch.randn(4, 2)

    z, ladj = transform.to_base_and_ladj(x)
    found = torch.autograd.grad((z.sin().sum(-1) + ladj).sum(), transform.log_end_time)[0]

    duration = torch.tensor(0.8, requires_grad=True)
    moved = torch.linalg.matrix_exp(-duration * field.weight)
    offset = torch.linalg.solve(field.weight, field.bias)  # x + offset obeys dx/dt = A x
    expected = ((x + offset) @ moved.T - offset).sin().sum() - 4 * duration * field.weight.trace()
    (slope,) = torch.autograd.grad(expected, duration)
    torch.testing.assert_close(found, 0.8 * slope, rtol=0, atol=1e-6)


def test_an_end_time_is_a_longer_way_along_the_same_field():
    field = perturbed(LinearField(3))
    x = torch.randn(4, 3)
    moved, ladj = ContinuousTransform(field, solver=PRECISE, end_time=1.7).to_base_and_ladj(x)
    expected = field.solution(x, start=1.7, end=0.0)
    torch.testing.assert_close((moved, ladj), expected, rtol=0, atol=1e-7)


def test_using_shares_a_learnt_end_time():
    transform = ContinuousTransform(mlp(), end_time=2.0, learn_end_time=True)
    assert transform.using(solver=PRECISE).log_end_time is transform.log_end_time


@pytest.mark.parametrize("end_time", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_end_time_is_refused(end_time):
    with pytest.raises(ValueError, match="end_time must be positive and finite"):
        ContinuousTransform(mlp(), end_time=end_time)


HOOKS = {
    "to_base_and_ladj": "_to_base",
    "to_data_and_ladj": "_to_data",
    "to_base": "_to_base_value",
    "to_data": "_to_data_value",
    "to_base_with_costs": "_to_base_with_costs",
    "initialize": "_initialize",
}


@pytest.mark.parametrize(("method", "hook"), HOOKS.items(), ids=HOOKS)
@pytest.mark.parametrize("kind", [Transform, Affine])
def test_a_class_that_overrides_a_final_method_is_told_the_hook(kind, method, hook):
    message = rf"Mine must not override {method}, which is final; write {hook}\("
    with pytest.raises(TypeError, match=message):
        type("Mine", (kind,), {method: lambda self, x, context=None, **settings: (x, x)})
    mixin = type("Mixin", (), {method: lambda self, x, context=None, **settings: (x, x)})
    with pytest.raises(TypeError, match=message):
        type("Mine", (mixin, kind), {})


def test_two_hooks_make_a_transform():
    class Halving(Transform):
        def _to_base(self, x, context, generator):
            return x / 2, x.new_full(x.shape[:-1], -3 * math.log(2))

        def _to_data(self, z, context, generator):
            return 2 * z, z.new_full(z.shape[:-1], 3 * math.log(2))

    transform, x = Halving(3), torch.randn(4, 3)
    to_data_undoes_to_base(transform, x, None, atol=1e-12)
    ladj_is_slogdet_of_the_jacobian(transform, x, None, atol=1e-12)
    transform.initialize(x)
    assert not transform.to_base_with_costs(x, regularizers=[kinetic_energy])[2].any()
