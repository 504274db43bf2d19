"""Laws of the calibration that ends a fit."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from training_runs import affine_flow, config, small_cnf

from cnf import (
    CNF,
    Checkpoints,
    FlowMatching,
    MaximumLikelihood,
    ModuleField,
    ODEError,
    ODESolver,
    ReverseKL,
    TrainingConfig,
    certify,
    fit,
    load,
    recipe,
    save,
)
from cnf.data import toy_density
from cnf.flows import Flow
from cnf.tables.fit import DensitySettings, TableRows, continue_density, fit_density
from cnf.training.initialization import by_weight
from cnf.transforms import ContinuousTransform, Standardize
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

FINE = ODESolver(method="rk4", steps=400)


def bent(rows=400):
    x = torch.randn(rows, 2, dtype=torch.float64)
    return torch.stack([x[:, 0], x[:, 0].square() + 0.2 * x[:, 1]], -1)


@pytest.fixture
def few_steps(monkeypatch):
    """Calibration tries fewer steps before it gives up."""
    monkeypatch.setattr("cnf.ode.calibration._MOST_STEPS", 64)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    flow = CNF(2, hidden_features=(32, 32)).double()
    fit(flow, bent(), recipe(matching_steps=300, likelihood_steps=3, progress=False))
    return flow


def error(flow, x):
    with torch.no_grad():
        return (flow.log_prob(x) - flow.using(solver=FINE).log_prob(x)).abs()


def test_log_densities_are_right_to_a_thousandth(fitted):
    errors = error(fitted, bent())
    assert fitted.accuracy == 1e-3
    assert errors.quantile(0.99) < 1e-3
    assert errors.max() < 1e-2


def test_an_outlier_is_as_right_as_others_and_leaves_them_as_they_are(fitted):
    x, outlier = bent(), torch.tensor([[-3.0, 40.0]])
    assert error(fitted, torch.cat([x, outlier]))[-1] < 1e-3 * max(
        1, fitted.to_base(outlier).square().mean() / 100
    )
    alone, among = fitted.log_prob(x), fitted.log_prob(torch.cat([x, outlier]))[:-1]
    torch.testing.assert_close(among, alone, rtol=0, atol=1e-9)


def test_a_fitted_flow_passes_its_certificate(fitted):
    assert certify(fitted, bent(100)).passed


def test_the_grid_is_saved_with_the_flow(fitted, tmp_path):
    save(fitted, tmp_path / "flow.safetensors")
    assert load(tmp_path / "flow.safetensors").only_ode.solver == fitted.only_ode.solver


def test_more_training_makes_a_new_grid():
    flow, x = small_cnf(), torch.randn(50, 2)
    fit(flow, x, config(2), validation=None, accuracy=0.1)
    first = flow.only_ode.solver
    fit(flow, 3 * x + 1, config(20), validation=None)
    assert (first.accuracy, flow.accuracy) == (0.1, 1e-3)


@pytest.mark.parametrize(
    "solver",
    [ODESolver(method="rk4", steps=3), ODESolver(rtol=1e-4), ODESolver(gradient="adjoint")],
)
def test_a_solver_chosen_by_hand_stays(solver):
    flow = CNF(2, hidden_features=(8, 8), solver=solver)
    fit(flow, torch.randn(50, 2), config(2), validation=None)
    assert flow.only_ode.solver == solver


def test_none_leaves_the_solver_as_it_is():
    flow = CNF(2, hidden_features=(8, 8))
    fit(flow, torch.randn(50, 2), config(2), validation=None, accuracy=None)
    assert flow.only_ode.solver == ODESolver()


def test_flows_that_cannot_be_calibrated_are_trained_without_a_word():
    x = torch.randn(50, 2)
    fit(affine_flow(), x, config(2), validation=None)
    behind = Flow([ContinuousTransform(LinearField(2)), Standardize(2)])
    fit(behind, x, config(2), validation=None)
    assert behind.accuracy is None
    without_data = CNF(2, hidden_features=(8, 8))
    target = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    fit(ReverseKL(without_data, target.log_prob), None, config(1), validation=None)
    assert without_data.accuracy is None


def test_an_accuracy_out_of_reach_is_told_and_leaves_the_solver(few_steps):
    flow = CNF(2, hidden_features=(8, 8)).float()
    kept = pytest.warns(UserWarning, match="keeps its solver after training: calibration does not")
    coarse = pytest.warns(UserWarning, match="the mean in the loss of training is wrong")
    with coarse, kept:
        fit(flow, torch.randn(50, 2).float(), config(30), validation=None, accuracy=1e-30)
    assert flow.only_ode.solver == ODESolver()


@pytest.mark.parametrize("accuracy", [0, -1, float("nan"), float("inf")])
def test_an_accuracy_that_is_none_is_refused_before_training(accuracy):
    message = re.escape(f"accuracy must be positive and finite; got {accuracy}")
    with pytest.raises(ValueError, match=message):
        fit(MaximumLikelihood(small_cnf()), torch.randn(5, 2), config(10**9), accuracy=accuracy)
    with pytest.raises(ValueError, match="accuracy must be positive"):
        DensitySettings(accuracy=accuracy)


def test_a_finished_run_returns_at_once_when_it_is_called_again(tmp_path):
    flow, x = CNF(2, hidden_features=(8, 8)), torch.randn(50, 2)
    kept = {"checkpoints": Checkpoints(folder=tmp_path), "resume": True, "validation": None}
    first = fit(flow, x, config(3), **kept)
    solver = flow.only_ode.solver
    assert fit(flow, x, config(3), **kept).loss == first.loss
    assert flow.only_ode.solver == solver


def test_a_density_that_cannot_be_calibrated_again_gets_equal_steps(few_steps):
    x = torch.randn(50, 2)
    settings = DensitySettings(
        matching_steps=3,
        likelihood_steps=1,
        hidden_features=(8, 8),
        accuracy=0.01,
        validation_fraction=0,
    )
    flow, _ = fit_density([Standardize.from_data(x)], TableRows(x), settings=settings)
    with pytest.warns(UserWarning, match="computed in 100 equal steps: calibration does not"):
        further, _ = continue_density(
            flow, TableRows(x), settings=replace(settings, accuracy=1e-30)
        )
    assert further.only_ode.solver == ODESolver(method="rk4", steps=100)
    assert flow.accuracy == 0.01


def test_one_row_is_not_settled_by_being_the_only_one(few_steps):
    flow = CNF(1, hidden_features=(8, 8))
    settings = config(20, objective=FlowMatching)
    fit(flow, torch.randn(50, 1), settings, validation=None, accuracy=None)
    with pytest.raises(ODEError, match="does not reach accuracy=1e-30"):
        flow.calibrate(torch.randn(1, 1), accuracy=1e-30)


def test_rows_of_hardly_any_weight_do_not_choose_the_grid(monkeypatch):
    x = torch.cat([torch.randn(100, 2), 1e6 * torch.randn(20, 2)])
    weight = torch.cat([torch.ones(100), torch.full((20,), 1e-15)])
    seen = []
    monkeypatch.setattr(
        Flow, "calibrate", lambda flow, rows, context, **settings: seen.append(rows)
    )
    settings = DensitySettings(
        matching_steps=3, likelihood_steps=1, hidden_features=(8, 8), validation_fraction=0
    )
    standardize = Standardize.from_data(x[:100])
    fit_density([standardize], TableRows(x, weight=weight), settings=settings)
    assert seen[0].abs().max() < 10


def test_rows_are_chosen_as_often_as_they_count():
    index = by_weight(torch.tensor([0.0, 3.0, 1.0, 0.0, 4.0]), 800)
    assert index.bincount(minlength=5).tolist() == [0, 300, 100, 0, 400]


def rings(rows=300):
    generator = torch.Generator().manual_seed(0)
    return toy_density("rings").sample(rows, generator=generator).to(torch.float64)


def by_likelihood(flow, solver, steps=40):
    settings = TrainingConfig(steps=steps, batch_size=256, learning_rate=0.01, progress=False)
    return fit(MaximumLikelihood(flow, solver=solver), rings(), settings, validation=None)


def steps_of(count):
    return ODESolver(method="rk4", steps=count, gradient="backprop")


COARSE, EVEN = steps_of(4), steps_of(30)


@pytest.mark.slow
def test_a_likelihood_bought_from_a_coarse_grid_is_told_with_its_true_value(recwarn):
    flow = CNF(2, hidden_features=(16, 16), solver=COARSE)
    by_likelihood(flow, COARSE)
    (told,) = recwarn
    numbers = r"on 100 training rows the mean log-density is (\S+) nats, and (\S+) by a solver"
    found, true = map(float, re.search(numbers, str(told.message)).groups())
    with torch.no_grad():
        x = rings()[::3]
        assert found == pytest.approx(flow.log_prob(x).mean().item(), rel=1e-3)
        assert true == pytest.approx(flow.using(solver=FINE).log_prob(x).mean().item(), rel=1e-3)
    assert true < found - 0.05
    assert "Train with more steps" in str(told.message)
    failed = certify(flow, x)["tolerance"]
    assert failed.verdict == "fail"
    assert "trained on steps too coarse for it: train again with finer ones" in failed.remedy


@pytest.mark.slow
def test_a_likelihood_by_fine_steps_is_trained_without_a_word():
    flow = CNF(2, hidden_features=(16, 16), solver=EVEN)
    by_likelihood(flow, EVEN, steps=5)
    assert error(flow, rings(100)).max() < 0.01


@pytest.mark.slow
def test_a_coarse_grid_of_the_objective_alone_is_told_too():
    flow = CNF(2, hidden_features=(16, 16))
    with pytest.warns(UserWarning, match="the mean in the loss of training is wrong"):
        by_likelihood(flow, COARSE)
    assert error(flow, rings(100)).max() < 0.01


class Rough(nn.Module):
    """Waves far shorter than any step."""

    def __init__(self):
        super().__init__()
        self.height = nn.Parameter(torch.ones(()))

    def forward(self, t, x):
        return self.height * torch.sin(1e7 * x)


@pytest.mark.slow
def test_a_field_too_rough_to_be_compared_is_told():
    solver = ODESolver(method="rk4", steps=1)
    flow = Flow([ContinuousTransform(ModuleField(Rough(), 1), solver=solver)])
    with pytest.warns(UserWarning, match="could not be compared with another one: the solve"):
        fit(flow, torch.randn(20, 1), config(1), validation=None)
