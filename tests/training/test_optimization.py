"""Laws of optimisers, schedulers and the time budget of a phase of training."""

import functools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from training_runs import affine_flow, assert_same, config, weights, without_seconds

from cnf import Checkpoints, MaximumLikelihood, fit
from cnf.training import TrainingConfig
from cnf.training.checkpoint import checkpoints_in, write_checkpoint
from cnf.training.distributed import Processes
from cnf.training.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

X = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None] ** torch.tensor([1, 2])


class Sloped(MaximumLikelihood):
    """An objective with the gradient 1 for one number of its own, and 0 for another."""

    def __init__(self, flow):
        super().__init__(flow)
        self.slope = nn.Parameter(torch.zeros(()))
        self.level = nn.Parameter(torch.ones(()))

    def _loss(self, *given):
        return super()._loss(*given) + self.slope + 0 * self.level


def sloped(steps, **settings):
    """The two numbers and the record of a run without limit on the gradient."""
    objective = Sloped(affine_flow())
    history = fit(objective, X, config(steps, gradient_clip=None, **settings), validation=None)
    return objective.slope.item(), objective.level.item(), history


def with_groups(parameters, lr):
    """Vectors, and a tenth of the rate for the two numbers."""
    vectors = [each for each in parameters if each.ndim]
    numbers = [each for each in parameters if not each.ndim]
    return SGD([{"params": vectors}, {"params": numbers, "lr": lr / 10}], lr=lr)


def test_a_step_of_sgd_goes_down_the_gradient():
    flow = affine_flow()
    before = [parameter.detach().clone() for parameter in flow.parameters()]
    gradient = torch.autograd.grad(-flow.log_prob(X).mean(), list(flow.parameters()))

    settings = {"optimizer": SGD, "learning_rate": 0.01, "gradient_clip": None}
    fit(flow, X, config(1, **settings), validation=None)

    for parameter, start, slope in zip(flow.parameters(), before, gradient, strict=True):
        torch.testing.assert_close(parameter, start - 0.01 * slope)


def test_an_optimizer_has_the_settings_of_its_factory():
    optimizer = functools.partial(SGD, momentum=0.5)
    slope, _, history = sloped(3, optimizer=optimizer, learning_rate=0.1)
    assert slope == pytest.approx(-0.1 * (1 + 1.5 + 1.75))
    assert history.learning_rate == pytest.approx([0.1] * 3)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [({}, [0.1] * 4), ({"schedule": lambda made: lr_scheduler.StepLR(made, 2)}, [0.1, 0.1, 0.01])],
    ids=["named", "scheduler"],
)
def test_groups_keep_the_ratio_of_their_rates(settings, rates):
    slope, _, history = sloped(len(rates), optimizer=with_groups, learning_rate=0.1, **settings)
    assert history.learning_rate == pytest.approx(rates)
    assert slope == pytest.approx(-sum(rates) / 10)


def test_weight_decay_shrinks_what_has_no_slope_by_a_fraction_of_the_rate():
    _, level, history = sloped(5, weight_decay=0.3, learning_rate=0.1, schedule="cosine")
    assert level == pytest.approx(math.prod(1 - 0.3 * rate for rate in history.learning_rate))
    assert sloped(5)[1] == 1


def test_the_default_is_adam_and_with_weight_decay_adamw():
    pairs = [({}, Adam), ({"weight_decay": 0.3}, functools.partial(AdamW, weight_decay=0.3))]
    for default, optimizer in pairs:
        slope, level, history = sloped(9, **default)
        other, other_level, others = sloped(9, optimizer=optimizer)
        assert (slope, level) == pytest.approx((other, other_level), rel=1e-12)
        assert history.loss == pytest.approx(others.loss, rel=1e-12)


def root(step):
    """A factor that is a number of NumPy, which torch does not load."""
    return np.sqrt(step)


