"""Laws of the estimator: scikit-learn's own, and those of a density."""

import copy
import datetime
import io
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from cnf.data.degeneracy import DegenerateDataWarning
from cnf.tables.estimator import CNFDensity
from cnf.tables.fit import DensitySettings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_calibration")]

SMALL = {
    "matching_steps": 4,
    "likelihood_steps": 1,
    "hidden_features": (8, 8),
    "validation_fraction": 0.0,  # a validation takes longer than a step
    "accuracy": 0.1,
    "random_state": 0,
}
FAST = {"matching_steps": 150, "learning_rate": 0.04, "validation_fraction": 0.1}
"""Enough to learn two blobs."""


@pytest.fixture(autouse=True)
def _single_precision():
    """As a user runs it."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def rows():
    return np.random.RandomState(0).normal(3, 2, size=(60, 2))


@pytest.fixture(scope="module")
def model(rows):
    return CNFDensity(**SMALL).fit(rows)


def frame(values, names):
    """Columns with names."""
    return pa.table(dict(zip(names, values.T, strict=True)))


@pytest.mark.filterwarnings("ignore::cnf.data.degeneracy.DegenerateDataWarning")
@parametrize_with_checks([CNFDensity(matching_steps=2, likelihood_steps=1, hidden_features=(8, 8))])
def test_scikit_learn_finds_no_fault(estimator, check, shapes_unchecked):
    check(estimator)


def test_the_density_is_learnt():
    """Two blobs: within a quarter nat of the truth; a Gaussian misses it by 0.9."""
    generator = np.random.RandomState(0)

    def draw(count):
        return np.where(generator.rand(count, 1) < 0.5, -3, 3) + generator.randn(count, 2)

    x, test = draw(1000), draw(1000)
    model = CNFDensity(**{**SMALL, **FAST}).fit(x)
    distances = [((test - centre) ** 2).sum(1) for centre in (-3, 3)]
    truth = np.logaddexp(*(-d / 2 for d in distances)) - np.log(4 * np.pi)
    assert 0 < truth.mean() - model.score(test) / len(test) < 0.25
    drawn = model.sample(2000, random_state=1)
    assert abs((drawn[:, 0] > 0).mean() - 0.5) < 0.06


def test_a_row_is_scored_alone(model):
    x = np.random.RandomState(1).normal(3, 2, size=(8, 2))
    together = model.score_samples(np.vstack([x, [[1e3, -1e3]]]))[:-1]
    order = np.random.RandomState(2).permutation(8)
    alone = np.concatenate([model.score_samples(row[None]) for row in x])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-10)
    np.testing.assert_allclose(model.score_samples(x[order]), together[order], rtol=0, atol=1e-10)
    assert model.score(x) == pytest.approx(together.sum())


def test_the_density_integrates_to_one(rows):
    model = CNFDensity(**{**SMALL, "accuracy": 1e-4}).fit(rows[:, :1])
    grid = np.linspace(-20, 26, 4001)
    density = np.exp(model.score_samples(grid[:, None]))
    assert density.sum() * (grid[1] - grid[0]) == pytest.approx(1, abs=1e-6)


def test_the_fitted_flow_is_what_scores(model, rows):
    with torch.no_grad():
        expected = model.flow_.log_prob(torch.from_numpy(rows)).numpy()
    np.testing.assert_array_equal(model.score_samples(rows), expected)
    assert model.flow_.likelihood == "exact"
    assert len(model.history_.step) == 5
    assert model.n_features_in_ == 2


def test_a_value_that_many_rows_share_is_pointed_out_in_the_units_and_names_of_the_user(rows):
    x = np.where(np.arange(60)[:, None] < 30, [7.5, 0.0] * np.ones((60, 1)), rows)
    with pytest.warns(DegenerateDataWarning, match=r"share a value of size \(7\.5 in 50 %\)"):
        CNFDensity(**SMALL).fit(frame(np.column_stack([x[:, 0], rows[:, 1]]), ["size", "mass"]))


@pytest.mark.parametrize("factor", [3e-45, 1e-46, 1e38])
def test_weights_of_any_scale_give_the_same_density(rows, factor):
    weight = np.random.RandomState(2).rand(60)
    scores = [
        CNFDensity(**SMALL).fit(rows, sample_weight=each * weight).score_samples(rows)
        for each in (1.0, factor)
    ]
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:X has values far outside")
@pytest.mark.parametrize("unit", [1e-300, 1e300])
def test_the_unit_of_the_rows_changes_the_density_by_its_factor_alone(model, rows, unit):
    found = CNFDensity(**SMALL).fit(unit * rows).score_samples(unit * rows)
    expected = model.score_samples(rows) - 2 * np.log(unit)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)


def test_rows_that_hardly_count_do_not_set_the_scale(rows):
    far, weight = np.full((5, 2), 1e5), np.r_[np.ones(60), np.full(5, 1e-12)]
    with pytest.warns(DegenerateDataWarning, match="far outside of all others"):
        model = CNFDensity(**SMALL).fit(np.vstack([rows, far]), sample_weight=weight)
    np.testing.assert_allclose(model.flow_.chain[0].log_std.exp(), rows.std(0), rtol=0.05)


def test_the_random_state_decides(rows):
    scores = {}
    for name, state in {
        "0": 0,
        "0 again": 0,
        "generator of 0": np.random.RandomState(0),
        "1": 1,
    }.items():
        scores[name] = CNFDensity(**{**SMALL, "random_state": state}).fit(rows).score(rows)
    assert scores["0"] == scores["0 again"] == scores["generator of 0"] != scores["1"]


def test_none_is_numpy_s_global_random_state(rows):
    scores = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        scores.append(CNFDensity(**{**SMALL, "random_state": None}).fit(rows).score(rows))
    assert scores[0] == scores[1] != scores[2]


def test_torch_s_global_state_is_left_alone(rows):
    before = torch.get_rng_state(), torch.get_default_dtype()
    model = CNFDensity(**SMALL).fit(rows)
    model.partial_fit(rows)
    model.sample(3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_default_dtype() == before[1]


def test_samples_follow_the_random_state(model):
    first, again, other = (model.sample(4, random_state=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert model.sample().shape == (1, 2)


def test_numbers_do_not_depend_on_the_default_dtype(model, rows):
    expected = model.score_samples(rows), model.sample(3, random_state=0)
    torch.set_default_dtype(torch.float64)
    np.testing.assert_array_equal(model.score_samples(rows), expected[0])
    np.testing.assert_array_equal(model.sample(3, random_state=0), expected[1])


def through_joblib(model):
    file = io.BytesIO()
    joblib.dump(model, file)
    file.seek(0)
    return joblib.load(file)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - our own


@pytest.mark.parametrize("keep", [through_pickle, through_joblib, copy.deepcopy])
def test_a_kept_model_scores_the_same(keep, model, rows):
    kept = keep(model)
    np.testing.assert_array_equal(kept.score_samples(rows), model.score_samples(rows))
    np.testing.assert_array_equal(kept.sample(3, random_state=0), model.sample(3, random_state=0))
    kept.partial_fit(rows)


def test_a_pickle_from_before_a_setting_existed_has_its_default(model, rows):
    state = {**model.__getstate__()}
    del state["accuracy"]
    old = CNFDensity.__new__(CNFDensity)
    old.__setstate__(state)
    assert old.get_params() == {**model.get_params(), "accuracy": DensitySettings.accuracy}
    np.testing.assert_array_equal(old.score_samples(rows), model.score_samples(rows))


def test_it_works_in_a_pipeline(rows):
    pipeline = make_pipeline(StandardScaler(), CNFDensity(**SMALL)).fit(rows)
    scaled = StandardScaler().fit_transform(rows)
    expected = clone(pipeline[-1]).fit(scaled).score_samples(scaled)
    np.testing.assert_array_equal(pipeline.score_samples(rows), expected)


def test_a_grid_search_finds_the_better_of_two(rows):
    line = rows @ [[1, 1], [0, 0.2]]
    model = CNFDensity(**{**SMALL, **FAST, "validation_fraction": 0.0})
    search = GridSearchCV(model, {"matching_steps": [1, 60]}, cv=2)
    search.fit(line)
    assert search.best_params_ == {"matching_steps": 60}
    assert np.diff(search.cv_results_["mean_test_score"]) > 3
    assert search.best_estimator_.score_samples(rows).shape == (60,)


def test_processes_of_joblib_agree_with_this_one(rows, monkeypatch):
    monkeypatch.undo()  # the other processes calibrate in full
    arguments = {"cv": 2, "error_score": "raise"}
    here = cross_val_score(CNFDensity(**SMALL), rows, **arguments)
    there = cross_val_score(CNFDensity(**SMALL), rows, n_jobs=2, **arguments)
    np.testing.assert_allclose(there, here, rtol=1e-6)


def test_a_clone_has_the_parameters_and_no_flow(model):
    cloned = clone(model)
    assert cloned.get_params() == model.get_params()
    assert not hasattr(cloned, "flow_")


def test_weights_zero_and_rows_left_out_are_the_same(rows):
    weight = np.ones(60)
    weight[::3] = 0
    weighted = CNFDensity(**SMALL).fit(rows, sample_weight=weight)
    left_out = CNFDensity(**SMALL).fit(rows[weight > 0], sample_weight=weight[weight > 0])
    np.testing.assert_array_equal(weighted.score_samples(rows), left_out.score_samples(rows))


def test_a_weight_repeats_a_row():
    """The mean of the samples is that of the rows, repeated as often as they count."""
    x = np.random.RandomState(0).randn(300, 1)
    x[:100] += 3
    weight = np.where(np.arange(300) < 100, 6, 1)
    model = CNFDensity(**{**SMALL, **FAST}).fit(x, sample_weight=weight)
    drawn = model.sample(1000, random_state=0)
    assert abs(drawn.mean() - x.repeat(weight).mean()) < 0.5 < abs(drawn.mean() - x.mean()) - 0.4


def test_partial_fit_goes_on(rows):
    model = CNFDensity(**SMALL).partial_fit(rows)
    np.testing.assert_array_equal(
        model.score_samples(rows), CNFDensity(**SMALL).fit(rows).score_samples(rows)
    )
    first = model.flow_
    moved = rows + 2
    before = model.score(moved)
    for _ in range(2):
        model.partial_fit(moved)
    assert model.score(moved) > before
    assert model.history_.step == list(range(1, 8))
    assert model.history_.phase == [1, 1, 1, 1, 2, 3, 4]
    assert model.history_.seconds == sorted(model.history_.seconds)
    assert torch.equal(model.flow_.chain[0].mean, first.chain[0].mean)
    model.partial_fit(rows[:1])
    model.fit(rows)
    assert len(model.history_.step) == 5


def test_going_on_without_likelihood_steps_is_refused(rows):
    model = CNFDensity(**{**SMALL, "likelihood_steps": 0}).fit(rows)
    with pytest.raises(ValueError, match=r"likelihood_steps must be at least 1 .*; got 0"):
        model.partial_fit(rows)


def test_threads_do_not_disturb_each_other(rows):
    """Neither the random state of a fit nor torch's own."""
    models = [CNFDensity(**{**SMALL, "random_state": seed}) for seed in range(2)]
    alone = [clone(model).fit(rows).score(rows) for model in models]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda model: model.fit(rows).score(rows), models))
    assert torch.equal(torch.get_rng_state(), before)
    assert together == pytest.approx(alone, rel=1e-6)


