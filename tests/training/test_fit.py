"""Laws of training: what is learnt, kept, recorded and repeated, and how it stops."""

import copy
import csv
import dataclasses
import functools
import math
import pickle
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from training_runs import (
    CHEAP,
    affine_flow,
    assert_same,
    config,
    differ,
    linear_flow,
    small_cnf,
    weights,
    without_seconds,
)
from zoo import UserNetwork, perturbed

from cnf import (
    CNF,
    Exact,
    Flow,
    Hutchinson,
    ModuleField,
    ODEError,
    ODESolver,
    Standardize,
    count_evaluations,
)
from cnf.objectives import MaximumLikelihood
from cnf.training import History, TrainingConfig, TrainingError, fit
from cnf.training.data import as_rows
from cnf.training.distributed import Processes
from cnf.training.initialization import sample_of, warn_if_far_from_standard
from cnf.training.validation import validation_loss
from cnf.transforms import (
    Affine,
    Augment,
    ContinuousTransform,
    Dequantize,
    FactorOut,
    Flatten,
    Logit,
)
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves


class Watched(MaximumLikelihood):
    """Maximum likelihood that keeps the batches and the weights that each step began with."""

    def __init__(self, flow, **settings):
        super().__init__(flow, **settings)
        self.batches, self.weights, self.losses = [], [], []

    def _loss(self, x, context, *others):
        self.batches.append(x if context is None else torch.cat([x, context], -1))
        self.weights.append(weights(self.flow))
        loss = super()._loss(x, context, *others)
        self.losses.append(loss.item())
        return loss


class FailsAt(Watched):
    """Goes wrong at one step, in one of several ways."""

    def __init__(self, flow, step, kind):
        super().__init__(flow, solver=CHEAP)
        self.step, self.kind = step, kind

    def _loss(self, x, context, *others):
        fails = len(self.batches) + 1 == self.step
        if fails and self.kind == "budget":
            self.solver = ODESolver(max_evaluations=3)
        if fails and self.kind == "budget of the backward pass":
            precise = ODESolver(rtol=1e-9, atol=1e-9, gradient="adjoint")
            with torch.no_grad(), count_evaluations(self.flow) as forward:
                self.flow.using(solver=precise).log_prob(x, context)
            # The backward solve, of more and rougher parts, needs more.
            self.solver = replace(precise, max_evaluations=forward.value)
        loss = super()._loss(x, context, *others)
        if not fails:
            return loss
        if self.kind == "gradient":
            weight = next(self.flow.parameters())
            return loss + (0 * weight).sqrt().sum()  # adds 0, whose derivative is NaN
        return loss * {"nan": math.nan, "inf": math.inf}.get(self.kind, 1.0)


def gaussian_rows(rows=300):
    mixing = torch.tensor([[1.0, 0.0], [-0.8, 0.5]])
    return torch.randn(rows, 2) @ mixing.T + torch.tensor([2.0, -1.0])


@pytest.mark.slow
def test_a_linear_flow_learns_the_mean_and_covariance_of_the_data():
    x = gaussian_rows()
    flow = linear_flow()
    field = flow.chain[0].vector_field
    before = -flow.log_prob(x).mean()

    fit(flow, x, config(150, schedule="cosine", learning_rate=0.1, batch_size=300), validation=None)

    mean, _ = field.solution(torch.zeros(2), start=0.0, end=1.0)
    propagator = torch.linalg.matrix_exp(field.weight)
    covariance = torch.cov(x.T, correction=0)
    torch.testing.assert_close(mean, x.mean(0), rtol=0, atol=5e-3)
    torch.testing.assert_close(propagator @ propagator.T, covariance, rtol=0, atol=5e-3)
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * covariance)
    torch.testing.assert_close(-flow.log_prob(x).mean(), entropy, rtol=0, atol=1e-4)
    assert before > entropy + 1


