"""Laws of the hybrid of a classifier and a density."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from training_runs import affine_flow, assert_same, config, weights
from zoo import COARSE, EVERY_FLOW, cnf, in_turn, perturbed, rows_for, seeded

from cnf import Checkpoints, count_evaluations, fit
from cnf.objectives import HybridObjective, MaximumLikelihood, Objective
from cnf.training import TrainingConfig

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves


def labelled(rows=300):
    """Two clusters of points, which lie apart along the first axis, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 2
    x = torch.randn(rows, 2, generator=generator) + 8.0 * labels[:, None] * torch.tensor([1.0, 0.0])
    return x, labels


@pytest.mark.parametrize(("name", "likelihood_weight"), in_turn(EVERY_FLOW, [0.0, 0.3, 1.0]))
def test_the_loss_is_the_cross_entropy_plus_the_weighted_likelihood(name, likelihood_weight):
    flow = EVERY_FLOW[name]()
    x, context = rows_for(flow, 6)
    target = torch.arange(6) % 3
    objective = HybridObjective(
        flow.using(solver=COARSE), 3, likelihood_weight=likelihood_weight, solver=COARSE
    )
    nn.init.normal_(objective.head.weight)

    loss = objective(x, context, target=target, generator=seeded())
    logits = objective.logits(x, context, generator=seeded())
    likelihood = MaximumLikelihood(objective.flow, solver=COARSE)(x, context, generator=seeded())

    if objective.flow.likelihood == "exact":  # else the two draw different random numbers
        expected = cross_entropy(logits, target) + likelihood_weight * likelihood
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    assert loss.isfinite()


def test_one_evaluation_gives_points_and_density():
    flow = cnf()
    x, _ = rows_for(flow, 4)
    target = torch.tensor([0, 1, 1, 0])
    with count_evaluations(flow) as once:
        MaximumLikelihood(flow)(x)
    with count_evaluations(flow) as nfe:
        HybridObjective(flow, 2)(x, target=target)
    assert nfe.value == once.value > 0


def test_the_default_weight_is_one_over_the_features():
    assert HybridObjective(affine_flow(4), 2).likelihood_weight == 1 / 4


def test_before_training_all_classes_have_the_same_probability():
    x, labels = labelled()
    objective = HybridObjective(affine_flow(), 5, likelihood_weight=0.0)
    assert objective(x, target=labels).item() == pytest.approx(math.log(5))


def test_a_weight_of_two_counts_as_two_rows():
    x, labels = labelled(6)
    objective = HybridObjective(perturbed(affine_flow()), 2)
    nn.init.normal_(objective.head.weight)
    repeated = torch.tensor([0, 1, 1, 2, 3, 4, 4, 5])
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, 1.0]) * 6 / 8

    weighted = objective(x, target=labels, weight=weight)

    plain = objective(x[repeated], target=labels[repeated])
    torch.testing.assert_close(weighted, plain, rtol=0, atol=1e-12)


def test_a_trained_flow_classifies_and_is_the_density_of_the_rows():
    """The classes lie apart, and the density of the rows is that of an affine flow, a Gaussian."""
    x, labels = labelled()
    objective = HybridObjective(affine_flow(), 2, likelihood_weight=1.0)

    history = fit(objective, (x, labels), config(300, learning_rate=0.1, schedule="cosine"))

    assert (objective.classify(x) == labels).double().mean() > 0.99
    assert objective.logits(x).shape == (300, 2)
    gaussian = torch.distributions.Normal(x.mean(0), x.std(0)).log_prob(x).sum(-1).mean()
    assert objective.flow.log_prob(x).mean().item() == pytest.approx(gaussian.item(), abs=0.05)
    assert history.validation[-1] < history.loss[0]