def awkward_forms(x):
    """The same numbers in all the ways in which NumPy may keep them."""
    read_only = x.copy()
    read_only.flags.writeable = False
    wide = np.zeros((2 * len(x), 2 * x.shape[1]))
    wide[::2, ::2] = x
    return {
        "reversed": x[::-1].copy()[::-1],
        "read-only": read_only,
        "big-endian": x.astype(">f8"),
        "Fortran": np.asfortranarray(x)[:, ::-1].copy("F")[:, ::-1],
        "strided": wide[::2, ::2],
        "objects": x.astype(object),
        "list": x.tolist(),
        "masked nowhere": np.ma.masked_invalid(x),
        "tensor": torch.from_numpy(x),
        "columns": frame(x, ["a", "b"]),
    }


@pytest.mark.parametrize("form", awkward_forms(np.zeros((2, 2))))
@pytest.mark.filterwarnings("ignore:X (has|does not have valid) feature names")
def test_any_form_of_array_is_the_same_data(model, rows, form):
    x = awkward_forms(rows)[form]
    np.testing.assert_array_equal(model.score_samples(x), model.score_samples(rows))
    weight = np.arange(60.0)
    weight = {"reversed": weight[::-1].copy()[::-1], "big-endian": weight.astype(">f8")}.get(form)
    if weight is not None:
        fitted = CNFDensity(**SMALL).fit(x, sample_weight=weight).partial_fit(x)
        expected = CNFDensity(**SMALL).fit(rows, sample_weight=np.arange(60.0)).partial_fit(rows)
        assert fitted.score(x) == expected.score(rows)


