"""Laws of the house: no circles, no crowded rooms, short ways, and a map that is true."""

import re
from pathlib import Path

import house
import jaxtyping
import pytest

from cnf import CNF

DOCS = Path(__file__).parents[1] / "docs"


def test_no_modules_import_each_other_in_a_circle():
    assert house.circles() == []


def test_no_room_is_crowded():
    crowded = {
        room: count
        for room, count in house.modules_by_folder().items()
        if count > house.MOST_MODULES
    }
    assert crowded == {}


@pytest.mark.parametrize("folder", ["benchmarks", "experiments"])
def test_what_a_user_may_copy_takes_nothing_private(folder):
    private = [
        f"{path.name} imports {name}"
        for path in sorted((house.ROOT.parent / folder).glob("*.py"))
        for name in house.imported(path)
        if name.startswith("cnf.") and "._" in name
    ]
    assert private == []


def test_shapes_are_checked_while_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError):
        CNF(2).log_prob([[0.0, 0.0]])


@pytest.mark.usefixtures("shapes_unchecked")
def test_an_evaluation_passes_few_functions():
    functions, files, _ = house.evaluation_walk().counts
    assert functions <= 12
    assert files <= 7


def test_the_map_names_functions_that_are_there():
    rows = re.findall(
        r"^\| `(cnf/[\w/]+\.py)` \| `([\w.]+)` \|", (DOCS / "architecture.md").read_text(), re.M
    )
    walked = {(file, name.split(".")[-1]) for file, _, name in house.log_prob_walk().seen}
    assert len(rows) > 10
    assert [row for row in rows if (row[0], row[1].split(".")[-1]) not in walked] == []
