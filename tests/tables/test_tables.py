"""Laws of the density of a table: scaling, weights, held-out rows, and the grid."""

import math
import re

import pytest
import torch

from cnf import Flow, ODEError, ODESolver, Standardize, load, save
from cnf.tables.fit import (
    DensitySettings,
    TableRows,
    continue_density,
    fit_density,
    hold_out,
    log_prob,
    sample,
)
from cnf.tables.integer_columns import fixed_noise, uniform_points
from cnf.transforms import Affine, transforms_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_calibration")]

FAST = {"matching_steps": 200, "learning_rate": 0.03}
"""Enough to learn a mean."""


def settings(**changes):
    return DensitySettings(
        **{
            "matching_steps": 4,
            "likelihood_steps": 2,
            "hidden_features": (16, 16),
            "validation_fraction": 0.0,
            "accuracy": 0.1,
            **changes,
        }
    )


def fitted(x, weight=None, **changes):
    flow, _ = fit_density(
        [Standardize.from_data(x)], TableRows(x, weight=weight), settings=settings(**changes)
    )
    return flow


def test_a_unit_of_the_data_moves_the_density_by_its_jacobian():
    x = torch.randn(200, 2)
    small, large = fitted(x), fitted(1024 * x - 512)
    torch.testing.assert_close(
        log_prob(large, TableRows(1024 * x - 512)),
        log_prob(small, TableRows(x)) - 2 * torch.tensor(1024.0).log(),
        rtol=0,
        atol=1e-3,  # of float32 in training
    )


def test_large_numbers_that_differ_little_keep_their_digits():
    """In float32, 10^8 and 10^8 + 1 are one number."""
    x = torch.randn(200, 1)
    torch.testing.assert_close(
        log_prob(fitted(x + 1e8), TableRows(x + 1e8)),
        log_prob(fitted(x), TableRows(x)),
        rtol=0,
        atol=0.01,
    )


def test_digits_are_kept_beside_whole_numbers_and_in_them(monkeypatch):
    """As above, where noise must be drawn anew at each step."""
    x, counts = torch.randn(200, 1), torch.poisson(3 * torch.ones(200, 1))
    near = 1 - 1e-9 * torch.rand(200, 1)
    columns = ["real", "integer", ("interval", 0, 1)]

    def found(offset, first):
        rows = torch.cat([x + offset, counts + first, near], 1)
        flow, _ = fit_density(transforms_for(rows, columns), TableRows(rows), settings=settings())
        assert flow.likelihood == "lower_bound"
        assert torch.equal(flow.chain[1].mean, transforms_for(rows, columns)[1].mean)
        drawn = sample(flow, 500, seed=0) - torch.tensor([offset, first, 0.0])
        return log_prob(flow, TableRows(rows)), drawn

    small, large = found(0.0, 0.0), found(1e8, 20_240_101.0)
    torch.testing.assert_close(large[0], small[0], rtol=0, atol=0.01)
    torch.testing.assert_close(large[1][:, 0], small[1][:, 0], rtol=0, atol=0.02)
    assert (large[1][:, 1] == small[1][:, 1]).double().mean() > 0.98


def test_a_transform_that_learns_is_trained():
    x = torch.randn(100, 2)
    affine = Affine(2)
    flow, _ = fit_density([Standardize.from_data(x), affine], TableRows(x), settings=settings())
    assert flow.chain[1].loc.abs().min() > 0
    fit_density([affine], TableRows(x), settings=settings())


def test_the_noise_of_a_row_is_its_own(monkeypatch):
    """Alone, among others, in other chunks, beside rows outside of the support."""
    x = torch.poisson(3 * torch.ones(20, 2)) + torch.tensor([0.0, 0.5])
    transforms = transforms_for(x, ["integer", "real"])
    flow, _ = fit_density(transforms, TableRows(x), settings=settings())
    together = log_prob(flow, TableRows(torch.cat([torch.full((3, 2), 0.5), x])))
    assert together[:3].tolist() == [-math.inf] * 3
    alone = torch.cat([log_prob(flow, TableRows(row[None])) for row in x[::7]])
    torch.testing.assert_close(alone, together[3::7], rtol=0, atol=1e-10)
    assert log_prob(flow, TableRows(x[:0])).shape == (0,)


@pytest.mark.parametrize("count", range(1, 13))
def test_points_of_the_noise_have_the_moments_of_a_uniform_distribution(count):
    points = uniform_points(count, cubature=True)
    assert points.min() > 0
    assert points.max() < 1
    for column in points.T:
        assert len(column.round(decimals=9).unique()) == len(points)
    if count <= 10:
        assert len(points) in (5, 7, 11)
        torch.testing.assert_close(points.mean(0), torch.full((count,), 0.5), rtol=0, atol=1e-14)
        covariance = torch.eye(count) / 12
        torch.testing.assert_close(points.T.cov(correction=0).view(count, count), covariance)


