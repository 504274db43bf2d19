"""Laws of the race of starts of a table."""

import pytest
import torch

from cnf import Standardize
from cnf.tables.fit import DensitySettings, TableRows, fit_density, log_prob
from cnf.tables.starts import starts, winner
from cnf.training import History, TrainingError
from cnf.transforms import ContinuousTransform, NormalScores

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


def kinds(chain):
    return [type(transform) for transform in chain]


@pytest.mark.parametrize(
    ("steps", "validated", "ends", "expected"),
    [
        (2000, 100, True, 2),
        (1999, 100, True, 1),
        (2000, 99, True, 1),
        (2000, 100, False, 1),
        (0, 0, True, 1),
    ],
)
def test_a_race_is_run_where_it_is_worth_its_time(steps, validated, ends, expected):
    x = torch.randn(50, 2)
    chain = [Standardize.from_data(x)] if ends else []
    chains = starts(chain, x, None, steps=steps, validated=validated)
    assert len(chains) == expected
    assert chains[0] == chain
    if expected > 1:
        assert kinds(chains[1]) == [Standardize, NormalScores]
        z = chains[1][1].to_base(chain[0].to_base(x))
        assert z.std(0).sub(1).abs().max() < 0.1


class Recorder:
    """A flow whose rows have given log-densities."""

    def __init__(self, log_prob):
        self.values = log_prob

    def using(self, *, solver):
        return self

    def log_prob(self, x, context, generator):
        if context is not None:
            assert len(context) == len(x)
        return self.values[: len(x)]


@pytest.mark.parametrize("weight", [None, [0.0, 3e-200, 1e-200]])
def test_the_best_of_the_validation_rows_by_weight_wins(weight):
    chains = [["first"], ["second"]]
    values = {"first": torch.tensor([9.0, 1.0, 2.0]), "second": torch.tensor([0.0, 2.0, 1.0])}

    def train(chain):
        return Recorder(values[chain[0]])

    weight = None if weight is None else torch.tensor(weight)
    best = winner(chains, train, torch.zeros(3, 1), torch.zeros(3, 2), weight)
    assert best == (["first"] if weight is None else ["second"])


def test_a_start_that_is_hardly_better_does_not_win():
    values = {"first": 0.0, "second": 0.09, "third": 0.11}

    def train(chain):
        return Recorder(torch.full((2,), values[chain[0]]))

    first, second, third = ["first"], ["second"], ["third"]
    assert winner([first, second], train, torch.zeros(2, 1), None, None) == first
    assert winner([first, second, third], train, torch.zeros(2, 1), None, None) == third


def test_a_start_that_cannot_be_trained_loses():
    def train(chain):
        if chain == ["first"]:
            raise TrainingError("the loss is not finite", History())
        return Recorder(torch.full((2,), -1e9))

    chains = [["first"], ["second"]]
    assert winner(chains, train, torch.zeros(2, 1), None, None) == ["second"]
    assert winner(chains[:1], train, torch.zeros(2, 1), None, None) == ["first"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_calibration")
@pytest.mark.parametrize("weighted", [False, True])
def test_skewed_columns_start_from_normal_scores(weighted, monkeypatch):
    monkeypatch.setattr("cnf.tables.starts.RACE_STEPS", 40)
    monkeypatch.setattr("cnf.tables.fit.RACE_STEPS", 40)
    settings = DensitySettings(
        matching_steps=400, likelihood_steps=0, hidden_features=(16, 16), accuracy=0.1
    )
    weight = torch.ones(600) if weighted else None
    skewed = torch.randn(600, 2).mul(1.5).exp()
    rows = TableRows(skewed, weight=weight)
    training, held_out = rows.take(slice(0, 450)), rows.take(slice(450, None))
    flow, _ = fit_density([Standardize.from_data(skewed)], training, held_out, settings)
    assert kinds(flow.transforms) == [Standardize, NormalScores, ContinuousTransform]
    assert log_prob(flow, rows).isfinite().all()
