"""Small flows and settings for the tests of training, and comparisons of what runs end with."""

from functools import partial

import torch

from cnf import CNF, Flow, MaximumLikelihood, ODESolver
from cnf.training import TrainingConfig
from cnf.transforms import Affine, ContinuousTransform
from cnf.vector_fields import LinearField

CHEAP = ODESolver(method="rk4", steps=2, gradient="backprop")


def config(steps=5, **settings):
    """Maximum likelihood on a coarse grid, a constant learning rate, and no progress bar."""
    likelihood = partial(MaximumLikelihood, solver=CHEAP)
    common = {"objective": likelihood, "schedule": "constant", "progress": False}
    return TrainingConfig(steps=steps, **{**common, **settings})


def linear_flow(features=2, context_features=0):
    return Flow([ContinuousTransform(LinearField(features, context_features))])


def small_cnf(**settings):
    """One that stays smooth when its weights are perturbed."""
    settings = {"layer": "concatsquash", "time_features": 0, "skip": False, **settings}
    return CNF(2, hidden_features=(8, 8), **settings)


def affine_flow(features=2):
    """The cheapest flow: no ODE."""
    return Flow([Affine(features)])


def weights(flow):
    return {name: value.clone() for name, value in flow.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def differ(first, second):
    return any(not torch.equal(first[name], second[name]) for name in first)


def without_seconds(history):
    """The columns that a repetition must repeat, as text: NaN equals NaN."""
    return {name: str(column) for name, column in history.columns.items() if name != "seconds"}