NO_NUMBERS = {
    "masked": (np.ma.masked_less(np.array([[-999.0, 1], [2, 3]]), 0), "no masked values; got 1"),
    "masked rows": (list(np.ma.masked_less([[-999.0], [2.0]], 0)), "no masked values; got 1"),
    "records": (np.zeros(2, [("a", float)]), "got records"),
    "dates": (np.array([["2024-01-01"], ["2024-01-03"]], "datetime64[D]"), "got dates or times"),
    "durations": (np.array([[1], [2]], "timedelta64[s]"), "got dates or times"),
    "objects of dates": ([[datetime.date(2024, 1, 1)], [datetime.date(2024, 1, 2)]], "got dates"),
    "text": (np.array([["1.5"], ["2.5"]]), "got text"),
    "objects of text": (np.array([["1.5"], [2.5]], object), "got text"),
    "list of text": ([["1.5"], ["2.5"]], "got text"),
    "bytes": (np.array([[b"1.5"], [b"2.5"]]), "got text"),
    "long whole numbers": (np.array([[1], [2**53 + 1]]), "would become 9007199254740992"),
    "list of long numbers": ([[0.5], [2**53 + 1]], "would become 9007199254740992"),
    "longer ones": ([[0.5], [10**400]], "must be at most 3.4e+38"),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_array_of_numbers_is_refused(name):
    values, message = NO_NUMBERS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        CNFDensity(**SMALL).fit(values)
    if "long" not in name and np.ndim(values) == 2:
        x = np.random.RandomState(0).rand(len(values), 1)
        weight = [row[0] for row in values] if isinstance(values, list) else values[:, 0]
        with pytest.raises(ValueError, match="sample_weight must .*" + re.escape(message)):
            CNFDensity(**SMALL).fit(x, sample_weight=weight)


@pytest.mark.filterwarnings("ignore::cnf.data.degeneracy.DegenerateDataWarning")
@pytest.mark.parametrize(("value", "count"), [(1e20, 1), (-999.0, 1), (-999.0, 12), (4000.0, 1)])
def test_values_that_stand_for_missing_ones_are_pointed_out(value, count):
    x = np.random.RandomState(0).normal(3, 2, size=(500, 2))
    x[100 : 100 + count, 1] = value
    message = f"X has values far outside .*: {value:g} in {count} of 500 rows of 'b'. Drop"
    with pytest.warns(UserWarning, match=message.replace("+", r"\+")):
        CNFDensity(**{**SMALL, "matching_steps": 0}).fit(frame(x, ["a", "b"]))


def test_names_of_columns_are_kept_and_compared(rows):
    model = CNFDensity(**SMALL).fit(frame(rows, ["height", "width"]))
    assert model.feature_names_in_.tolist() == ["height", "width"]
    model.score_samples(frame(rows, ["height", "width"]))
    with pytest.raises(ValueError, match="names should match"):
        model.score_samples(frame(rows, ["width", "height"]))


def test_a_constant_column_is_named(rows):
    x = np.column_stack([rows, np.full(60, 0.1)])
    with pytest.raises(ValueError, match=r"vary in every column.*'2' \(always 0\.1\)"):
        CNFDensity(**SMALL).fit(x)
    with pytest.raises(ValueError, match=r"vary in every column.*'depth' \(always 0\.1\)"):
        CNFDensity(**SMALL).fit(frame(x, ["height", "width", "depth"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.ones((1, 2))}, "1 sample"),
        ({"X": np.array([[1.0, np.nan], [2.0, 3.0]])}, "NaN"),
        ({"X": np.array([[1.7e308, 1.0], [-1.7e308, 2.0]])}, "too large in [0]"),
        ({"X": np.array([[1e-310, 1.0], [2e-310, 2.0]])}, "too small in [0]"),
        ({"sample_weight": np.ones(3)}, "sample_weight must have shape (60,)"),
        ({"sample_weight": np.full(60, -1.0)}, "sample_weight must not be negative; got -1"),
        ({"sample_weight": np.eye(60)[0]}, "positive for at least 2 rows; got 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_bad_data_are_refused(rows, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CNFDensity(**SMALL).fit(**{"X": rows, **change})


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"matching_steps": -1}, ValueError, "matching_steps must be at least 0; got -1"),
        ({"hidden_features": "many"}, TypeError, "hidden_features must be widths such as"),
        ({"hidden_features": 8}, TypeError, "hidden_features must be widths such as"),
        ({"hidden_features": (8, "8")}, TypeError, "each of hidden_features must be an int"),
        ({"validation_fraction": 2}, ValueError, "validation_fraction must be in [0, 1); got 2"),
        ({"random_state": "zero"}, ValueError, "'zero' cannot be used to seed"),
    ],
)
def test_bad_parameters_are_refused_by_fit(rows, shapes_unchecked, wrong, error, message):
    model = CNFDensity(**{**SMALL, **wrong})
    with pytest.raises(error, match=re.escape(message)):
        model.fit(rows)


