"""The experiment on tables: what it reads, what it compares with, what it writes."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture

from cnf import History, load
from cnf.data.splits import Splits
from cnf.data.table_files import write_table
from cnf.data.uci import BENCHMARKS
from experiments import tabular, tabular_data


@pytest.fixture(autouse=True)
def _single_precision():
    """As a user runs them."""
    torch.set_default_dtype(torch.float32)


def rows(count, seed=0, columns=3):
    """A Gaussian of which two columns are strongly correlated."""
    x = np.random.default_rng(seed).normal(size=(count, columns))
    x[:, 1] = 3 * x[:, 0] + 0.5 * x[:, 1] + 7
    return x


def npz(folder, name="table.npz", **changes):
    arrays = {"x_train": rows(300), "x_val": rows(60, 1), "x_test": rows(80, 2), **changes}
    np.savez(folder / name, **{k: v for k, v in arrays.items() if v is not None})
    return folder / name


@pytest.mark.slow
def test_tabular(tmp_path, capsys):
    settings = tabular.Settings(data=npz(tmp_path), quick=True, out=tmp_path, progress=False)
    results = tabular.main(settings)

    folder = tmp_path / "quick" / "table"
    assert json.loads((folder / "results.json").read_text()) == json.loads(
        json.dumps(asdict(results))
    )
    printed = capsys.readouterr().out
    assert all(str(found) in printed for found in (results.flow, results.gaussian, results.mixture))
    assert results.rows == (300, 60, 80)
    assert results.published == {}
    assert results.likelihood == "exact"
    assert len(History.load(folder / "history.csv").loss) == results.steps
    splits = tabular_data.read(settings.data, None).standardized()
    with torch.no_grad():
        log_prob = load(folder / "model.safetensors").log_prob(tabular.as_tensor(splits.test))
    assert results.flow.mean == pytest.approx(float(log_prob.mean()), abs=1e-4)
    error = float(log_prob.std()) / 80**0.5
    assert results.flow.two_standard_errors == pytest.approx(2 * error, abs=1e-4)


@pytest.mark.slow
def test_tabular_of_a_benchmark_from_the_command_line(run_program, tmp_path, capsys):
    (tmp_path / "power").mkdir()
    np.save(tmp_path / "power" / "data.npy", rows(400, columns=8))
    arguments = ["--quick", "--no-progress", "--out", tmp_path / "out", "--data", tmp_path]
    run_program("experiments.tabular", *arguments, "--name", "power")
    said = capsys.readouterr().out
    assert "6 columns; 324 rows to train on, 36 for validation, 40 for test" in said
    assert "FFJORD              0.46" in said
    with pytest.raises(SystemExit, match=r"^tabular: name must say which table[^\n]*$"):
        run_program("experiments.tabular", *arguments)


def test_tables_are_read_in_every_form(tmp_path):
    x = rows(100)
    read = tabular_data.read
    assert [len(part) for part in read(npz(tmp_path), None)] == [300, 60, 80]
    write_table(tmp_path / "table.csv", x, ["a", "b", "c"])
    shuffled = read(tmp_path / "table.csv", None)
    assert [len(part) for part in shuffled] == [81, 9, 10]
    assert (shuffled.test != x[90:]).any()
    np.savez(tmp_path / "head.npz", data=x)
    assert (read(tmp_path / "head.npz", "miniboone").test == x[90:]).all()
    raw = rows(50, columns=8)
    np.savez(tmp_path / "power.npz", data=raw, columns=list("abcdefgh"))
    folder = tmp_path / "benchmarks"
    (folder / "power").mkdir(parents=True)
    np.save(folder / "power" / "data.npy", raw)
    for part, same in zip(
        read(tmp_path / "power.npz", "power"), read(folder, "POWER"), strict=True
    ):
        assert (part == same).all()


def test_tables_that_are_wrong_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"name must be one of power, .*; got 'iris'"):
        tabular_data.read(tmp_path, "iris")
    with pytest.raises(ValueError, match=r"column 'x2': .* got nan"):
        tabular_data.read(npz(tmp_path, x_val=np.array([[0.0, np.nan]])), None)
    (tmp_path / "table.npz").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"table.npz must be a NumPy file"):
        tabular_data.read(tmp_path / "table.npz", None)
    with pytest.raises(ValueError, match=r"test must have 3 columns, .* got \(5, 2\)"):
        tabular_data.check_rows(Splits(rows(9), rows(9), rows(5, columns=2)))
    with pytest.raises(ValueError, match=r"train must have .* at least 5 rows; got \(4, 3\)"):
        tabular_data.check_rows(Splits(rows(4), rows(9), rows(5)))


def test_the_gaussian_of_a_gaussian_has_its_entropy():
    splits = Splits(rows(40_000), rows(2, 1), rows(40_000, 2))
    found = tabular.gaussian_of(splits)
    entropy = 1.5 * math.log(2 * math.pi * math.e) + math.log(0.5)
    assert abs(found.mean + entropy) < 2 * found.two_standard_errors
    one = Splits(*(part[:, :1] for part in splits))
    found = tabular.gaussian_of(one)
    assert abs(found.mean + 0.5 * math.log(2 * math.pi * math.e)) < 2 * found.two_standard_errors


def test_there_is_no_gaussian_of_columns_that_depend_on_each_other():
    splits = Splits(*(np.column_stack([part, part[:, 0]]) for part in (rows(50), rows(9), rows(9))))
    assert tabular.gaussian_of(splits) is None


def test_a_mixture_of_one_is_the_gaussian_and_the_best_on_validation_is_taken():
    splits = Splits(rows(500), rows(100, 1), rows(100, 2))
    settings = tabular.Settings(data=Path("any"), components=(1,))
    found, size = tabular.mixture_log_prob(splits, settings)
    assert size == 1
    covariance = np.cov(splits.train, rowvar=False, bias=True)
    gaussian = multivariate_normal(splits.train.mean(0), covariance).logpdf(splits.test)
    assert found == pytest.approx(gaussian, abs=1e-3)

    halves = Splits(*(np.concatenate([part - 9, part + 9]) for part in splits))
    settings = tabular.Settings(data=Path("any"), components=(1, 2, 2000))
    found, size = tabular.mixture_log_prob(halves, settings)
    assert size == 2
    by_hand = GaussianMixture(2, random_state=0).fit(halves.train).score_samples(halves.test)
    assert found == pytest.approx(by_hand)


def test_published_figures_name_their_papers():
    assert set(tabular_data.PUBLISHED) == set(BENCHMARKS)
    named = {model for figures in tabular_data.PUBLISHED.values() for model in figures}
    assert named == set(tabular_data.PAPERS)


@pytest.mark.slow
def test_a_budget_of_seconds_ends_the_training(tmp_path):
    splits = tabular_data.read(npz(tmp_path), None).standardized()
    phases = []
    for seconds in (0.001, 300.0):
        settings = tabular.Settings(
            data=tmp_path,
            hidden_features=(4,),
            matching_steps=5,
            patience=9,
            likelihood_steps=2,
            seconds=seconds,
            progress=False,
        )
        flow = tabular.build(splits, settings)
        phases.append(tabular.train(flow, splits, settings).phase)
    assert phases == [[1], [1] * 5 + [2] * 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"patience": 0}, "patience must be at least 1; got 0"),
        ({"components": ()}, "components must be one or more sizes"),
        ({"components": (5, 0)}, "each of components must be at least 1; got 0"),
        ({"seconds": 0.0}, r"seconds must be more than 0; got 0\.0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tabular.Settings(data=Path("any"), **changes)
