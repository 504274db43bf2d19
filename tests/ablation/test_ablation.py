"""Laws of an ablation: what it measures, keeps and refuses."""

import json
import math

import pytest
import torch

from cnf import Flow, ODEError, count_evaluations, load
from cnf.ablation import (
    AblationSettings,
    Outcome,
    Run,
    ablate,
    find_penalty,
    markdown,
    study,
    tradeoffs,
)
from cnf.ablation.outcome import measure
from cnf.ablation.penalties import check_penalty
from cnf.objectives import FlowMatching, MaximumLikelihood, OptimalTransport
from cnf.regularizers import jacobian_frobenius, kinetic_energy
from cnf.tables.fit import TableRows
from cnf.transforms import ContinuousTransform
from cnf.vector_fields import LinearField, MLPField

pytestmark = pytest.mark.usefixtures("shapes_unchecked", "quick_calibration")  # whole trainings


def linear_flow(weight, bias):
    field = LinearField(2)
    with torch.no_grad():
        field.weight.copy_(torch.tensor(weight))
        field.bias.copy_(torch.tensor(bias))
    return Flow([ContinuousTransform(field)])


def measured(flow, rows, held_out):
    penalties = {"kinetic": kinetic_energy, "jacobian-frobenius": jacobian_frobenius}
    run = Run(training="recipe")
    some = TableRows(rows), TableRows(held_out)
    return measure(run, flow, *some, penalties, accuracy=1e-3, seconds=0.0)


def small(**changes):
    given = {"penalties": ["kinetic"], "strengths": [0.5], **changes}
    return AblationSettings(**given).quick()


def data(context=False):
    x = torch.randn(60, 2)
    rows = TableRows(x, x[:, :1] + torch.randn(60, 1) if context else None)
    return rows.take(slice(10, None)), rows.take(slice(10))


def without_seconds(outcomes):
    return [{**vars(outcome), "seconds": None} for outcome in outcomes]


def test_a_field_of_constant_velocity_takes_the_least_evaluations():
    flow = linear_flow([[0.0, 0.0], [0.0, 0.0]], [3.0, 4.0])
    x = torch.randn(50, 2)
    outcome = measured(flow, x, x[:20])
    solver = flow.transforms[0].solver
    assert outcome.evaluations == solver.coarser().evaluations + solver.evaluations
    normal = torch.distributions.Normal(torch.tensor([3.0, 4.0]), 1.0)
    torch.testing.assert_close(torch.tensor(outcome.log_prob), normal.log_prob(x[:20]).sum(-1))
    assert outcome.costs["kinetic"] == pytest.approx(25.0)
    assert outcome.costs["jacobian-frobenius"] == pytest.approx(0.0, abs=1e-9)


def test_evaluations_are_the_mean_of_what_each_row_takes_alone():
    flow = linear_flow([[1.5, 0.0], [2.0, -1.0]], [0.0, 0.0])
    held_out = torch.randn(12, 2) * torch.linspace(0.1, 30, 12)[:, None]
    outcome = measured(flow, torch.randn(50, 2), held_out)
    alone = []
    for row in held_out:
        with torch.no_grad(), count_evaluations(flow) as nfe:
            flow.log_prob(row)
        alone.append(nfe.value)
    assert len(set(alone)) > 1
    assert outcome.evaluations == pytest.approx(sum(alone) / len(alone))


def test_penalties_act_in_the_likelihood_phase_alone():
    settings = small()
    flow = Flow([ContinuousTransform(MLPField(2))])
    matching, likelihood = settings.configs("recipe", 100, progress=False)
    assert type(matching.objective(flow)) is FlowMatching
    assert likelihood.objective is MaximumLikelihood
    matching, _ = settings.configs("transport", 100, progress=False)
    assert isinstance(matching.objective(flow).pairing, OptimalTransport)
    (alone,) = AblationSettings().configs("scratch", 20_000, progress=False)
    assert alone.objective is MaximumLikelihood
    assert alone.steps == 100 + 6000 // 30


