"""Laws of the command line: what it writes, what it says, and what it leaves alone."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from zoo import perturbed

from cnf import CNF, Flow, History, ODESolver, TrainingError, load
from cnf.cli.main import main
from cnf.data.table_files import read_table, write_table
from cnf.tables.model import TableModel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_calibration")]

SMALL = [
    *("--matching-steps", "3", "--likelihood-steps", "1"),
    *("--hidden-features", "8", "8", "--accuracy", "0.1"),
]


@pytest.fixture(autouse=True)
def _single_precision():
    """As a user runs it."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tables, and models fitted to them; to be read only."""
    folder = tmp_path_factory.mktemp("models")
    random = np.random.RandomState(0)
    x = random.normal(size=(60, 2)) @ [[1, 1], [0, 0.3]]
    table = np.column_stack([np.exp(x[:, 0]), x[:, 1], random.poisson(3, 60), random.rand(60)])
    write_table(folder / "data.csv", table, ["size", "mass", "count", "share"])
    for name, *options in (
        ("plain", "--columns", "size", "mass"),
        ("one", "--columns", "mass"),
        ("mixed", "--support", "size=positive", "count=integer", "share=interval:0:1"),
        ("given", "--columns", "mass", "size", "--context-columns", "share", "count"),
    ):
        assert run("fit", folder / "data.csv", "--out", folder / name, *options, *SMALL) == 0
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def error_of(capsys, *arguments, code=1):
    """The one line that a command fails with."""
    capsys.readouterr()
    assert run(*arguments) == code
    said = capsys.readouterr().err
    assert said.startswith("cnf: ")
    assert said.count("\n") == 1
    return said