def test_a_conditional_flow_classifies_given_its_context():
    flow = cnf(2, 3)
    objective = HybridObjective(flow, 2)
    x, context = rows_for(flow, 4)
    assert objective.classify(x, context).shape == (4,)
    assert objective.classify(x[0], context).shape == (4,)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_flow_and_classifier_are_kept_from_the_same_step(ema):
    """The rate is so high that the last steps are worse than an earlier one."""
    x, labels = labelled(40)
    objective = HybridObjective(affine_flow(), 2)
    settings = config(30, learning_rate=1.5, validate_every=1, ema=ema)

    history = fit(objective, (x, labels), settings, validation=(x, labels))

    best = min(history.validation)
    assert best < history.validation[-1]
    assert objective(x, target=labels).item() == pytest.approx(best, rel=1e-12)


def test_a_run_that_is_interrupted_resumes_to_the_same_flow_and_classifier(tmp_path):
    x, labels = labelled(40)

    def run(folder, interrupt_at=None):
        def interrupt(report):
            if report.step == interrupt_at:
                raise KeyboardInterrupt

        objective = HybridObjective(affine_flow(), 2)
        fit(
            objective,
            {"x": x, "target": labels, "weight": torch.linspace(0.5, 1.5, 40)},
            config(9, learning_rate=0.1, batch_size=8, ema=0.9, validate_every=2),
            checkpoints=Checkpoints(folder=folder, every=4),
            resume=True,
            callbacks=[interrupt],
        )
        return weights(objective)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", interrupt_at=6)
    assert_same(run(tmp_path / "cut"), whole)
    assert_same(run(tmp_path / "cut"), whole)  # finished by now


def test_a_run_with_other_labels_is_told_apart(tmp_path):
    x, labels = labelled(40)

    def run(target):
        fit(
            HybridObjective(affine_flow(), 2),
            (x, target),
            config(3),
            checkpoints=Checkpoints(folder=tmp_path),
            resume=True,
        )

    run(labels)
    with pytest.raises(ValueError, match=r"data: .* rows with the hash"):
        run(1 - labels)


def test_parts_of_a_minibatch_add_up_to_the_whole():
    x, labels = labelled(40)
    objectives = [HybridObjective(affine_flow(), 2) for _ in range(2)]
    for objective, parts in zip(objectives, (1, 4), strict=True):
        settings = config(5, batch_size=16, accumulation_steps=parts)
        fit(objective, (x, labels), settings, validation=None)
    for first, second in zip(*(each.parameters() for each in objectives), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 1, 2]), r"target must be class labels from 0 to 1; got .*row 2"),
        (torch.tensor([0, -1, 1]), r"target must be class labels from 0 to 1; got .*row 1"),
        (
            torch.zeros(3, dtype=torch.float64),
            r"target must be labels of shape \(3,\) and dtype torch.int64; got \(3,\)",
        ),
        (torch.zeros(3, 1, dtype=torch.int64), r"target must be labels of shape \(3,\).*\(3, 1\)"),
        (torch.zeros(3, dtype=torch.bool), r"target must have the dtype torch.int64.*\.long\(\)"),
        (torch.zeros(2, dtype=torch.int64), r"target must have one entry for each row.*\(2,\)"),
    ],
)
def test_targets_that_are_no_labels_are_refused(target, message):
    objective = HybridObjective(affine_flow(), 2)
    with pytest.raises(ValueError, match=message):
        objective(torch.zeros(3, 2), target=target)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"classes": 1}, ValueError, "classes must be at least 2; got 1"),
        ({"classes": 2.0}, TypeError, "classes must be an int; got 2.0"),
        ({"classes": 2, "likelihood_weight": -1.0}, ValueError, "likelihood_weight must be finite"),
        ({"classes": 2, "solver": "rk4"}, TypeError, "solver must be a ODESolver; got str"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        HybridObjective(affine_flow(), **settings)


def test_a_classifier_that_would_be_lost_is_refused():
    settings = TrainingConfig(
        steps=1, objective=lambda flow: HybridObjective(flow, 2), progress=False
    )
    with pytest.raises(ValueError, match="HybridObjective takes targets, and must be given in"):
        fit(affine_flow(), labelled(), settings)


def test_an_objective_without_rows_takes_no_targets():
    with pytest.raises(TypeError, match="takes_data must be True, because it takes targets"):

        class Impossible(Objective):
            takes_data, takes_targets = False, True

            def _loss(self, *given):
                """Never called."""