@pytest.mark.slow
def test_a_conditional_flow_learns_how_the_data_depend_on_the_context():
    context = torch.randn(400, 1)
    x = 2 * context - 1 + 0.5 * torch.randn(400, 1)
    flow = linear_flow(1, 1)

    fit(
        flow,
        (x, context),
        config(150, schedule="cosine", learning_rate=0.1, batch_size=400),
        validation=None,
    )

    design = torch.cat([context, torch.ones_like(context)], -1)
    coefficients = torch.linalg.lstsq(design, x).solution
    std = (x - design @ coefficients).square().mean().sqrt()
    places = torch.tensor([[-1.0], [0.0], [2.0]])
    means = flow.to_data(torch.zeros(3, 1), places)
    expected = places * coefficients[0] + coefficients[1]
    torch.testing.assert_close(means, expected, rtol=0, atol=1e-2)
    spread = flow.to_data(torch.ones(3, 1), places) - means
    torch.testing.assert_close(spread, std.expand(3, 1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_flow_is_trained_in_its_own_dtype_whatever_the_default(dtype):
    x = gaussian_rows(50).to(dtype)
    flow = small_cnf().to(dtype)
    start = copy.deepcopy(flow)
    torch.set_default_dtype(torch.float64 if dtype == torch.float32 else torch.float32)

    history = fit(flow, x, config(3, batch_size=50), validation=x)
    start.initialize(x)

    assert {t.dtype for t in flow.state_dict().values() if t.is_floating_point()} == {dtype}
    precision = 1e-5 if dtype == torch.float32 else 1e-12
    assert history.loss[0] == pytest.approx(MaximumLikelihood(start)(x).item(), rel=precision)
    assert history.validation[-1] < history.loss[0]


def test_training_lowers_the_loss_of_a_cnf():
    flow = small_cnf(transforms=[Standardize(2)])
    history = fit(
        flow, gaussian_rows(), config(20, learning_rate=0.02, batch_size=300), validation=None
    )
    assert history.loss[-1] < history.loss[0] - 0.3


def test_buffers_are_left_as_they_are():
    x = gaussian_rows(50)
    standardize = Standardize.from_data(x)
    mean = standardize.mean.clone()
    fit(Flow([standardize, Affine(2)]), x, config(ema=0.9), validation=x)
    assert torch.equal(standardize.mean, mean)


class Counting(nn.Module):
    """A network with a buffer that training changes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, t, x):
        self.calls += 1
        return self.layer(x)


def test_the_average_has_the_buffers_of_the_flow():
    seen = []
    field = ModuleField(Counting(), 2)
    flow = Flow([ContinuousTransform(field, solver=CHEAP)])

    def look(report):
        buffer = report.flow.chain[0].vector_field.network.calls
        seen.append((buffer.item(), field.network.calls.item()))

    history = fit(flow, torch.randn(10, 2), config(3, ema=0.9), callbacks=[look], validation=None)

    evaluations = np.cumsum(history.nfe).tolist()
    assert seen == [(calls, calls) for calls in evaluations]
    assert field.network.calls == evaluations[-1]


def test_frozen_parameters_stay():
    flow = affine_flow()
    flow.chain[0].loc.requires_grad_(False)
    fit(flow, gaussian_rows(20), config(), validation=None)
    assert torch.equal(flow.chain[0].loc, torch.zeros(2))
    assert not torch.equal(flow.chain[0].log_scale, torch.zeros(2))


@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_flow_ends_with_the_weights_of_the_best_validation(ema):
    x, held_out = 3 + gaussian_rows(8) / 100, torch.full((8, 2), 1.0)
    flow = affine_flow()

    history = fit(
        flow, x, config(40, learning_rate=0.1, validate_every=1, ema=ema), validation=held_out
    )

    nll = -flow.log_prob(held_out).mean().item()
    assert nll == pytest.approx(min(history.validation), abs=1e-12)
    assert min(history.validation) < min(history.validation[0], history.validation[-1]) - 0.01


def test_validation_counts_every_row_in_whatever_chunks(monkeypatch):
    flow = affine_flow()
    held_out = torch.randn(50, 2)
    monkeypatch.setattr("cnf.training.validation._ROWS", 7)
    history = fit(flow, torch.randn(20, 2), config(1), validation=held_out)
    assert history.validation == [pytest.approx(-flow.log_prob(held_out).mean().item(), rel=1e-12)]


class Shared(Processes):
    """One of several processes, which adds up what it and those before it computed."""

    def __init__(self, rank, count, before=(0.0, 0.0)):
        self.rank, self.count, self.before = rank, count, before

    def share(self, rows):
        return torch.arange(rows).tensor_split(self.count)[self.rank]

    def sums(self, compute):
        self.total = tuple(map(sum, zip(compute(), self.before, strict=True)))
        return self.total


def test_validation_draws_the_same_in_any_number_of_processes(monkeypatch):
    monkeypatch.setattr("cnf.training.validation._ROWS", 7)
    flow = perturbed(Flow([Augment(2, 1, hidden_features=(4,)), Affine(3)]))
    rows = as_rows("validation", torch.randn(50, 2), flow)
    alone = validation_loss(flow, rows, Shared(0, 1))
    for count in (2, 3, 10):
        before = (0.0, 1e-300)
        for rank in range(count):
            process = Shared(rank, count, before)
            together = validation_loss(flow, rows, process)
            before = process.total
        assert together == pytest.approx(alone, rel=1e-12)


def test_validation_changes_neither_the_training_nor_its_record():
    x, context = torch.randn(20, 2), torch.randn(20, 3)
    flow = CNF(2, 3, hidden_features=(8, 8), divergence=Hutchinson())
    other = copy.deepcopy(flow)
    watched, alone = Watched(flow), Watched(other)

    history = fit(
        watched, (x, context), config(batch_size=5, validate_every=2), validation=(x, context)
    )
    history_alone = fit(alone, (x, context), config(batch_size=5), validation=None)

    assert history.loss == history_alone.loss
    assert history.nfe == history_alone.nfe
    assert_same(watched.weights[-1], alone.weights[-1])


@pytest.mark.parametrize(("steps", "every", "expected"), [(7, 3, [3, 6, 7]), (6, 3, [3, 6])])
def test_validation_is_taken_when_due_and_at_the_end(steps, every, expected):
    x = torch.randn(10, 2)
    history = fit(affine_flow(), x, config(steps, validate_every=every), validation=x)
    taken = [
        step
        for step, nll in zip(history.step, history.validation, strict=True)
        if not math.isnan(nll)
    ]
    assert taken == expected


def test_without_validation_the_flow_ends_with_the_last_weights():
    x = torch.randn(20, 2)
    shorter, longer = affine_flow(), Watched(affine_flow())
    history = fit(shorter, x, config(4, batch_size=5), validation=None)
    fit(longer, x, config(5, batch_size=5), validation=None)
    assert_same(weights(shorter), longer.weights[4])
    assert all(math.isnan(nll) for nll in history.validation)


def test_ema_ends_with_the_exponential_average_of_the_weights():
    x, decay = torch.randn(20, 2), 0.7
    averaged, watched = affine_flow(), Watched(affine_flow())
    fit(watched, x, config(6, batch_size=5, learning_rate=0.1), validation=None)

    fit(averaged, x, config(5, batch_size=5, learning_rate=0.1, ema=decay), validation=None)

    decays = [min(decay, (1 + n) / (10 + n)) for n in range(1, 6)]
    assert decays[0] == 2 / 11  # the initial weights are soon forgotten
    for name, value in averaged.state_dict().items():
        expected = watched.weights[0][name]
        for each, step in zip(decays, watched.weights[1:], strict=True):
            expected = each * expected + (1 - each) * step[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-14)


def test_ema_does_not_disturb_the_training():
    x = torch.randn(20, 2)
    plain, averaged = Watched(affine_flow()), Watched(affine_flow())
    fit(plain, x, config(batch_size=5), validation=None)
    fit(averaged, x, config(batch_size=5, ema=0.9), validation=None)
    assert plain.losses == averaged.losses


def test_each_epoch_visits_each_row_once_in_a_new_order_with_its_context():
    rows = torch.arange(12.0)
    objective = Watched(CNF(2, 1, hidden_features=(4, 4)), solver=CHEAP)

    fit(
        objective,
        (torch.stack([rows / 12, rows.sin()], -1), rows[:, None]),
        config(6, batch_size=4, learning_rate=1e-6),
        validation=None,
    )

    seen = torch.cat(objective.batches)
    assert torch.equal(seen[:, 0], seen[:, 2] / 12)
    first, second = seen[:12, 2], seen[12:, 2]
    assert torch.equal(first.sort().values, rows)
    assert torch.equal(second.sort().values, rows)
    assert not torch.equal(first, rows)
    assert not torch.equal(first, second)


def test_rows_that_fill_no_batch_wait_for_the_next_epoch():
    objective = Watched(affine_flow(1))
    fit(
        objective,
        torch.arange(10.0)[:, None],
        config(40, batch_size=4, learning_rate=1e-6),
        validation=None,
    )

    assert {len(batch) for batch in objective.batches} == {4}
    epochs = zip(objective.batches[::2], objective.batches[1::2], strict=True)
    assert all(len(torch.cat(epoch).unique()) == 8 for epoch in epochs)
    assert len(torch.cat(objective.batches).unique()) == 10


@pytest.mark.parametrize("batch_size", [10, 11, 1000])
def test_a_batch_larger_than_the_data_is_all_of_them(batch_size):
    objective = Watched(affine_flow(1))
    fit(objective, torch.arange(10.0)[:, None], config(3, batch_size=batch_size), validation=None)
    for batch in objective.batches:
        assert torch.equal(batch.sort(0).values, torch.arange(10.0)[:, None])


def test_the_learning_rate_rises_over_2_percent_of_the_steps_and_then_stays_or_falls():
    x = torch.randn(4, 1)
    rates = {
        schedule: fit(
            affine_flow(1), x, config(200, schedule=schedule, learning_rate=0.1), validation=None
        ).learning_rate
        for schedule in ("constant", "cosine")
    }

    for column in rates.values():
        assert column[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates["constant"][4:] == pytest.approx([0.1] * 196)
    # A half cosine is at 1, 3/4, 1/2 and 1/4 of its height at 0, 1/3, 1/2 and 2/3 of its length.
    cosine = np.interp(4 + 196 * np.array([0, 1 / 3, 1 / 2, 2 / 3]), range(200), rates["cosine"])
    assert cosine == pytest.approx([0.1, 0.075, 0.05, 0.025], abs=1e-5)
    assert rates["cosine"][-1] < 1e-4 * rates["cosine"][4]
    assert (np.diff(rates["cosine"][4:]) < 0).all()


@pytest.mark.parametrize("clip", [None, 1e-8, 1e-7, 100.0])
def test_the_first_step_is_that_of_adam_with_the_clipped_gradient(clip):
    x = 1 + torch.randn(20, 2)
    flow = affine_flow()
    parameters = list(flow.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    gradient = torch.autograd.grad(-flow.log_prob(x).mean(), parameters)
    norm = math.sqrt(sum(float(part.square().sum()) for part in gradient))
    scale = 1.0 if clip is None else min(1.0, clip / norm)

    fit(flow, x, config(1, gradient_clip=clip, learning_rate=0.01), validation=None)

    for parameter, start, part in zip(parameters, before, gradient, strict=True):
        clipped = scale * part
        expected = start - 0.01 * clipped / (clipped.abs() + 1e-8)  # Adam divides by |g| + eps
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
def test_nfe_counts_the_calls_of_the_network_forward_and_backward(gradient):
    network = UserNetwork(2)
    calls = []
    network.register_forward_pre_hook(lambda *_: calls.append(None))
    flow = Flow([ContinuousTransform(perturbed(ModuleField(network, 2)))])
    counts = []

    class Counted(Watched):
        def _loss(self, *given):
            counts.append(len(calls))
            return super()._loss(*given)

    solver = ODESolver(rtol=1e-2, atol=1e-2, gradient=gradient)
    objective, x = Counted(flow, solver=solver), torch.randn(10, 2)
    ends = []
    history = fit(
        objective,
        x,
        config(3),
        validation=None,
        accuracy=None,
        callbacks=[lambda report: ends.append(len(calls))],
    )

    assert history.nfe == np.diff([*counts, ends[-1]]).tolist()
    assert min(history.nfe) > 0


def test_the_adjoint_costs_evaluations_in_the_backward_pass_and_backprop_none():
    x = torch.randn(10, 2)
    nfe = {
        gradient: fit(
            MaximumLikelihood(
                small_cnf(), solver=ODESolver(method="rk4", steps=3, gradient=gradient)
            ),
            x,
            config(1),
            validation=None,
        ).nfe
        for gradient in ("adjoint", "backprop")
    }
    assert nfe["backprop"] == [4 * 3]
    assert nfe["adjoint"][0] > 2 * 4 * 3 - 1


def stochastic_run(seed, start):
    """A run in which order and probes are drawn, the weights averaged and validated."""
    flow = copy.deepcopy(start)
    x = torch.linspace(-2, 2, 20)[:, None] ** torch.tensor([1.0, 2.0])
    settings = config(4, batch_size=8, ema=0.5, validate_every=2, seed=seed)
    return fit(flow, x, settings, validation=x.flip(0)), weights(flow)


def test_the_same_seed_repeats_a_run_bit_for_bit_and_another_does_not():
    start = perturbed(small_cnf(divergence=Hutchinson(), solver=CHEAP))
    history, final = stochastic_run(1, start)
    torch.manual_seed(99)
    torch.rand(7)
    again, final_again = stochastic_run(1, start)
    other, final_other = stochastic_run(2, start)

    assert without_seconds(again) == without_seconds(history)
    assert_same(final_again, final)
    assert other.loss != history.loss
    assert differ(final_other, final)


@pytest.mark.parametrize("what", ["probes", "order"])
def test_the_seed_draws_the_probes_and_the_order(what):
    divergence = Hutchinson() if what == "probes" else Exact()
    start = perturbed(small_cnf(divergence=divergence, solver=CHEAP))
    x = torch.randn(8, 2)
    losses = {
        tuple(
            fit(copy.deepcopy(start), x, config(3, batch_size=2, seed=seed), validation=None).loss
        )
        for seed in range(3)
    }
    assert len(losses) == 3


def test_training_draws_no_global_random_number():
    start = perturbed(small_cnf(divergence=Hutchinson(), solver=CHEAP))
    before, numpy_before = torch.get_rng_state(), str(np.random.get_state())
    stochastic_run(1, start)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state()) == numpy_before


def test_training_changes_neither_the_data_nor_global_settings():
    x, context = torch.randn(20, 2), torch.randn(20, 1)
    kept = x.clone(), context.clone()
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()

    fit(CNF(2, 1, hidden_features=(4, 4)), (x, context), config(2), validation=None)

    assert torch.equal(x, kept[0])
    assert torch.equal(context, kept[1])
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) == before


def filled_history():
    history = History()
    history.append(step=1, loss=math.pi, learning_rate=1e-3, nfe=14, seconds=0.1)
    history.append(step=2, loss=1 / 3, learning_rate=2e-3, nfe=8, seconds=1e-9, validation=-0.7)
    history.append(step=3, loss=-1e300, learning_rate=5e-324, nfe=10**6, seconds=2.0, phase=2)
    return history


def test_the_record_has_a_row_for_each_step():
    objective = Watched(affine_flow())
    history = fit(objective, torch.randn(20, 2), config(5, batch_size=5), validation=None)
    assert history.step == [1, 2, 3, 4, 5]
    assert history.loss == objective.losses
    assert {len(column) for column in history.columns.values()} == {5}
    assert history.seconds == sorted(history.seconds)
    assert history.seconds[0] > 0


def test_loading_a_record_undoes_saving_it_and_more_can_be_appended(tmp_path):
    history = filled_history()

    history.save(tmp_path / "history.csv")
    loaded = History.load(tmp_path / "history.csv")

    assert str(loaded) == str(history)
    assert [type(value) for value in loaded.step + loaded.nfe] == [int] * 6
    for record in (history, loaded):
        record.append(step=4, loss=0.0, learning_rate=0.1, nfe=1, seconds=3.0)
    assert str(loaded) == str(history)
    assert loaded.step == [1, 2, 3, 4]


def test_an_empty_record_is_saved_too(tmp_path):
    History().save(tmp_path / "history.csv")
    assert History.load(tmp_path / "history.csv") == History()


def test_the_file_of_a_record_is_csv_with_named_columns(tmp_path):
    filled_history().save(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "phase", "loss", "learning_rate", "nfe", "seconds", "validation"]
    assert [float(row[2]) for row in rows] == [math.pi, 1 / 3, -1e300]
    assert [row[6] for row in rows] == ["nan", "-0.7", "nan"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the columns step, phase, loss"),
        ("a,b\n1,2\n", r"must have the columns .*got \['a', 'b'\]"),
        ("HEADER\n1,1,2.0,0.1\n", "is damaged in line 2"),
        ("HEADER\n1,1,2.0,0.1,14,0.5,nan\n2,1,x,0.1,14,0.6,nan\n", "is damaged in line 3"),
        ("HEADER\n1,1,2.0,0.1,14,0.5,nan,7\n", "is damaged in line 2"),
    ],
    ids=["empty", "other columns", "short row", "text", "long row"],
)
def test_what_is_no_record_is_refused_by_name(text, message, tmp_path):
    path = tmp_path / "history.csv"
    path.write_text(text.replace("HEADER", ",".join(History().columns)))
    with pytest.raises(ValueError, match=re.escape(repr(str(path))) + " " + message):
        History.load(path)


def test_a_missing_record_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        History.load(tmp_path / "nowhere.csv")


def test_the_plot_of_a_record_shows_its_losses_and_validations():
    history = History()
    for step in range(1, 31):
        history.append(
            step=step,
            loss=3.0 / step,
            learning_rate=0.1,
            nfe=14,
            seconds=float(step),
            validation=1 + 1 / step if step % 10 == 0 else math.nan,
        )

    (ax,) = history.plot().axes

    raw, validation = ax.lines[0], ax.lines[2]
    np.testing.assert_array_equal(raw.get_xdata(), history.step)
    np.testing.assert_array_equal(raw.get_ydata(), history.loss)
    np.testing.assert_array_equal(validation.get_xdata(), [10, 20, 30])
    np.testing.assert_array_equal(validation.get_ydata(), [1.1, 1.05, 1 + 1 / 30])


def test_a_progress_bar_is_shown_on_stderr_only_when_asked_for(capsys):
    x = torch.randn(10, 2)
    fit(affine_flow(), x, TrainingConfig(steps=3, progress=False), validation=x)
    assert capsys.readouterr() == ("", "")

    history = fit(affine_flow(), x, TrainingConfig(steps=3, progress=True), validation=x)

    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err
    assert f"loss {history.loss[-1]:.4f}" in err
    assert f"validation {history.validation[-1]:.4f}" in err


FAILURES = {
    "nan": "the loss is nan",
    "inf": "the loss is -?inf",
    "gradient": "the norm of the gradient is nan",
    "budget": "the solve with dopri5 spent its budget of max_evaluations=3,",
    "budget of the backward pass": "the backward solve with dopri5 spent its budget",
}


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_step_leaves_the_weights_of_the_last_good_loss_and_the_record_up_to_it(kind, step):
    flow = perturbed(small_cnf())
    objective = FailsAt(flow, step, kind)
    settings = config(6, batch_size=5, ema=0.9)

    with pytest.raises(TrainingError, match=FAILURES[kind]) as caught:
        fit(objective, torch.randn(20, 2), settings, validation=None)

    error = caught.value
    assert f"training stopped at step {step} of 6" in str(error)
    assert "Objective: FailsAt. Settings: steps=6, batch_size=5, " in str(error)
    assert "objective=" not in str(error)
    assert "Try a lower learning_rate" in str(error)
    assert isinstance(error.__cause__, ODEError) == kind.startswith("budget")
    assert error.history.step == list(range(1, step))
    assert error.history.loss == objective.losses[: step - 1]
    last_good = max(step - 1, 1)  # at the first step there are only the initial weights
    assert_same(weights(flow), objective.weights[last_good - 1])


def test_any_error_in_a_step_leaves_the_weights_of_the_last_good_loss():
    class OwnError(Exception):
        pass

    class Raises(Watched):
        def _loss(self, *given):
            loss = super()._loss(*given)
            if len(self.batches) == 4:
                raise OwnError
            return loss

    objective = Raises(affine_flow())
    with pytest.raises(OwnError):
        fit(objective, torch.randn(20, 2), config(6, batch_size=5), validation=None)
    assert_same(weights(objective.flow), objective.weights[2])


def test_the_weights_left_by_a_failure_have_the_last_loss_on_record():
    flow = perturbed(small_cnf())
    objective = FailsAt(flow, 4, "nan")
    with pytest.raises(TrainingError) as caught:
        fit(objective, torch.randn(20, 2), config(6, batch_size=5), validation=None)
    batch = objective.batches[len(caught.value.history.step) - 1]
    assert MaximumLikelihood(flow, solver=CHEAP)(batch).item() == caught.value.history.loss[-1]


def test_a_run_that_diverges_stops_and_leaves_a_usable_flow():
    x = torch.randn(20, 2)
    flow = small_cnf()
    with pytest.raises(TrainingError, match="training stopped at step") as caught:
        fit(flow, x, config(20, learning_rate=1e200), validation=None)
    assert len(caught.value.history.loss) >= 1
    assert flow.log_prob(x).isfinite().all()


def test_a_validation_that_fails_stops_the_run_and_undoes_its_step():
    flow = perturbed(small_cnf(solver=ODESolver(max_evaluations=2), standardize=False))
    before = weights(flow)
    x = torch.randn(10, 2)

    with pytest.raises(TrainingError, match=r"step 1 of 5: .*max_evaluations=2") as caught:
        fit(MaximumLikelihood(flow, solver=CHEAP), x, config(validate_every=1), validation=x)

    assert caught.value.history == History()
    assert_same(weights(flow), before)


def test_a_validation_that_is_not_finite_stops_the_run():
    x = 1 + torch.rand(4, 2)
    with pytest.raises(TrainingError, match=r"the validation loss is -?(inf|nan)"):
        fit(affine_flow(), x, config(1), validation=1e300 * x)


def test_a_flow_can_be_trained_on_after_a_failure():
    flow = perturbed(small_cnf())
    x = torch.randn(20, 2)
    with pytest.raises(TrainingError):
        fit(FailsAt(flow, 3, "budget of the backward pass"), x, config(), validation=None)
    assert len(fit(flow, x, config(2), validation=None).loss) == 2


zeros = functools.partial(torch.zeros, dtype=torch.float32)

NAN_ROWS = zeros(5, 2)
NAN_ROWS[1, 0], NAN_ROWS[3, 1] = math.nan, math.inf

BAD_ROWS = {
    "width": (zeros(5, 3), ValueError, r"NAME must have shape \(\*batch, 2\); got \(5, 3\)"),
    "one row": (zeros(2), ValueError, r"NAME must have shape \(rows, 2\); got \(2,\)"),
    "axes": (zeros(5, 4, 2), ValueError, r"NAME must have shape \(rows, 2\); got \(5, 4, 2"),
    "empty": (zeros(0, 2), ValueError, r"NAME must have shape \(rows, 2\); got \(0, 2\)"),
    "NaN": (NAN_ROWS, ValueError, "NAME must be finite; got NaN or inf in rows 1, 3"),
    "ints": (
        zeros(5, 2).long(),
        ValueError,
        r"NAME must have a floating dtype; got torch\.int64.*NAME\.to\(torch\.float32\)",
    ),
    "other dtype": (
        zeros(5, 2).double(),
        ValueError,
        r"NAME must have the model's dtype torch\.float32; got torch\.float64",
    ),
    "numpy": (np.zeros((5, 2)), TypeError, r"NAME must be a torch\.Tensor; got ndarray\. Try"),
    "list": ([[0.0, 0.0]] * 5, TypeError, r"NAME must be a torch\.Tensor; got list"),
    "None in a pair": ((None, None), TypeError, r"NAME must be a torch\.Tensor; got NoneType"),
    "context unasked for": (
        (zeros(5, 2), zeros(5, 1)),
        ValueError,
        r"context must be None, because the model has context_features=0.*\(5, 1\)",
    ),
}

BAD_CONTEXTS = {
    "missing": (None, ValueError, r"NAME must be a pair of rows and contexts.*Pass \(x, context\)"),
    "width": (zeros(5, 1), ValueError, r"context must have shape .*got \(5, 1\)"),
    "too few": (zeros(4, 3), ValueError, r"NAME must have one context for each row; .*\(4,"),
    "one for all": (zeros(3), ValueError, "NAME must have one context for each row"),
    "NaN": (zeros(5, 3) / 0, ValueError, r"context must be finite.*rows 0, 1, 2"),
    "numpy": (np.zeros((5, 3)), TypeError, r"context must be a torch\.Tensor; got ndarray"),
}


@pytest.fixture(params=["data", "validation"])
def refuses(request):
    """A check that `fit` refuses something as data, or as validation, and leaves the flow alone."""

    def check(flow, good, bad, error, message):
        before = weights(flow)
        data, validation = (bad, None) if request.param == "data" else (good, bad)
        with pytest.raises(error, match=message.replace("NAME", request.param)):
            fit(flow, data, config(), validation=validation)
        assert_same(weights(flow), before)

    return check


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("bad", "error", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_by_name(bad, error, message, refuses):
    refuses(small_cnf().float(), zeros(5, 2), bad, error, message)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("bad", "error", "message"), BAD_CONTEXTS.values(), ids=BAD_CONTEXTS)
def test_bad_contexts_are_refused_by_name(bad, error, message, refuses):
    x = zeros(5, 2)
    flow = CNF(2, 3, hidden_features=(4, 4)).float()
    refuses(flow, (x, zeros(5, 3)), (x, bad), error, message)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    "objective",
    [nn.Linear(2, 2), None, "flow", lambda x: x],
    ids=["module", "None", "str", "function"],
)
def test_what_is_no_objective_is_refused_with_the_way_to_make_one(objective):
    expected = r"objective must be a cnf\.Flow or a cnf\.objectives\.Objective; got "
    remedy = r"\. Make one of your own by subclassing Objective: call super.*write _loss\(x, "
    with pytest.raises(TypeError, match=expected + type(objective).__name__ + remedy):
        fit(objective, torch.zeros(5, 2), config(), validation=None)


@pytest.mark.usefixtures("shapes_unchecked")
def test_validation_in_the_place_of_the_config_is_refused():
    x = torch.zeros(5, 2)
    with pytest.raises(TypeError, match="config must be a TrainingConfig or several; got Tensor"):
        fit(affine_flow(), x, x, validation=None)


@pytest.mark.parametrize("make", [lambda: Flow([Standardize(2)]), lambda: frozen(affine_flow())])
def test_a_flow_with_nothing_to_train_is_refused(make):
    with pytest.raises(ValueError, match="objective must have parameters to train"):
        fit(make(), torch.zeros(5, 2), config(), validation=None)


def frozen(flow):
    return flow.requires_grad_(False)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1; got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an int; got 1.5"),
        ({"steps": True}, TypeError, "steps must be an int; got True"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"validate_every": -1}, ValueError, "validate_every must be at least 1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive and fin.*; got 0.0"),
        (
            {"learning_rate": math.nan},
            ValueError,
            "learning_rate must be positive and fin.*; got nan",
        ),
        (
            {"learning_rate": math.inf},
            ValueError,
            "learning_rate must be positive and fin.*; got inf",
        ),
        ({"schedule": "linear"}, ValueError, r"schedule must be one of .*cosine.*got 'linear'"),
        ({"gradient_clip": 0.0}, ValueError, "gradient_clip must be positive or None; got 0"),
        ({"gradient_clip": math.nan}, ValueError, "gradient_clip must be positive or None"),
        ({"ema": 1.0}, ValueError, "ema must be between 0 and 1, or None; got 1.0"),
        ({"ema": 0.0}, ValueError, "ema must be between 0 and 1, or None; got 0.0"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        TrainingConfig(**settings)


def test_settings_cannot_be_changed_after_the_check():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().steps = 0


class WithScale(MaximumLikelihood):
    """An objective with a parameter of its own, whose best value is 3."""

    def __init__(self, flow):
        super().__init__(flow)
        self.own = nn.Parameter(torch.zeros(()))

    def _loss(self, *given):
        return super()._loss(*given) + (self.own - 3).square()


def test_parameters_of_the_objective_itself_are_trained():
    objective = WithScale(affine_flow())
    fit(objective, torch.randn(50, 2), config(200, learning_rate=0.1), validation=None)
    assert objective.own.item() == pytest.approx(3, abs=0.1)


def test_fit_leaves_no_gradients_behind():
    flow = affine_flow()
    fit(flow, torch.randn(50, 2), config(2), validation=None)
    assert all(parameter.grad is None for parameter in flow.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fit_trains_where_gradients_are_switched_off(mode):
    flow, x = affine_flow(), 3 + torch.randn(50, 2)
    with mode():
        history = fit(flow, x, config(20, learning_rate=0.1), validation=None)
    assert history.loss[-1] < history.loss[0]


class InterruptedAt(MaximumLikelihood):
    """Ctrl-C in step `step`."""

    def __init__(self, flow, step):
        super().__init__(flow)
        self.step, self.seen = step, 0

    def _loss(self, *given):
        self.seen += 1
        if self.seen == self.step:
            raise KeyboardInterrupt
        return super()._loss(*given)


def test_the_best_weights_are_kept_when_training_is_interrupted():
    x = torch.randn(50, 2)
    whole, interrupted = affine_flow(), affine_flow()
    settings = {"validate_every": 1, "learning_rate": 0.1, "schedule": "constant"}
    fit(whole, x, config(4, **settings), validation=x)
    with pytest.raises(KeyboardInterrupt):
        fit(InterruptedAt(interrupted, 5), x, config(9, **settings), validation=x)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(interrupted.state_dict()[name], value)


def test_a_training_error_survives_pickling():
    history = History()
    history.append(step=1, loss=2.0, learning_rate=1e-3, nfe=14, seconds=0.1)
    error = pickle.loads(pickle.dumps(TrainingError("stopped", history)))  # noqa: S301 - our own
    assert str(error) == "stopped"
    assert error.history == history or error.history.loss == history.loss


def test_data_far_from_standard_are_warned_of():
    x = 1000 * torch.randn(50, 2)
    with pytest.warns(UserWarning, match=r"put Standardize\(2\) first"):
        fit(affine_flow(), x, config(1), validation=None)
    with pytest.warns(UserWarning, match=r"put Standardize\(2\) first"):
        fit(linear_flow(), x / 1e6, config(1), validation=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Flow([Standardize.from_data(x), *affine_flow().chain]), x, config(1), validation=None)


def image_flow(levels=4):
    return Flow([Flatten((1, 2, 2)), Dequantize(4, levels), Logit(4), Affine(4)])


def test_a_flow_of_images_is_trained_and_validated_on_images():
    x = torch.randint(4, (60, 1, 2, 2)).to(torch.get_default_dtype())
    history = fit(image_flow(), x, config(40, learning_rate=0.05), validation=x[:20])
    assert sum(history.loss[-5:]) < sum(history.loss[:5])
    assert math.isfinite(history.validation[-1])


def test_the_noise_of_a_flow_comes_from_the_seed_of_the_training():
    x = torch.randint(4, (60, 1, 2, 2)).to(torch.get_default_dtype())
    before = torch.get_rng_state()
    first, second = (fit(image_flow(), x, config(3), validation=x[:9]) for _ in range(2))
    assert without_seconds(first) == without_seconds(second)
    assert torch.equal(torch.get_rng_state(), before)


BAD_IMAGES = {
    "flattened": (
        zeros(5, 4),
        ValueError,
        r"NAME must have shape \(\*batch, 1, 2, 2\); got \(5, 4",
    ),
    "one image": (
        zeros(1, 2, 2),
        ValueError,
        r"NAME must have shape \(rows, 1, 2, 2\); got \(1, 2",
    ),
    "no level": (
        torch.tensor([0.0, 3.0, 4.0, 0.5, 1.0]).reshape(5, 1, 1, 1).expand(5, 1, 2, 2),
        ValueError,
        "NAME must be integers from 0 to 3; got other values in rows 2, 3",
    ),
}


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("bad", "error", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_refused_by_name(bad, error, message, refuses):
    refuses(image_flow().float(), zeros(5, 1, 2, 2), bad.float(), error, message)


def test_the_warning_of_data_far_from_standard_solves_nothing():
    flow = Flow([FactorOut([Affine(2), ContinuousTransform(LinearField(2))], 3)])
    with count_evaluations(flow) as nfe:
        warn_if_far_from_standard(flow, sample_of(as_rows("data", torch.randn(10, 3), flow)))
    assert nfe.value == 0


def test_a_history_is_short_to_look_at():
    history = History()
    assert repr(history) == "History(0 steps)"
    history.append(step=1, loss=2.0, learning_rate=1e-3, nfe=14, seconds=0.1)
    assert repr(history) == "History(1 steps, loss 2.0000)"