def test_widths_may_be_an_array(rows, shapes_unchecked):
    array = CNFDensity(**{**SMALL, "hidden_features": np.array([8, 8])}).fit(rows)
    assert array.score(rows) == CNFDensity(**SMALL).fit(rows).score(rows)


def test_nothing_is_scored_or_drawn_before_fit(rows):
    for ask in (CNFDensity().score_samples, CNFDensity().score):
        with pytest.raises(NotFittedError):
            ask(rows)
    with pytest.raises(NotFittedError):
        CNFDensity().sample()


def test_no_samples_are_refused(model):
    with pytest.raises(ValueError, match="n_samples must be at least 1; got 0"):
        model.sample(0)


@pytest.mark.parametrize("method", ["fit", "partial_fit", "score_samples"])
@pytest.mark.parametrize(("value", "told"), [(np.nan, "NaN, a missing value,"), (np.inf, "inf")])
@pytest.mark.parametrize("named", [False, True])
def test_the_place_of_a_value_that_is_not_finite_is_told(method, value, told, named):
    x = np.random.RandomState(0).normal(size=(30, 2))
    bad = x.copy()
    bad[[3, 7], 1] = value
    if named:
        x, bad = (frame(rows, ["size", "mass"]) for rows in (x, bad))
    model = CNFDensity(matching_steps=1, likelihood_steps=1, hidden_features=(4,))
    model.fit(x)
    column = "'mass'" if named else "1"
    message = rf"X must be finite; got {told} in row 3 \(from 0\), column {column}; 2 in all"
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(bad)


def test_rows_that_are_too_few_are_told_of_by_name():
    x = np.random.RandomState(0).normal(size=(3, 2))
    with pytest.raises(ValueError, match="X must have at least 2 rows; got 1 sample"):
        CNFDensity().fit(x[:1])
    message = r"X must leave at least 2 rows to train on; got 3, and .*=0.7 leaves 1"
    with pytest.raises(ValueError, match=message):
        CNFDensity(validation_fraction=0.7).fit(x)