@pytest.mark.slow
@pytest.mark.parametrize("context", [False, True])
def test_every_flow_is_kept_with_its_outcome(tmp_path, context):
    rows, held_out = data(context)
    outcomes = list(ablate(rows, held_out, small(), tmp_path))
    assert [str(outcome.run) for outcome in outcomes] == [
        f"{training}, {penalty}"
        for training in ("recipe", "scratch", "transport")
        for penalty in ("none", "kinetic 0.5")
    ]
    for outcome in outcomes:
        name = str(outcome.run).replace(", ", "_").replace(" ", "_")
        flow = load(tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            again = flow.log_prob(held_out.x, held_out.context)
        torch.testing.assert_close(torch.tensor(outcome.log_prob), again, rtol=0, atol=1e-9)
        assert flow.accuracy == 0.1


@pytest.mark.slow
def test_a_stopped_ablation_goes_on_to_the_same_end(tmp_path, monkeypatch):
    rows, held_out = data()
    whole = list(ablate(rows, held_out, small(), tmp_path / "whole"))
    begun = ablate(rows, held_out, small(), tmp_path / "parts")
    assert without_seconds([next(begun), next(begun)]) == without_seconds(whole[:2])
    begun.close()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}

    save = study.save
    with monkeypatch.context() as patch:  # stopped while it writes a flow

        def interrupted(flow, path):
            save(flow, path)
            raise KeyboardInterrupt

        patch.setattr(study, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(ablate(rows, held_out, small(), tmp_path / "parts"))
    again = list(ablate(rows, held_out, small(), tmp_path / "parts"))
    assert without_seconds(again) == without_seconds(whole)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.slow
def test_outcomes_of_other_settings_or_data_are_not_mixed_in(tmp_path):
    rows, held_out = data()
    settings = small(trainings=["scratch"])
    list(ablate(rows, held_out, settings, tmp_path))
    more = small(trainings=["scratch"], penalties=["jacobian-frobenius", "kinetic"])
    stamp = (tmp_path / "scratch_none.json").stat().st_mtime_ns
    outcomes = list(ablate(rows, held_out, more, tmp_path))
    assert len(outcomes) == 3
    assert "| ∫ kinetic | ∫ jacobian-frobenius | CPU s |" in markdown(outcomes)
    assert (tmp_path / "scratch_none.json").stat().st_mtime_ns == stamp
    for other in (
        (rows, held_out, small(trainings=["scratch"], seed=1)),
        (rows, data()[1], settings),
    ):
        with pytest.raises(ValueError, match=r"scratch_none.json' is of other data or settings"):
            list(ablate(*other, tmp_path))
    list(ablate(*other, tmp_path, replace=True))
    assert (tmp_path / "scratch_none.json").stat().st_mtime_ns > stamp
    (tmp_path / "scratch_none.json").write_text("{")
    with pytest.raises(ValueError, match="or damaged"):
        list(ablate(*other, tmp_path))


@pytest.mark.slow
def test_a_failed_training_is_an_outcome_too(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ODEError("the field is stiff")

    monkeypatch.setattr(study, "measure", fail)
    settings = small(trainings=["scratch"])
    for _ in range(2):
        outcomes = list(ablate(*data(), settings, tmp_path, replace=True))
        assert [outcome.failure for outcome in outcomes] == ["the field is stiff"] * 2
    assert "scratch, kinetic 0.5 failed: the field is stiff" in markdown(outcomes)
    assert tradeoffs(outcomes, "data") == []
    assert "failure" in json.loads((tmp_path / "scratch_none.json").read_text())["outcome"]


def outcome_of(log_prob, evaluations, penalty="", strength=0.0):
    run = Run(training="recipe", penalty=penalty, strength=strength)
    return Outcome(run=run, log_prob=log_prob, evaluations=evaluations, costs={"kinetic": 0.25})


def test_differences_are_of_the_same_rows():
    outcomes = [outcome_of([-1.0, -3.0], 100.0), outcome_of([-1.5, -3.7], 80.0, "kinetic", 0.1)]
    plain, penalised = markdown(outcomes).splitlines()[2:]
    assert plain.startswith("| recipe | none | 2.000 ± 1.000 | - | 100 | - |")
    assert penalised.startswith("| recipe | kinetic 0.1 | 2.600 ± 1.100 | +0.600 ± 0.100 | 80 |")
    assert "| 0.80 |" in penalised
    beside_truth = markdown(outcomes, torch.tensor([-1.0, -2.5])).splitlines()
    assert "| gap |" in beside_truth[0]
    assert "| 0.250 ± 0.250 | - |" in beside_truth[2]
    point = tradeoffs(outcomes, "rings")[1]
    assert point[:5] == ("rings", "recipe", "kinetic", 0.1, 80.0)
    assert point[5:] == pytest.approx((2.6, 1.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"penalties": ["kinetik"]}, r"penalties must be kinetic, .* module:name; got 'kinetik'"),
        ({"penalties": []}, "penalties must be one or more"),
        ({"penalties": "kinetic"}, "penalties must be one or more; got 'kinetic'"),
        ({"penalties": ["kinetic+"]}, "got ''"),
        ({"penalties": ["no.such:penalty"]}, "'no.such:penalty' cannot be imported: No module"),
        ({"penalties": ["math:cosine"]}, "has no attribute 'cosine'.* in the folder that you are"),
        ({"penalties": ["cnf.regularizers:Regularizer"]}, "a class must take no arguments"),
        ({"penalties": ["math:pi"]}, r"must be callable, .*; got float"),
        ({"penalties": ["kinetic", "kinetic"]}, "penalties must differ; got kinetic, kinetic"),
        ({"strengths": [0.0]}, "each of strengths must be positive and finite; got 0.0"),
        ({"strengths": [math.inf]}, "each of strengths must be positive and finite; got inf"),
        ({"trainings": ["rnode"]}, "each of trainings must be one of recipe, scratch, transport"),
        ({"matching_steps": 0}, "must be at least 1, because penalties act in the likelihood"),
        ({"likelihood_steps": 0}, "must be at least 1, because penalties act in the likelihood"),
        ({"scratch_steps": 0}, "scratch_steps must be at least 1; got 0"),
        ({"accuracy": 0.0}, "accuracy must be positive and finite; got 0.0"),
        ({"hidden_features": (0,)}, "hidden_features"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_words(change, message):
    with pytest.raises(ValueError, match=message):
        AblationSettings(**change)


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        (lambda evaluation: evaluation.velocity, r"of shape \(3,\); got \(3, 2\)"),
        (lambda evaluation: 1.0, r"of shape \(3,\); got float"),
        (lambda evaluation: evaluation.divergence / 0, "must return finite rates; got"),
        (find_penalty("cnf.regularizers:hjb_residual"), "hjb_residual needs a PotentialField"),
    ],
    ids=["shape", "type", "not finite", "another field"],
)
def test_a_penalty_that_would_fail_in_training_is_refused_before(penalty, message):
    with pytest.raises(ValueError, match=message):
        check_penalty("mine:penalty", penalty, MLPField(2), torch.randn(3, 2), None)
