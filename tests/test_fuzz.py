"""The public surface answers hostile arguments: at once, in words, and never with NaN."""

import time

import pytest
import torch
from fuzz import Target, fuzz, outcome_of, targets

import cnf

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


@pytest.fixture(autouse=True)
def _as_a_user_runs_it():
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_hostile_arguments_are_answered_in_words():
    """At most half a percent by errors from the depths of torch; none by NaN, or not at all."""
    counts, bad = fuzz(2000, seed=0)
    assert counts.total() == 2000
    assert counts["hang"] == counts["nan"] == 0, bad
    assert counts["unclear"] <= 10, bad
    assert counts["error"] > 1000


def test_arguments_that_are_right_give_results(tmp_path):
    for name, target in targets(tmp_path).items():
        outcome = outcome_of(target, target.arguments())
        assert outcome.kind == "result", f"{name}: {outcome.told}"


def raises_from_the_depths(x):
    return torch.zeros(2) @ torch.zeros(3)


def says_nothing_of_its_argument(x):
    raise ValueError("something is wrong")


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda x: torch.tensor([x, torch.nan]), "nan"),
        (lambda x: {}[x], "unclear"),
        (raises_from_the_depths, "unclear"),
        (says_nothing_of_its_argument, "unclear"),
        (lambda x: time.sleep(5), "hang"),
        (cnf.transforms.Affine, "error"),
        (lambda x: x, "result"),
    ],
)
def test_each_kind_of_answer_is_told_apart(call, kind, monkeypatch):
    monkeypatch.setattr("fuzz.SECONDS", 0.1)
    arguments = {"features": -1} if kind == "error" else {"x": 1.0}
    assert outcome_of(Target(call, dict), arguments).kind == kind
