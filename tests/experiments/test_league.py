"""The league of small tables."""

import json

import numpy as np
import pytest
import torch

from experiments import league

pytestmark = pytest.mark.usefixtures("quick_calibration")


@pytest.fixture(autouse=True)
def _single_precision():
    """As a user runs them."""
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_quick_form_makes_a_table_and_goes_on_where_it_stopped(tmp_path, capsys):
    settings = league.Settings(quick=True, out=tmp_path)
    (result,) = league.main(settings)
    assert result.table == "iris"
    assert result.gain > -1
    assert "| iris | 40 | 4 |" in (tmp_path / "quick" / "league.md").read_text()
    file = tmp_path / "quick" / "iris_40.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "flow": 123.0}))
    assert league.main(settings)[0].flow == 123.0


@pytest.mark.slow
def test_the_numbers_are_in_the_units_of_the_table():
    x = np.random.RandomState(0).randn(60, 2)
    rivals = league.measured(x[:40], x[40:], 0)[:2]
    scaled = league.measured(10 * x[:40], 10 * x[40:], 0)[:2]
    assert np.array(scaled) == pytest.approx(np.array(rivals) - 2 * np.log(10), abs=1e-6)


def test_rows_to_fit_to_leave_a_fifth_to_measure_on():
    rows = [(name, rows) for name, rows, _ in league.tasks(league.Settings(rows=(50, 1000)))]
    assert ("iris", 50) in rows
    assert ("iris", 120) in rows
    assert ("linnerud", 16) in rows