SCHEDULES = {
    "exponential": (lambda made: lr_scheduler.ExponentialLR(made, 0.5), [0.4, 0.2, 0.1, 0.05]),
    "one cycle": (
        lambda made: lr_scheduler.OneCycleLR(made, 1.0, 4, pct_start=0.5, cycle_momentum=False),
        [0.04, 1.0, 0.500002, 0.000004],
    ),
    "of NumPy": (
        lambda made: lr_scheduler.LambdaLR(made, root),
        [0.0, 0.4, 0.4 * 2**0.5, 0.4 * 3**0.5],
    ),
}


@pytest.mark.parametrize(("schedule", "rates"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_scheduler_takes_each_step_and_has_no_warm_up(schedule, rates):
    slope, _, history = sloped(4, optimizer=SGD, learning_rate=0.4, schedule=schedule)
    assert history.learning_rate == pytest.approx(rates, abs=1e-9)
    assert slope == pytest.approx(-sum(rates))


@pytest.fixture
def clock(monkeypatch):
    """Time of a clock that each evaluation of the loss advances by a second."""

    def slow_loss(*given):
        now[0] += 1.0
        return loss(*given)

    now, loss = [1000.0], MaximumLikelihood._loss
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(MaximumLikelihood, "_loss", slow_loss)
    return now


@pytest.mark.usefixtures("clock")
def test_the_step_that_passes_the_budget_is_the_last_and_is_validated():
    phases = (config(100, max_seconds=4.5, validate_every=2), config(2, validate_every=9))
    history = fit(affine_flow(), X, phases, validation=X)
    assert history.phase == [1] * 5 + [2] * 2
    validated = [not math.isnan(nll) for nll in history.validation]
    assert validated == [False, True, False, True, True, False, True]
    assert history.seconds == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.usefixtures("clock")
def test_the_cosine_follows_the_time_that_is_spent():
    run = functools.partial(sloped, schedule="cosine", learning_rate=0.1)
    by_time = run(10**6, max_seconds=200)[2].learning_rate
    by_steps = run(200)[2].learning_rate
    assert len(by_time) == 200
    assert by_time[4:] == pytest.approx(by_steps[4:], rel=1e-6)
    assert by_time[:5] == sorted(by_time[:5])
    assert by_time[-1] < 1e-4 * max(by_time)


@pytest.mark.usefixtures("clock")
def test_a_budget_that_is_not_spent_changes_nothing():
    slope, level, history = sloped(20, schedule="cosine")
    other, other_level, others = sloped(20, schedule="cosine", max_seconds=20.5)
    assert (slope, level) == (other, other_level)
    assert str(history.columns) == str(others.columns)


def interrupted_run(folder, settings, *, at=5):
    """What a run ends with that is interrupted, after a checkpoint two steps before, or not."""

    def interrupt(report):
        if report.step == at:
            raise KeyboardInterrupt

    objective = Sloped(affine_flow())
    checkpoints = Checkpoints(folder=folder, every=3)
    run = functools.partial(fit, objective, X, config(**{"steps": 8, **settings}), validation=X)
    run = functools.partial(run, checkpoints=checkpoints, resume=True)
    if at is not None:
        with pytest.raises(KeyboardInterrupt):
            run(callbacks=[interrupt])
        return interrupted_run(folder, settings, at=None)
    history = run()
    return weights(objective), without_seconds(history)


RUNS = {
    "weight decay": {"weight_decay": 0.1},
    "AdamW": {"optimizer": functools.partial(AdamW, amsgrad=True)},
    "momentum": {"optimizer": functools.partial(SGD, momentum=0.9)},
    "groups": {"optimizer": with_groups, "schedule": "cosine"},
    "adafactor": {"optimizer": lambda parameters, lr: torch.optim.Adafactor(parameters, lr=lr)},
    "one cycle": {
        "optimizer": functools.partial(SGD, momentum=0.9),
        "schedule": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=8),
    },
    "milestones": {"schedule": lambda made: lr_scheduler.MultiStepLR(made, [2, 4, 4, 7])},
    "cycle from zero": {"schedule": lambda made: lr_scheduler.CyclicLR(made, 0, 1, 2)},
    "in sequence": {
        "schedule": lambda made: lr_scheduler.SequentialLR(
            made, [lr_scheduler.LinearLR(made), lr_scheduler.ExponentialLR(made, 0.5)], [4]
        )
    },
    "of NumPy": {"schedule": SCHEDULES["of NumPy"][0]},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_run_with_any_optimizer_resumes_to_the_same_end(settings, tmp_path):
    final, record = interrupted_run(tmp_path / "whole", settings, at=None)
    resumed, again = interrupted_run(tmp_path / "cut", settings)
    assert_same(resumed, final)
    assert again == record


def test_the_time_before_an_interruption_counts(clock, tmp_path):
    settings = {"steps": 10**4, "max_seconds": 9.5, "schedule": "cosine"}
    final, record = interrupted_run(tmp_path / "whole", settings, at=None)
    clock[0] += 10**6
    resumed, again = interrupted_run(tmp_path / "cut", settings)
    assert_same(resumed, final)
    assert again == record
    assert len(torch.load(checkpoints_in(tmp_path / "cut")[0])["history"]["step"]) == 10


def momentum(value, schedule="constant"):
    """Settings whose functions have the same names for all values."""
    return {
        "optimizer": lambda parameters, lr: SGD(parameters, lr=lr, momentum=value),
        "schedule": schedule,
    }


def step_size(value):
    return momentum(0.5, lambda made: lr_scheduler.StepLR(made, value))


OTHERS = {
    "optimizer": ({}, {"optimizer": SGD}, "optimizer of phase 1: none there, .*SGD.* here"),
    "partial": (
        {"optimizer": functools.partial(SGD, momentum=0.9)},
        {"optimizer": functools.partial(SGD, momentum=0.8)},
        "optimizer of phase 1: .*momentum=0.9.* there, .*momentum=0.8",
    ),
    "lambda": (
        momentum(0.9),
        momentum(0.8),
        "momentum of group 1 of the optimizer of phase 1: 0.9 there, 0.8 here",
    ),
    "schedule": ({}, {"schedule": "cosine"}, "schedule of phase 1: 'constant' there, 'cosine'"),
    "scheduler": (
        step_size(3),
        step_size(4),
        "step_size of the scheduler of phase 1: 3 there, 4 here",
    ),
    "decay": ({}, {"weight_decay": 0.1}, "weight_decay of phase 1: none there, 0.1 here"),
    "budget": ({"max_seconds": 1e9}, {}, "max_seconds of phase 1: 1000000000.0 there, none here"),
}


@pytest.mark.parametrize(("there", "here", "message"), OTHERS.values(), ids=OTHERS)
def test_a_run_with_another_optimizer_or_schedule_is_told_apart(there, here, message, tmp_path):
    final, _ = interrupted_run(tmp_path, there, at=None)
    assert_same(interrupted_run(tmp_path, there, at=None)[0], final)
    with pytest.raises(ValueError, match=f"are of another run.*{message}"):
        interrupted_run(tmp_path, here, at=None)


def test_runs_begun_before_there_were_these_settings_resume():
    plan = [(MaximumLikelihood(affine_flow()), TrainingConfig())]
    told = fingerprint(plan, plan[0][0].flow, None, None, Processes(torch.device("cpu")))
    assert [name for name in told if "optimizer" in name or "scheduler" in name] == []
    assert {"weight_decay of phase 1", "max_seconds of phase 1"}.isdisjoint(told)


def replaced(*path, by):
    """A change of a state: another value at a path of keys."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = by

    return change


DAMAGES = {
    "no moment": replaced("optimizer", "state", 0, by={}),
    "moment of another shape": replaced(
        *("optimizer", "state", 0, "momentum_buffer"), by=torch.zeros(7)
    ),
    "moment of no parameter": replaced("optimizer", "state", 99, by={}),
    "no groups": replaced("optimizer", "param_groups", by=[]),
    "setting of text": replaced("optimizer", "param_groups", 0, "momentum", by="0.9"),
    "no scheduler": replaced("scheduler", by={}),
    "scheduler of text": replaced("scheduler", "last_epoch", by="3"),
    "rates of nothing": replaced("scheduler", "base_lrs", by=[]),
    "time of text": replaced("seconds", by="1"),
    "no time": replaced("seconds", by=math.nan),
    "time below": replaced("seconds", by=-1.0),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_refused_and_changes_nothing(damage, tmp_path):
    decayed = functools.partial(SGD, momentum=0.9, weight_decay=0.5)
    settings = {**RUNS["one cycle"], "optimizer": decayed, "max_seconds": 1e9}
    interrupted_run(tmp_path, settings, at=None)
    finished, middle = checkpoints_in(tmp_path)
    finished.unlink()
    state = torch.load(middle)
    damage(state["phase"])
    del state["format"]
    write_checkpoint(tmp_path, 6, state, keep=1)

    objective = Sloped(affine_flow())
    before = weights(objective)
    with pytest.raises(ValueError, match="holds no state of this run"):
        fit(
            objective,
            X,
            config(8, **settings),
            validation=X,
            checkpoints=Checkpoints(folder=tmp_path, every=3),
            resume=True,
        )
    assert_same(weights(objective), before)
    assert all(parameter.grad is None for parameter in objective.parameters())


class Frightful(lr_scheduler.LambdaLR):
    """A scheduler whose state holds an object."""

    def state_dict(self):
        return {**super().state_dict(), "clock": Counter}


def test_a_state_that_no_checkpoint_may_hold_is_refused_in_words(tmp_path):
    settings = {"schedule": lambda made: Frightful(made, lambda step: 1.0)}
    assert sloped(3, **settings)[2].step == [1, 2, 3]
    with pytest.raises(TypeError, match=r"the state of the scheduler must hold.*Counter.*Leave"):
        interrupted_run(tmp_path, settings, at=None)


def part_of(parameters, lr):
    return Adam(parameters[1:], lr=lr)


REFUSED = {
    "no optimizer": (
        {"optimizer": lambda parameters, lr: {}},
        TypeError,
        "optimizer must make a .*; got dict",
    ),
    "closure": (
        {"optimizer": torch.optim.LBFGS},
        ValueError,
        "without a closure; got LBFGS. Try torch.optim.AdamW",
    ),
    "left out": (
        {"optimizer": part_of},
        ValueError,
        r"each parameter of the objective; got one without 'flow.*requires_grad_\(False\)",
    ),
    "no scheduler": ({"schedule": repr}, TypeError, "schedule must make a .*LRScheduler; got str"),
    "scheduler of another": (
        {"schedule": lambda _: lr_scheduler.StepLR(Adam([torch.zeros(1)]), 1)},
        ValueError,
        "schedule must make a scheduler of the optimizer that it is given",
    ),
    "plateau": (
        {"schedule": lr_scheduler.ReduceLROnPlateau},
        ValueError,
        "got ReduceLROnPlateau, which needs a loss",
    ),
}


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_train_is_refused_before_the_first_phase(settings, error, message):
    flow = affine_flow()
    before = weights(flow)
    with pytest.raises(error, match=message):
        fit(flow, X, (config(3), config(3, **settings)), validation=None)
    assert_same(weights(flow), before)


def test_a_frozen_parameter_may_be_left_out():
    flow = affine_flow()
    first, *others = flow.parameters()
    first.requires_grad_(False)
    before = first.clone()
    fit(flow, X, config(2, optimizer=part_of), validation=None)
    assert torch.equal(first, before)
    assert all(parameter.abs().sum() > 0 for parameter in others)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"optimizer": "adam"}, TypeError, "optimizer must be callable .*AdamW; got str"),
        (
            {"optimizer": AdamW, "weight_decay": 0.1},
            ValueError,
            r"weight_decay must be 0 with .*; got 0.1. .*partial\(torch.optim.AdamW, weight",
        ),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0 and finite; got -0"),
        ({"max_seconds": 0}, ValueError, "max_seconds must be positive and finite, or None; got 0"),
        ({"schedule": 3}, ValueError, "schedule must be one of cosine, constant; got 3"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        TrainingConfig(**settings)
