"""Laws of a model of named columns: what it selects, scales, keeps and refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from zoo import cnf

from cnf import History
from cnf._files import new_folder, write_atomically
from cnf.data.table_files import Table
from cnf.tables.model import Columns, TableModel, check_destination

TABLE = Table(np.arange(12.0).reshape(4, 3) ** 2, ("year", "size", "mass"))


def test_columns_and_contexts_are_as_in_the_table():
    columns = Columns.of(TABLE, ["mass", "year"])
    rows = columns.rows(TABLE)
    assert columns.names == ("size",)
    assert rows.x[:, 0].tolist() == TABLE.values[:, 1].tolist()
    assert rows.context.tolist() == TABLE.values[:, [2, 0]].tolist()
    given = columns.context({"year": TABLE.values[2, 0], "mass": TABLE.values[2, 2]})
    assert torch.equal(given, rows.context[2])


def test_columns_are_found_in_any_order():
    columns = Columns.of(TABLE, ["year"])
    turned = Table(TABLE.values[:, ::-1], TABLE.columns[::-1])
    found, expected = columns.rows(turned), columns.rows(TABLE)
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.context, expected.context)


def test_any_form_of_array_is_the_same_table():
    values = np.arange(6.0).reshape(3, 2)
    expected = Columns(names=("b", "a")).rows(Table(values, ("a", "b"))).x
    for form in (values[::-1].copy()[::-1], values.astype(">f8"), np.asfortranarray(values)):
        assert torch.equal(Columns(names=("b", "a")).rows(Table(form, ("a", "b"))).x, expected)
    with pytest.raises(ValueError, match=r"table\.values must have no masked values; got 1"):
        Columns(names=("a",)).rows(Table(np.ma.masked_equal(values, 4), ("a", "b")))


@pytest.mark.slow
def test_a_kept_model_is_the_same(tmp_path):
    columns = Columns.of(TABLE, ["year"])
    model = TableModel(flow=cnf(2, 1), columns=columns, notes={"größe": [1, None]})
    model.save(tmp_path / "model", History())
    kept = TableModel.load(tmp_path / "model")
    assert (kept.columns, kept.notes) == (columns, model.notes)
    with pytest.raises(ValueError, match=r"there is a model in .*--force"):
        model.save(tmp_path / "model", History())
    model.save(tmp_path / "model", History(), replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    rows = columns.rows(TABLE)
    assert torch.equal(
        kept.flow.log_prob(rows.x, rows.context), model.flow.log_prob(rows.x, rows.context)
    )


@pytest.mark.slow
def test_a_model_of_format_1_whose_contexts_were_scaled_outside_scores_as_before(tmp_path):
    columns, scale = Columns.of(TABLE, ["year"]), {"context_mean": [3.0], "context_std": [0.5]}
    flow, rows = cnf(2, 1), columns.rows(TABLE)
    expected = flow.log_prob(rows.x / 100, (rows.context - 3) / 0.5)
    TableModel(flow=flow, columns=columns).save(tmp_path / "model", History())
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    old = {**description, "format": 1, "columns": {**description["columns"], **scale}}
    del old["sha256"], old["flow_sha256"]
    (tmp_path / "model" / "model.json").write_text(json.dumps(old))
    with pytest.warns(UserWarning, match=r"model\.json' is from a version .* no digest.*again"):
        kept = TableModel.load(tmp_path / "model").flow
    torch.testing.assert_close(
        kept.log_prob(rows.x / 100, rows.context), expected, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"names": ()}, "at least one column"),
        ({"names": ("a", "a")}, "columns must differ; got 'a', 'a'"),
    ],
)
def test_columns_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Columns(**wrong)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"2 features and 1 context features.*got 3 and 0"):
        TableModel(flow=cnf(3), columns=Columns.of(TABLE, ["year"]))
    with pytest.raises(ValueError, match="the table has no column 'depth'; it has 'year', 'size'"):
        Columns.of(TABLE, ["depth"])


@pytest.fixture
def old(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    return tmp_path / "folder"


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def admit(_):
    """Let anything be replaced."""


def test_a_new_folder_replaces_the_old_one_at_the_end(old):
    with new_folder(old, check_old=admit) as temporary:
        (temporary / "new").write_text("new")
        assert files(old) == {"old"}
    assert files(old.parent) == {"folder/new"}
    (old.parent / "ordinary").mkdir()
    assert old.stat().st_mode == (old.parent / "ordinary").stat().st_mode


@pytest.mark.parametrize("when", [0, 1], ids=["before the old one is moved", "after"])
def test_a_failure_between_the_two_leaves_the_old_one(old, monkeypatch, when):
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == 1 + when:
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(OSError, match="the disk is gone"),
        new_folder(old, check_old=admit) as temporary,
    ):
        (temporary / "new").write_text("new")
    assert files(old.parent) == {"folder/old"}


def test_what_comes_meanwhile_is_not_lost(tmp_path, monkeypatch):
    """Neither before the folder takes its place, nor at the last moment."""
    model = TableModel(flow=cnf(2, 1), columns=Columns.of(TABLE, ["year"]))
    rename = Path.rename

    def late(self, target):
        if self == tmp_path / "late":
            (self / "thesis.tex").write_text("years of work")
        return rename(self, target)

    class Slow(History):
        def save(self, path):
            super().save(path)
            (tmp_path / "soon").mkdir()
            (tmp_path / "soon" / "thesis.tex").write_text("years of work")

    with pytest.raises(ValueError, match=r"soon' must be a new folder.*'thesis\.tex'"):
        model.save(tmp_path / "soon", Slow(), replace=True)
    model.save(tmp_path / "late", History())
    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(ValueError, match=r"late' must be a new folder.*'thesis\.tex'"):
        model.save(tmp_path / "late", History(), replace=True)
    assert {"soon/thesis.tex", "late/thesis.tex", "late/model.json"} <= files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"soon", "late"}


def test_a_file_that_comes_meanwhile_is_not_lost(tmp_path):
    write_atomically(tmp_path / "file", b"first", replace=False)
    with pytest.raises(FileExistsError, match=r"file' exists by now"):
        write_atomically(tmp_path / "file", b"second", replace=False)
    assert (tmp_path / "file").read_bytes() == b"first"
    write_atomically(tmp_path / "file", b"second")
    assert files(tmp_path) == {"file"}


@pytest.mark.parametrize("place", [".", "..", "../here"])
def test_the_folder_that_one_is_in_stays(tmp_path, monkeypatch, place):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="not the one that you are in"):
        check_destination(place, replace=True)
    check_destination("../there/../elsewhere", replace=False)


def test_a_model_whose_replacement_was_cut_off_is_found(tmp_path):
    model = TableModel(flow=cnf(2, 1), columns=Columns.of(TABLE, ["year"]))
    model.save(tmp_path / "model", History())
    left = tmp_path / ".model.abc" / "old"
    left.parent.mkdir()
    (tmp_path / "model").rename(left)
    with pytest.raises(FileNotFoundError, match=re.escape(f"mv {left} {tmp_path / 'model'}")):
        TableModel.load(tmp_path / "model")


def test_notes_are_json(tmp_path):
    model = TableModel(
        flow=cnf(2, 1), columns=Columns.of(TABLE, ["year"]), notes={"error": float("nan")}
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        model.save(tmp_path / "model", History())
    assert list(tmp_path.iterdir()) == []


def test_an_error_within_leaves_nothing(tmp_path):
    def interrupted():
        with new_folder(tmp_path / "folder", check_old=admit) as temporary:
            (temporary / "new").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
