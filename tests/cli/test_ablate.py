"""Laws of ``cnf ablate``: what it writes, how it goes on, and what it refuses."""

import numpy as np
import pytest
import torch

from cnf.cli.main import main
from cnf.data.table_files import write_table

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_calibration")]

OWN = """\
class Speed:
    def __call__(self, evaluation):
        return evaluation.velocity.abs().sum(-1)
"""


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """As a user runs it: in the folder of a table."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    random = np.random.RandomState(0)
    x = random.normal(size=(100, 3)) + 1000
    write_table(tmp_path / "data.csv", x, ["a", "b", "c"])
    return tmp_path


def ablate(*options):
    return main(["ablate", "data.csv", "--out", "found", "--quick", *options])


def test_a_table_and_a_picture_are_written_and_a_second_run_trains_nothing(table, capsys):
    (table / "own_penalty.py").write_text(OWN)
    options = ["--penalties", "kinetic", "own_penalty:Speed", "--strengths", "0.2", "0.1"]
    assert ablate(*options) == 0
    said = capsys.readouterr().out
    assert said.startswith("100 rows of a, b, c, 20 held out\n  recipe, none: 96 evaluations\n")
    folder = table / "found" / "quick"
    text = (folder / "table.md").read_text()
    assert text in said
    for training in ("recipe", "scratch", "transport"):
        for penalty in ("none", "kinetic 0.2", "own_penalty:Speed 0.2"):
            assert f"\n| {training} | {penalty} | " in text
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "flows").iterdir()}
    assert len(stamps) == 2 * (9 + 2)
    assert ablate(*options) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "flows").iterdir()} == stamps
    assert text in capsys.readouterr().out


def test_a_density_may_be_conditional(table, capsys):
    options = ["--columns", "a", "--context-columns", "c", "--trainings", "scratch"]
    assert ablate(*options, "--penalties", "kinetic") == 0
    assert capsys.readouterr().out.startswith("100 rows of a given c, 20 held out\n")


def test_other_settings_replace_nothing_unasked(table, capsys):
    options = ["--trainings", "scratch", "--penalties", "kinetic"]
    assert ablate(*options) == 0
    assert ablate(*options, "--seed", "1") == 1
    assert "Choose another folder, or replace it by --force." in capsys.readouterr().err
    assert ablate(*options, "--seed", "1", "--force") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--penalties", "kinetik"], "got 'kinetik'"),
        (["--strengths", "0"], "each of strengths must be positive and finite; got 0.0"),
        (["--strengths", "-1"], "each of strengths must be positive and finite; got -1.0"),
        (["--trainings", "rnode"], "rnode"),
        (["--held-out", "1"], "held_out must be at least 2; got 1"),
        (["--penalties", "broken:x"], "'broken:x' cannot be imported"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_answered_by_code_2(table, capsys, options, message):
    (table / "broken.py").write_text("def (")
    with pytest.raises(SystemExit) as leaving:
        ablate(*options)
    assert leaving.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (table / "found").exists()


def test_a_folder_of_other_files_is_left_alone(table, capsys):
    (table / "found").mkdir()
    (table / "found" / "notes.txt").write_text("mine")
    assert ablate() == 1
    assert "'found' contains 'notes.txt'" in capsys.readouterr().err
    assert [path.name for path in (table / "found").iterdir()] == ["notes.txt"]


def test_a_table_that_cannot_be_split_is_refused(table, capsys):
    write_table(table / "data.csv", np.random.RandomState(0).normal(size=(9, 2)), ["a", "b"])
    assert ablate() == 1
    assert "a fifth of the 9 rows of the table must be at least 2; got 1" in capsys.readouterr().err
    assert not (table / "found").exists()