def test_points_of_the_noise_integrate_a_smooth_density_better_than_draws():
    """An exponential of a slope of half a nat for a cell, in four columns."""
    slopes = torch.tensor([[0.5, 0.5, -0.5, 0.5], [0.5, 0, 0, 0.5], [0.1, -0.5, 0.5, 0.2]])
    exact = torch.where(slopes == 0, 1.0, slopes.expm1() / slopes).prod(-1)

    def error(cubature):
        means = (uniform_points(4, cubature=cubature) @ slopes.T).exp().mean(0)
        return (means / exact).log().abs().max()

    assert error(True) < 0.01
    assert error(False) > 2 * error(True)


def test_coarse_cells_are_averaged_over_their_whole_width():
    """Binary columns: the probabilities of all rows add up to one, and NLL is above the entropy."""
    x = torch.randint(2, (400, 2)).double()
    transforms = transforms_for(x, ["integer", "integer"])
    assert len(fixed_noise(transforms)[1]) == 8
    assert len(fixed_noise([transforms[0], Standardize.from_data(16 * x)])[1]) == 5
    assert len(fixed_noise([transforms[0]])[1]) == 8
    settled = settings(matching_steps=300, learning_rate=0.01, accuracy=1e-2)
    flow, _ = fit_density(transforms, TableRows(x), settings=settled)
    every = torch.cartesian_prod(*[torch.arange(-1.0, 3.0)] * 2)
    assert float(log_prob(flow, TableRows(every)).exp().sum()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("column", ["integer", "real"])
def test_a_context_that_is_not_finite_is_named_by_its_row(column):
    x, context = torch.poisson(3 * torch.ones(20, 1)), torch.randn(20, 2)
    flow, _ = fit_density(transforms_for(x, [column]), TableRows(x, context), settings=settings())
    context[7] = math.nan
    with pytest.raises(ValueError, match=r"context .* row 7"):
        log_prob(flow, TableRows(x, context))


def test_rows_of_whole_numbers_are_named_as_the_caller_counts_them():
    x = torch.poisson(3 * torch.ones(20, 2))
    flow, _ = fit_density(
        transforms_for(x, ["integer", "integer"]), TableRows(x), settings=settings()
    )
    strict = ODESolver(method="rk4", times=(0.0, 0.5, 1.0), accuracy=1e-300, max_evaluations=8)
    with pytest.raises(ODEError, match=r"in rows 0, 1, 2 by max_evaluations=8"):
        log_prob(flow.using(solver=strict), TableRows(x[:3]))


def test_a_probability_of_whole_numbers_is_nearly_the_integral_over_their_cells(monkeypatch):
    counts = torch.poisson(3 * torch.ones(300, 1))
    transforms = transforms_for(counts, ["integer"])
    settled = settings(matching_steps=200, learning_rate=0.01, accuracy=1e-2)
    flow, _ = fit_density(transforms, TableRows(counts), settings=settled)
    all_counts = torch.arange(-3.0, 15.0)[:, None]
    assert float(log_prob(flow, TableRows(all_counts)).exp().sum()) == pytest.approx(1, abs=0.01)
    draws = flow.log_prob(all_counts[3:11], importance_samples=500)
    torch.testing.assert_close(
        log_prob(flow, TableRows(all_counts[3:11])), draws, rtol=0, atol=0.05
    )


def test_the_flow_is_double_and_on_the_grid_and_can_be_saved(tmp_path):
    flow = fitted(torch.randn(50, 2))
    assert flow.accuracy == 0.1
    tensors = flow.state_dict().values()
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}
    save(flow, tmp_path / "flow.safetensors")
    x = torch.randn(5, 2)
    assert torch.equal(load(tmp_path / "flow.safetensors").log_prob(x), flow.log_prob(x))


def test_log_densities_are_as_accurate_as_asked_for():
    """Against an adaptive method of tolerance 1e-9, on a density with sharp edges."""
    x = torch.rand(1000, 2).round(decimals=1) + 0.02 * torch.randn(1000, 2)
    flow = fitted(
        x, matching_steps=300, learning_rate=4e-3, hidden_features=(64, 64), accuracy=1e-4
    )
    exact = flow.using(solver=ODESolver(rtol=1e-9, atol=1e-9))
    rows = TableRows(x[:100])
    torch.testing.assert_close(log_prob(flow, rows), log_prob(exact, rows), rtol=0, atol=1e-4)


def test_chunks_change_nothing(monkeypatch):
    flow = fitted(torch.randn(50, 2))
    x, z = torch.randn(23, 2), sample(flow, 23, seed=1)
    whole = log_prob(flow, TableRows(x))
    monkeypatch.setattr("cnf.tables.fit._ROWS_AT_ONCE", 10)
    torch.testing.assert_close(log_prob(flow, TableRows(x)), whole, rtol=0, atol=1e-12)
    assert sample(flow, 23, seed=1).shape == z.shape
    assert log_prob(flow, TableRows(x[:0])).shape == (0,)


