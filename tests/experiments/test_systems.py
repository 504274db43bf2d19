"""Every system shows what it is for, in its quick form."""

import pytest
import torch

from experiments.systems.__main__ import NAMES, main
from experiments.systems.settings import Settings
from experiments.systems.sphere import are_new


@pytest.fixture(autouse=True)
def _single_precision():
    """As a user runs them."""
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_calibration")
@pytest.mark.parametrize("name", NAMES)
def test_a_system_is_shown(name, tmp_path, capsys):
    main((name,), settings=Settings(quick=True, out=tmp_path))
    table = (tmp_path / "quick" / f"{name}.md").read_text()
    assert table.startswith("|")
    assert "nan" not in table.lower().split()
    assert table.splitlines()[0] in capsys.readouterr().out


def test_an_unknown_system_is_refused():
    with pytest.raises(SystemExit, match="names must be among"):
        main(("nothing",), settings=Settings())


def test_a_place_is_new_unless_it_is_the_same():
    """In single precision, among many rows, with some about 1 km beside them."""
    places = torch.nn.functional.normalize(torch.randn(500, 3), dim=-1)
    beside = torch.nn.functional.normalize(places + 1e-4, dim=-1)
    assert not are_new(places, places.flip(0)).any()
    assert are_new(beside, places).all()