def content(folder):
    """Every file in a folder, hidden ones too."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fit_writes_a_model_and_says_how_good_it_is(folder, tmp_path, capsys):
    options = ["--columns", "size", "mass", "--validation-fraction", "0.5"]
    assert run("fit", folder / "data.csv", "--out", tmp_path / "m", *options, *SMALL) == 0
    said = capsys.readouterr().out
    assert said.startswith("60 rows of size, mass\nNLL of 30 held-out rows, in nats:\n  flow ")
    written = {path.name for path in (tmp_path / "m").iterdir()}
    assert written == {"model.safetensors", "model.json", "history.csv"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert load(tmp_path / "m" / "model.safetensors").features == 2
    assert History.load(tmp_path / "m" / "history.csv").phase == [1, 1, 1, 2]
    kept = json.loads((tmp_path / "m" / "model.json").read_text())
    assert kept["columns"]["names"] == ["size", "mass"]
    assert kept["notes"]["settings"]["matching_steps"] == 3
    for number in (kept["notes"]["nll"]["flow"], kept["notes"]["nll"]["gaussian"]):
        assert f"{number:.4f} ±" in said


def test_the_nll_is_that_of_the_rows(folder, tmp_path, capsys):
    options = ["--columns", "size", "mass", "--validation-fraction", "0", *SMALL]
    run("fit", folder / "data.csv", "--out", tmp_path / "m", *options)
    said = capsys.readouterr().out
    run("score", tmp_path / "m", folder / "data.csv", "--out", tmp_path / "s.csv")
    scores = read_table(tmp_path / "s.csv").values
    assert f"NLL of 60 training rows, in nats:\n  flow      {-scores.mean():.4f}" in said
    x = read_table(folder / "data.csv", ["size", "mass"]).values
    gaussian = -np.linalg.slogdet(2 * np.pi * np.e * np.cov(x.T)).logabsdet / 2
    # The mean squared length of the rows is 2 (n - 1) / n, where the entropy takes 2.
    assert f"Gaussian  {-gaussian - 1 / 60:.4f}" in said


def test_the_flow_in_the_folder_takes_contexts_as_they_are_in_the_table(folder, tmp_path):
    run("score", folder / "given", folder / "data.csv", "--out", tmp_path / "s.csv")
    flow = load(folder / "given" / "model.safetensors")
    x, context = (
        torch.from_numpy(read_table(folder / "data.csv", names).values)
        for names in (["mass", "size"], ["share", "count"])
    )
    with torch.no_grad():
        found = flow.log_prob(x, context)
    np.testing.assert_allclose(
        found, read_table(tmp_path / "s.csv").values[:, 0], rtol=0, atol=1e-9
    )


def test_the_gaussian_beside_a_conditional_density_is_conditional(folder, capsys, tmp_path):
    options = ["--columns", "mass", "--context-columns", "share", "--validation-fraction", "0"]
    run("fit", folder / "data.csv", "--out", tmp_path / "m", *options, *SMALL)
    said = capsys.readouterr().out
    table = read_table(folder / "data.csv", ["mass", "share"]).values
    design = np.column_stack([np.ones(60), table[:, 1]])
    _, (squares,), *_ = np.linalg.lstsq(design, table[:, 0], rcond=None)
    # Of the least squares, but for the degrees of freedom that covariances count.
    nll = 0.5 * np.log(2 * np.pi * squares / 59) + 59 / 60 / 2
    assert "60 rows of mass given share" in said
    assert f"Gaussian  {nll:.4f}" in said


def test_the_same_seed_fits_the_same_model(folder, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ["--columns", "mass", "--seed", seed]
        run("fit", folder / "data.csv", "--out", tmp_path / name, *options, *SMALL)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_columns_of_whole_numbers_that_recur_are_pointed_out(folder, tmp_path, capsys):
    rows = [[i + 0.5, i % 3, i] for i in range(40)]
    write_table(tmp_path / "data.csv", rows, ["a", "b", "c"])
    run("fit", tmp_path / "data.csv", "--out", tmp_path / "m", *SMALL)
    said = capsys.readouterr().out
    assert "note: column 'b' holds 3 different integers" in said
    assert "--support b=integer" in said
    assert "column 'a'" not in said
    assert "column 'c'" not in said
    options = ["--support", "b=integer", "--force"]
    run("fit", tmp_path / "data.csv", "--out", tmp_path / "m", *options, *SMALL)
    assert "note:" not in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_values_that_stand_for_missing_ones_are_pointed_out(tmp_path, capsys):
    table = np.random.default_rng(0).normal(size=(60, 2))
    table[7, 1] = 1e20
    write_table(tmp_path / "data.csv", table, ["a", "b"])
    run("fit", tmp_path / "data.csv", "--out", tmp_path / "m", *SMALL)
    said = capsys.readouterr().err
    assert "cnf: warning: " in said
    assert "data.csv has values far outside of all others" in said
    assert "1e+20 in 1 of 60 rows of 'b'" in said


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".npy"])
def test_scores_are_written_in_any_form(folder, tmp_path, capsys, suffix):
    out = tmp_path / f"scores{suffix}"
    assert run("score", folder / "plain", folder / "data.csv", "--out", out) == 0
    scores = read_table(out)
    assert scores.values.shape == (60, 1)
    assert f"mean {scores.values.mean():.4f} ±" in capsys.readouterr().out
    model = load(folder / "plain" / "model.safetensors")
    rows = torch.from_numpy(read_table(folder / "data.csv", ["size", "mass"]).values)
    expected = model.log_prob(rows).detach().numpy()
    np.testing.assert_allclose(scores.values[:, 0], expected, rtol=0, atol=1e-12)


def test_without_out_scores_go_to_stdout_and_all_else_to_stderr(folder, tmp_path, capsys):
    run("score", folder / "plain", folder / "data.csv", "--out", tmp_path / "scores.csv")
    capsys.readouterr()
    assert run("score", folder / "plain", folder / "data.csv") == 0
    said = capsys.readouterr()
    assert said.out == (tmp_path / "scores.csv").read_text()
    assert said.err.startswith("log-density of 60 rows: mean")


def test_scores_that_are_lower_bounds_are_the_same_each_time(folder, capsys):
    said = []
    for _ in range(2):
        assert run("score", folder / "mixed", folder / "data.csv") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize("between", [",", ",remark,"])
def test_columns_are_found_by_name(folder, tmp_path, capsys, between):
    table = read_table(folder / "data.csv", ["mass", "size"])
    lines = [f"{mass!r}{between}{size!r}" for mass, size in table.values.tolist()]
    (tmp_path / "other.csv").write_text("\n".join([f"mass{between}size", *lines]))
    run("score", folder / "plain", folder / "data.csv")
    expected = capsys.readouterr().out
    assert run("score", folder / "plain", tmp_path / "other.csv") == 0
    assert capsys.readouterr().out == expected


def test_rows_outside_the_support_have_no_density(folder, tmp_path, capsys):
    rows = [[-1, 0, 1, 0.5], [1, 0, 1, 0.5], [1, 0, 1.5, 0.5], [1, 0, 1, 2]]
    write_table(tmp_path / "data.csv", rows, ["size", "mass", "count", "share"])
    out = tmp_path / "scores.npy"
    assert run("score", folder / "mixed", tmp_path / "data.csv", "--out", out) == 0
    assert (np.load(out) == -np.inf).ravel().tolist() == [True, False, True, True]
    assert "1 rows: mean" in (said := capsys.readouterr().out)
    assert "-inf for 3 rows outside the support" in said
    write_table(tmp_path / "data.csv", [rows[0]], ["size", "mass", "count", "share"])
    assert run("score", folder / "mixed", tmp_path / "data.csv", "--out", out, "--force") == 0
    assert capsys.readouterr().out == "log-density of 0 rows; -inf for 1 rows outside the support\n"


def test_rows_outside_the_support_are_not_certified(folder, tmp_path, capsys):
    rows = np.tile([1.0, 0, 1, 0.5], (9, 1))
    rows[6, 2] = 1.5
    write_table(tmp_path / "data.csv", rows, ["size", "mass", "count", "share"])
    said = error_of(capsys, "certify", folder / "mixed", tmp_path / "data.csv")
    assert "data.csv, line 8, column 'count': must be integer" in said
    assert "got 1.5. 1 of 9 rows are not" in said


def test_one_held_out_row_has_no_standard_error(folder, tmp_path, capsys):
    lines = (folder / "data.csv").read_text().splitlines()
    (tmp_path / "data.csv").write_text("\n".join(lines[:13]))
    options = ["--columns", "size", "mass", *SMALL]
    assert run("fit", tmp_path / "data.csv", "--out", tmp_path / "m", *options) == 0
    said = capsys.readouterr().out
    assert "NLL of 1 held-out rows" in said
    assert "±" not in said
    kept = json.loads((tmp_path / "m" / "model.json").read_text())
    assert kept["notes"]["nll"]["standard_error"] is None
    run("score", tmp_path / "m", tmp_path / "data.csv")
    assert "nan" not in capsys.readouterr().err


@pytest.mark.parametrize("model", ["plain", "mixed"])
def test_samples_can_be_scored(folder, tmp_path, model):
    out = tmp_path / "samples.csv"
    assert run("sample", folder / model, "-n", 50, "--out", out, "--seed", 3) == 0
    assert read_table(out).values.shape == (50, 2 if model == "plain" else 4)
    scores = tmp_path / "scores.npy"
    assert run("score", folder / model, out, "--out", scores) == 0
    assert np.isfinite(np.load(scores)).all()


def test_samples_follow_the_seed(folder, capsys):
    said = []
    for seed in (0, 0, 1):
        assert run("sample", folder / "plain", "-n", 4, "--seed", seed) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert said[0].startswith("size,mass\n")
    assert said[0].count("\n") == 5


def test_samples_of_a_conditional_density_stand_beside_their_context(folder, tmp_path, capsys):
    out = tmp_path / "samples.csv"
    context = ["--context", "count=4", "share=0.25"]
    assert run("sample", folder / "given", "-n", 5, "--out", out, *context) == 0
    table = read_table(out)
    assert table.columns == ("mass", "size", "share", "count")
    assert table.values[:, 2:].tolist() == [[0.25, 4]] * 5
    assert run("score", folder / "given", out) == 0
    assert "'count', 'share'" in error_of(capsys, "sample", folder / "given").replace(
        "'share', 'count'", "'count', 'share'"
    )
    assert "got 'size'" in error_of(capsys, "sample", folder / "plain", "--context", "size=1")


def test_certify_prints_the_report(folder, capsys):
    for model in ("one", "given"):
        assert run("certify", folder / model, folder / "data.csv", "--rows", 20) == 0
        said = capsys.readouterr().out
        assert said.startswith("likelihood: exact, on 20 rows")
        assert "round_trip" in said


def test_certify_fails_for_a_model_that_is_not_to_be_trusted(folder, tmp_path, capsys):
    made = tmp_path / "m"
    assert run("fit", folder / "data.csv", "--out", made, "--columns", "mass", *SMALL) == 0
    model = TableModel.load(made)
    coarse = ODESolver(method="euler", steps=1)
    flow = perturbed(CNF(1, hidden_features=(8, 8)), 0.5).double().using(solver=coarse)
    flow.transforms[0].keep_identity()
    replace(model, flow=flow).save(made, History(), replace=True)
    capsys.readouterr()
    assert run("certify", made, folder / "data.csv") == 1
    assert "\nfail " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("plain", []),
        ("plain", ["DATA"]),
        ("plain", ["DATA", "--columns", "mass"]),
        ("one", []),
        ("one", ["DATA"]),
        ("mixed", ["DATA"]),
        ("mixed", []),
        ("given", ["DATA"]),
        ("given", ["--context", "share=0.5", "count=2"]),
    ],
    ids=str,
)
def test_plot_draws_every_kind_of_model(folder, tmp_path, model, options):
    options = [str(folder / "data.csv") if option == "DATA" else option for option in options]
    out = tmp_path / "picture.png"
    assert run("plot", folder / model, *options, "--out", out, "--rows", 50) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_plot_refuses_what_it_cannot_draw(folder, tmp_path, capsys):
    out = ["--out", tmp_path / "p.png"]
    both = [folder / "data.csv", "--context", "share=0.5", "count=2"]
    assert "not both" in error_of(capsys, "plot", folder / "given", *both, *out)
    assert "got none" in error_of(capsys, "plot", folder / "given", *out)
    columns = ["--columns", "depth"]
    assert "got 'depth'" in error_of(capsys, "plot", folder / "plain", *out, *columns)


GOOD = "size,mass\n1,2\n3,5\n4,4\n"

MALFORMED = {
    "missing column": ("size,weight\n1,2\n3,4\n", "data.csv, line 1: has no column 'mass'"),
    "text": ("size,mass\n1,2\n3,red\n", "data.csv, line 3, column 'mass': must be a number"),
    "empty": ("", "data.csv, line 1: must hold a table; the file is empty"),
    "header only": ("size,mass\n", "data.csv, line 2: must hold numbers"),
    "NaN": (
        "size,mass\n1,2\nnan,3\n",
        "data.csv, line 3, column 'size': must be a number; got nan",
    ),
    "huge": ("size,mass\n1,2\n1e300,3\n", "data.csv, line 3, column 'size': must be at most"),
    "UTF-16": (GOOD.encode("utf-16"), "data.csv, line 1, column 1: must be UTF-8 text"),
    "latin-1": ("size,mass\n1,2\n3,4µ\n".encode("latin-1"), "data.csv, line 3, column 2: must be"),
    "ragged": ("size,mass\n1,2\n3\n", "data.csv, line 3, column 1: must be the last of 2 cells"),
    "empty cell": ("size,mass\n1,2\n3,\n", "data.csv, line 3, column 'mass': must be a number"),
    "same name": (
        "size,size,mass\n1,2,3\n4,5,6\n",
        "data.csv, line 1, column 2: must have a unique name",
    ),
}
UNFIT = {
    "constant column": ("size,mass\n1,2\n3,2\n", "must vary in every column", "'mass' (always 2)"),
    "one row": ("size,mass\n1,2\n", "must have at least 2 rows to fit; got 1", "data.csv"),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("command", ["fit", "score", "certify", "plot"])
def test_a_malformed_file_is_named_with_line_and_column(folder, tmp_path, capsys, command, name):
    text, message = MALFORMED[name]
    (tmp_path / "data.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = content(tmp_path)
    data, model = tmp_path / "data.csv", folder / "plain"
    arguments = {
        "fit": [data, "--out", tmp_path / "m", "--columns", "size", "mass"],
        "score": [model, data, "--out", tmp_path / "s.csv"],
        "certify": [model, data],
        "plot": [model, data, "--out", tmp_path / "p.png"],
    }[command]
    assert message in error_of(capsys, command, *arguments)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", UNFIT)
def test_a_table_that_has_no_density_is_refused(tmp_path, capsys, name):
    text, *messages = UNFIT[name]
    (tmp_path / "data.csv").write_text(text)
    said = error_of(capsys, "fit", tmp_path / "data.csv", "--out", tmp_path / "m")
    assert all(message in said for message in messages)
    assert not (tmp_path / "m").exists()


def test_a_byte_order_mark_is_skipped(folder, tmp_path, capsys):
    for encoding in ("utf-8", "utf-8-sig"):
        data = tmp_path / f"{encoding}.csv"
        data.write_text(GOOD, encoding=encoding)
        assert run("fit", data, "--out", tmp_path / encoding, *SMALL) == 0
        assert "3 rows of size, mass\n" in capsys.readouterr().out
        assert run("score", folder / "plain", data) == 0
        assert capsys.readouterr().out.count("\n") == 4


def test_columns_and_contexts_must_be_different_columns_of_the_table(folder, tmp_path, capsys):
    for options, message in {
        ("--columns", "size", "size"): "must be one or more different names",
        ("--columns", "size", "--context-columns", "size"): "must be one or more different names",
        ("--context-columns", "size", "mass", "count", "share"): "of at least one column",
        ("--context-columns", "depth"): "has no column 'depth'",
    }.items():
        arguments = ["fit", folder / "data.csv", "--out", tmp_path / "m", *options]
        assert message in error_of(capsys, *arguments)


def test_rows_outside_the_stated_support_are_named(folder, tmp_path, capsys):
    for support, message in {
        "mass=positive": "column 'mass': must be positive",
        "size=integer": "line 2, column 'size': must be integer",
        "count=interval:-1:3": "column 'count': must be from -1 to 3, the ends excluded",
        "count=periodic:0:3": "column 'count': must be from 0 to 3, the ends included",
        "depth=positive": "support must name columns of the density; got 'depth'",
    }.items():
        arguments = ["fit", folder / "data.csv", "--out", tmp_path / "m", "--support", support]
        assert message in error_of(capsys, *arguments)


def test_a_periodic_column_has_no_seam(tmp_path, capsys):
    generator = np.random.default_rng(0)
    hour = generator.normal(23.5, 2, 400) % 24
    counts = generator.poisson(5, 400)
    write_table(tmp_path / "data.csv", np.stack([hour, counts], -1), ["hour", "count"])
    support = ["--support", "hour=periodic:0:24", "count=integer"]
    steps = ["--matching-steps", "100", *SMALL[2:]]
    assert run("fit", tmp_path / "data.csv", "--out", tmp_path / "m", *support, *steps) == 0
    write_table(tmp_path / "ends.csv", [[0, 5], [24, 5], [12, 5]], ["hour", "count"])
    out = tmp_path / "scores.npy"
    assert run("score", tmp_path / "m", tmp_path / "ends.csv", "--out", out) == 0
    flow = TableModel.load(tmp_path / "m").flow
    assert flow.transforms[0].columns[0] == ("circle", 0, 24)  # and not cut open
    first, last, noon = np.load(out).ravel()
    assert abs(first - last) < 1e-3
    assert first > noon + 1
    capsys.readouterr()


def test_nothing_is_replaced_unasked(folder, tmp_path, capsys):
    data = folder / "data.csv"
    for command, name, *arguments in (
        ("fit", "m", data, "--columns", "mass", *SMALL),
        ("score", "s.csv", folder / "plain", data),
        ("sample", "x.csv", folder / "plain"),
        ("plot", "p.png", folder / "one", "--rows", 50),
    ):
        out = tmp_path / name
        assert run(command, *arguments, "--out", out) == 0
        before = content(tmp_path)
        assert "--force" in error_of(capsys, command, *arguments, "--out", out)
        assert content(tmp_path) == before
        assert run(command, *arguments, "--out", out, "--force") == 0
        assert content(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("other_name", ["itself", "spelling", "symlink", "hard link"])
def test_what_is_read_is_never_written_over(folder, tmp_path, capsys, other_name):
    model, data = tmp_path / "model", tmp_path / "data.csv"
    shutil.copytree(folder / "plain", model)
    data.write_bytes((folder / "data.csv").read_bytes())

    def same(path, name):
        out = tmp_path / name
        if other_name == "itself":
            return path
        if other_name == "spelling":
            return path.parent / ".." / path.parent.name / path.name
        (out.symlink_to if other_name == "symlink" else out.hardlink_to)(path)
        return out

    out = same(data, "out.csv")
    kept = [content(tmp_path), sorted(tmp_path.iterdir())]
    for command, *arguments in (
        ("score", model, data, "--out", out),
        ("score", model, out, "--out", data),
        ("score", model, data, "--out", model / "history.csv"),
        ("sample", model, "--out", model / "history.csv"),
        ("fit", model / "history.csv", "--columns", "loss", "--out", model),
    ):
        assert "must not be a file that is read" in error_of(capsys, command, *arguments, "--force")
    assert [content(tmp_path), sorted(tmp_path.iterdir())] == kept
    if "link" in other_name:
        picture = same(data, "picture.png")
        said = error_of(capsys, "plot", model, data, "--out", picture, "--force")
        assert "must not be a file that is read" in said


FORCE = {"score": ["--force"], "plot": ["--force"], "certify": []}


@pytest.mark.filterwarnings("default")
def test_a_header_of_numbers_is_asked_about(folder, tmp_path, capsys):
    data = tmp_path / "data.csv"
    random = np.random.default_rng(0)
    write_table(data, random.normal(size=(20, 3)), ["1100", "1102", "1104"])
    arguments = ["fit", data, *SMALL]
    said = error_of(capsys, *arguments, "--out", tmp_path / "m")
    assert "data.csv, line 1: must be clearly names or a row of numbers" in said
    assert run(*arguments, "--header", "--out", tmp_path / "a") == 0
    assert "20 rows of 1100, 1102, 1104\n" in capsys.readouterr().out
    assert run(*arguments, "--no-header", "--out", tmp_path / "b") == 0
    assert "21 rows of x1, x2, x3\n" in capsys.readouterr().out
    for command, *rest in (("score",), ("certify", "--rows", "2"), ("plot", "--rows", "9")):
        out = [] if command == "certify" else ["--out", tmp_path / f"{command}.png"]
        out = ["--out", tmp_path / "s.csv"] if command == "score" else out
        # The names of the model stand in the first line, which is therefore a header.
        assert run(command, tmp_path / "a", data, *rest, *out) in (0, 1)
        assert capsys.readouterr().err == ""
        assert run(command, tmp_path / "b", data, "--no-header", *rest, *out, *FORCE[command]) in (
            0,
            1,
        )
        assert capsys.readouterr().err == ""
        assert "--no-header" in error_of(
            capsys, command, tmp_path / "b", data, *out, *FORCE[command]
        )
    write_table(data, random.normal(size=(20, 3)))
    assert run(*arguments, "--out", tmp_path / "c") == 0
    warning = (
        "data.csv, line 1 holds numbers and was read as a row, so the columns are called x1, x2"
    )
    assert warning in capsys.readouterr().err


def test_wide_tables_do_not_flood_the_terminal(folder, tmp_path, capsys):
    names = [f"{'sensor ' * 20}{i}" for i in range(200)]
    rows = np.random.default_rng(0).integers(0, 3, (12, 200))
    write_table(tmp_path / "data.csv", rows, names)
    assert run("fit", tmp_path / "data.csv", "--out", tmp_path / "m", *SMALL) == 0
    assert len(capsys.readouterr().out) < 3000
    model = ["sample", tmp_path / "m", "--context", "a=1"]
    assert "got 'a'" in error_of(capsys, *model)
    wrong = ["fit", tmp_path / "data.csv", "--out", tmp_path / "n"]
    for arguments in (
        [*wrong, "--support", "depth=positive"],
        [*wrong, "--columns", "depth"],
        ["score", tmp_path / "m", folder / "data.csv"],
        ["plot", tmp_path / "m", "--columns", "depth", "--out", tmp_path / "p.png"],
    ):
        said = error_of(capsys, *arguments)
        assert len(said) < 1500


def test_names_and_contexts_are_drawn_as_they_are(tmp_path, capsys):
    names = ["$x_1^2$", "$^$", r"$\alpha", "$^$_$"]
    write_table(tmp_path / "data.csv", np.random.default_rng(0).normal(size=(30, 4)), names)
    given = ["--context-columns", "$^$_$"]
    assert run("fit", tmp_path / "data.csv", "--out", tmp_path / "m", *given, *SMALL) == 0
    context = ["--context", "$^$_$=1", "--rows", "50"]
    assert run("plot", tmp_path / "m", *context, "--out", tmp_path / "p.png") == 0


def test_a_folder_with_other_files_is_never_replaced(folder, tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    arguments = ["fit", folder / "data.csv", "--out", tmp_path / "m", "--force"]
    assert "it contains 'thesis.tex'" in error_of(capsys, *arguments)
    (tmp_path / "f").write_text("a file")
    arguments = ["fit", folder / "data.csv", "--out", tmp_path / "f", "--force"]
    assert "there is a file of that name" in error_of(capsys, *arguments)
    arguments = ["fit", folder / "data.csv", "--out", tmp_path / "no" / "m"]
    assert "there is no folder" in error_of(capsys, *arguments)
    arguments = ["sample", folder / "plain", "--out", tmp_path / "no" / "x.csv"]
    assert "there is no folder" in error_of(capsys, *arguments)
    arguments = ["sample", folder / "plain", "--out", tmp_path / "x.csv", "--force"]
    (tmp_path / "x.csv").mkdir()
    assert "is a folder" in error_of(capsys, *arguments)
    assert len(content(tmp_path)) == 2


@pytest.mark.parametrize("where", ["cnf.saving.save", "cnf.training.History.save"])
def test_an_interruption_while_writing_leaves_the_old_model(
    folder, tmp_path, capsys, monkeypatch, where
):
    arguments = ["fit", folder / "data.csv", "--out", tmp_path / "m", "--columns", "mass", *SMALL]
    assert run(*arguments) == 0
    before = content(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    assert error_of(capsys, *arguments, "--force", code=130) == "cnf: interrupted\n"
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_control_c_ends_a_fit_without_a_trace(folder, tmp_path):
    # Where the tests run in the background, a shell may have told them to ignore the signal.
    heeding = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"import signal, sys; {heeding}; from cnf.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "fit", folder / "data.csv"]
    with subprocess.Popen(
        [*command, "--matching-steps", "1000000", "--out", tmp_path / "m"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            assert process.stdout.readline() == "60 rows of size, mass, count, share\n"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    # A warning of these data may come before, by when the signal comes.
    assert process.returncode == 130
    assert [line for line in said.splitlines() if "warning" not in line] == ["cnf: interrupted"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "first"), [("log_prob", "score"), ("sample", "sample")])
def test_control_c_between_chunks_leaves_no_file(
    folder, tmp_path, capsys, monkeypatch, method, first
):
    monkeypatch.setattr("cnf.tables.fit._ROWS_AT_ONCE", 20)
    of_chunk, done = getattr(Flow, method), []

    def interrupted(*arguments, **options):
        if done:
            raise KeyboardInterrupt
        done.append(of_chunk(*arguments, **options))
        return done[-1]

    monkeypatch.setattr(Flow, method, interrupted)
    given = [folder / "data.csv"] if first == "score" else ["-n", 60]
    arguments = [first, folder / "plain", *given, "--out", tmp_path / "x.csv"]
    assert error_of(capsys, *arguments, code=130) == "cnf: interrupted\n"
    assert 20 in done[0].shape
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_gets_no_traceback(folder):
    command = [sys.executable, "-m", "cnf.cli", "score", folder / "plain", folder / "data.csv"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert b"Traceback" not in said


def test_an_error_is_one_line_and_debug_says_where(folder, tmp_path, capsys):
    arguments = ["score", folder / "plain", tmp_path / "no.csv"]
    assert error_of(capsys, *arguments).startswith("cnf: error: there is no file")
    assert run(*arguments, "--debug") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" in said.err
    assert "FileNotFoundError: there is no file" in said.err


@pytest.mark.filterwarnings("ignore::cnf.data.degeneracy.DegenerateDataWarning")
def test_failures_of_training_and_of_ours_are_told_apart(folder, tmp_path, capsys, monkeypatch):
    def fail(error):
        def failing(*_, **__):
            raise error

        monkeypatch.setattr("cnf.tables.fit.fit", failing)
        return error_of(capsys, "fit", folder / "data.csv", "--out", tmp_path / "m")

    assert fail(TrainingError("the loss\nis nan", History())) == "cnf: error: the loss is nan\n"
    assert fail(KeyError("x")) == "cnf: error: KeyError: 'x' (--debug shows where)\n"
    assert list(tmp_path.iterdir()) == []


def test_warnings_are_one_line_too(folder, capsys, monkeypatch):
    def warn(*_, **__):
        warnings.simplefilter("always")
        warnings.warn("mind\nthe gap", stacklevel=1)
        return torch.zeros(60)

    monkeypatch.setattr("cnf.tables.fit.log_prob", warn)
    assert run("score", folder / "plain", folder / "data.csv") == 0
    assert "cnf: warning: mind the gap\n" in capsys.readouterr().err


DAMAGES = {
    "no folder": (lambda model: None, "there is no model in"),
    "garbled": (lambda model: (model / "model.json").write_text("{"), "is damaged"),
    "no columns": (lambda model: (model / "model.json").write_text('{"format": 1}'), "is damaged"),
    "newer": (
        lambda model: edit(model, lambda kept: kept.update(format=9)),
        "has format 9, newer than the 2",
    ),
    "other columns": (
        lambda model: edit(model, lambda kept: kept["columns"].update(names=["size"])),
        "model.json' is damaged: its bytes changed since it was written",
    ),
    "cut short": (
        lambda model: (model / "model.safetensors").write_bytes(b"\0" * 9),
        "model.safetensors' is damaged",
    ),
}


def edit(model, change):
    path = model / "model.json"
    kept = json.loads(path.read_text())
    change(kept)
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused(folder, tmp_path, capsys, name):
    damage, message = DAMAGES[name]
    model = tmp_path / "m"
    if name != "no folder":
        model.mkdir()
        for path in (folder / "plain").iterdir():
            (model / path.name).write_bytes(path.read_bytes())
    damage(model)
    assert message in error_of(capsys, "sample", model)


@pytest.mark.parametrize("command", [[], ["fitt"]], ids=["none", "unknown"])
def test_a_wrong_command_is_answered_by_those_there_are(capsys, command):
    said = error_of(capsys, *command, code=2)
    assert "fit, score, sample, certify, plot, ablate" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "DATA"),
        (
            ["fit", "d.csv", "--out", "m", "--likelihood-steps", "-1"],
            "likelihood_steps must be at least 0; got -1",
        ),
        (["fit", "d.csv", "--out", "m", "--support", "age"], "support must be like COLUMN=VALUE"),
        (["fit", "d.csv", "--out", "m", "--support", "a=b"], "must be real, positive"),
        (["fit", "d.csv", "--out", "m", "--support", "a=interval:1:0"], "must be real, positive"),
        (["fit", "d.csv", "--out", "m", "--support", "a=interval:x:0"], "must be a finite number"),
        (["fit", "d.csv", "--out", "m", "--support", "a=real", "a=real"], "one value for each"),
        (["score", "m", "d.csv", "--out", "s.doc"], "out must end in .csv, .tsv, .npy"),
        (["sample", "m", "-n", "0"], "n must be at least 1; got 0"),
        (["sample", "m", "-n", "many"], "-n"),
        (["sample", "m", "--context", "a=nan"], "context must be a finite number; got 'nan'"),
        (["score", "m", "d.csv", "--header", "--no-header"], "one of --header and --no-header"),
        (["certify", "m", "d.csv", "--rows", "1"], "rows must be at least 2; got 1"),
        (["plot", "m", "--out", "p.jpg"], "out must end in .png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_answered_by_code_2(capsys, arguments, message):
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said


@pytest.mark.parametrize("command", ["fit", "score", "sample", "certify", "plot", "ablate"])
def test_every_option_is_explained(capsys, command):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert "--debug" in said
    assert "(required)" in said
    assert "Show no progress bar." in said


def test_help_and_version_are_printed(capsys):
    assert main(["--help"]) == main(["-h"]) == 0
    said = capsys.readouterr().out
    assert all(
        f"\n  {name} " in said for name in ("fit", "score", "sample", "certify", "plot", "ablate")
    )
    assert main(["--version"]) == 0
    assert capsys.readouterr().out[0].isdigit()


@pytest.mark.filterwarnings("ignore::cnf.data.degeneracy.DegenerateDataWarning")
def test_the_commands_of_the_docs_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.RandomState(0)
    height = random.uniform(1.5, 2, 60)
    age, weight, children = random.uniform(20, 90, 60), 80 * height - 60, random.poisson(2, 60)
    table = np.column_stack([age, height, weight + random.randn(60), children])
    write_table("people.csv", table, ["age", "height", "weight", "children"])
    text = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(commands) == 11
    for program, name, *arguments in commands:
        assert program == "cnf"
        assert run(name, *arguments, *{"fit": SMALL, "ablate": ["--quick"]}.get(name, [])) == 0


@pytest.mark.parametrize("spaced", [False, True])
def test_a_row_that_a_support_does_not_allow_is_named_by_its_line(tmp_path, capsys, spaced):
    """As an editor counts it, be there a header and blank lines, or neither."""
    lines = ["", "# a,b", "1.5,2", "", "2.5,3", "3,-4"] if spaced else ["1.5,2", "2.5,3", "3,-4"]
    path = tmp_path / "data.csv"
    path.write_text("\n".join(lines) + "\n")
    name = "b" if spaced else "x2"
    flags = [] if spaced else ["--no-header"]
    arguments = ["fit", path, *flags, "--out", tmp_path / "m", "--support", f"{name}=positive"]
    said = error_of(capsys, *arguments)
    assert f"data.csv, line {lines.index('3,-4') + 1}, column '{name}': must be positive" in said


def test_a_shell_is_told_of_options_and_not_of_arguments_of_python(tmp_path, capsys):
    path = tmp_path / "data.csv"
    path.write_text("2019,2020\n1,-5\n4,2\n")
    said = error_of(capsys, "fit", path, "--out", tmp_path / "m")
    assert "Please say --header if it holds names, --no-header if it is a row." in said
    path.write_text("name,2019\n1,-5\n4,2\n")
    said = error_of(capsys, "fit", path, "--out", tmp_path / "m")
    assert "If the line is a header, say so by --header." in said
    np.savez(tmp_path / "data.npz", a=np.eye(3), b=np.eye(3))
    said += error_of(capsys, "fit", tmp_path / "data.npz", "--out", tmp_path / "m")
    assert "Python" not in said
    assert "header=" not in said


def test_a_context_for_a_model_without_is_refused_in_words(folder, capsys):
    said = error_of(capsys, "sample", folder / "plain", "--context", "size=1")
    assert "context must be left out, because the model has no context columns; got 'size'" in said