def test_a_conditional_density_follows_its_context(monkeypatch):
    context = torch.randn(300, 1)
    x = context + 0.1 * torch.randn(300, 1)
    flow, _ = fit_density(
        [Standardize.from_data(x)], TableRows(x, context), settings=settings(**FAST)
    )
    for centre in (-1.0, 1.0):
        drawn = sample(flow, 500, torch.tensor([centre]), seed=0)
        assert abs(float(drawn.mean()) - centre) < 0.2
        given = TableRows(torch.full((3, 1), centre), torch.tensor([[-1.0], [0.0], [1.0]]))
        assert log_prob(flow, given).argmax() == (0 if centre < 0 else 2)


def test_weights_say_how_often_a_row_counts(monkeypatch):
    """The mean of the samples is the weighted mean of the rows."""
    x = torch.cat([torch.randn(100, 1) - 1, torch.randn(200, 1) + 1])
    weight = torch.cat([torch.full((100,), 18.0), torch.full((200,), 1.0)])
    mean = sample(fitted(x, weight, matching_steps=400), 1000, seed=0).mean()
    assert abs(mean - weight @ x[:, 0] / weight.sum()) < 0.15 < abs(mean - x.mean()) - 0.7


def test_held_out_rows_and_the_others_are_all_rows():
    rows = TableRows(torch.arange(10.0)[:, None], torch.arange(10.0)[:, None], torch.arange(10.0))
    training, held_out = hold_out(rows, settings(validation_fraction=0.3))
    assert len(held_out.x) == 3
    assert sorted(torch.cat([training.weight, held_out.weight]).tolist()) == list(range(10))
    assert torch.equal(training.x, training.context)
    assert hold_out(rows, settings(validation_fraction=0.09)) == (rows, None)


def test_held_out_rows_choose_the_weights(monkeypatch):
    monkeypatch.setattr("cnf.tables.fit.become_mixture_if_better", lambda *_, **__: None)
    x = torch.randn(40, 2)
    x[::2] += 5
    training, held_out = hold_out(TableRows(x), settings(validation_fraction=0.5))
    flow, history = fit_density(
        [Standardize.from_data(x)],
        training,
        held_out,
        settings(matching_steps=200, learning_rate=0.02),
    )
    found = [loss for loss in history.validation if math.isfinite(loss)]
    assert len(found) == 7
    nll = -float(log_prob(flow, held_out).mean() + flow.chain[0].log_std.sum())
    assert nll == pytest.approx(min(found), abs=0.01)  # of the adaptive solver in training
    assert min(found) < found[-1]  # it was worth choosing


def test_fitting_on_leaves_the_flow_it_starts_from():
    x = torch.randn(100, 2)
    flow = fitted(x)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    further, _ = continue_density(flow, TableRows(x + 1), settings=settings())
    after = flow.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert log_prob(further, TableRows(x + 1)).mean() > log_prob(flow, TableRows(x + 1)).mean()
    assert torch.equal(further.chain[0].mean, flow.chain[0].mean)


def test_the_global_random_state_is_left_alone():
    x = torch.randn(50, 2)
    before = torch.get_rng_state()
    flow = fitted(x)
    continue_density(flow, TableRows(x), settings=settings())
    sample(flow, 3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides(monkeypatch):
    x = torch.randn(50, 2)
    assert torch.equal(fitted(x, seed=3).log_prob(x), fitted(x, seed=3).log_prob(x))
    assert not torch.equal(fitted(x, seed=3).log_prob(x), fitted(x, seed=4).log_prob(x))


def test_settings_reach_the_training():
    wanted = {"matching_steps": 7, "likelihood_steps": 3}
    phases = DensitySettings(**wanted, batch_size=5, learning_rate=1e-3, seed=2).phases(
        progress=True
    )
    assert [phase.steps for phase in phases] == [7, 3]
    assert [phase.learning_rate for phase in phases] == pytest.approx([1e-3, 0.05e-3])
    assert {(phase.batch_size, phase.seed, phase.progress) for phase in phases} == {(5, 2, True)}
    rows = TableRows(torch.randn(9, 1))
    flow, history = fit_density([], rows, settings=settings(**wanted))
    assert history.phase == [1] * 7 + [2] * 3
    further, history = continue_density(
        flow, TableRows(torch.randn(9, 1)), settings=settings(**wanted)
    )
    assert history.phase == [1] * 3
    assert isinstance(further, Flow)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"matching_steps": -1}, ValueError, "matching_steps must be at least 0; got -1"),
        ({"likelihood_steps": 1.5}, TypeError, "likelihood_steps must be an int; got 1.5"),
        (
            {"hidden_features": ()},
            ValueError,
            "hidden_features must name at least one hidden layer",
        ),
        ({"hidden_features": (0,)}, ValueError, "each of hidden_features must be at least 1"),
        ({"validation_fraction": 1.0}, ValueError, "validation_fraction must be in [0, 1); got"),
        (
            {"learning_rate": -1.0},
            ValueError,
            "learning_rate must be positive and finite; got -1.0",
        ),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
    ],
)
def test_bad_settings_are_refused(shapes_unchecked, wrong, error, message):
    with pytest.raises(error, match=re.escape(message)):
        DensitySettings(**wrong)
