"""Laws of the phases of training: what passes from one to the next, and how each may end."""

import copy
import functools
import math
import sys

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.utils.data import TensorDataset
from training_runs import (
    CHEAP,
    affine_flow,
    assert_same,
    config,
    differ,
    small_cnf,
    weights,
    without_seconds,
)
from zoo import perturbed

from cnf import (
    CNF,
    Checkpoints,
    Flow,
    FlowMatching,
    Hutchinson,
    ODESolver,
    Standardize,
    TrainingConfig,
    fit,
    recipe,
)
from cnf.objectives import MaximumLikelihood, Objective
from cnf.soap import SOAP
from cnf.training import TrainingError
from cnf.training.data import as_rows, hold_out
from cnf.training.phases import make_plan, usual_phases
from cnf.transforms import Augment, ContinuousTransform, Dequantize, Flatten

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Spy(MaximumLikelihood):
    """Maximum likelihood that tells a list which rows, weights and draws each call began with."""

    def __init__(self, flow, calls, **settings):
        super().__init__(flow, **settings)
        self.calls = calls

    def _loss(self, x, context, weight, draws, generator):
        state = generator.get_state()
        draw = torch.rand((), generator=generator).item()
        self.calls.append((x, weights(self.flow), draw))
        return super()._loss(x, context, weight, draws, generator.set_state(state))


def spied():
    """A list of calls, and what makes an objective that adds to it."""
    calls = []
    return calls, functools.partial(Spy, calls=calls)


def test_phases_follow_each_other_and_the_record_says_which(capsys):
    calls, objective = spied()
    history = fit(
        affine_flow(),
        X,
        (config(3, batch_size=10, progress=True), config(4, batch_size=5, objective=objective)),
        validation=None,
    )
    assert history.phase == [1, 1, 1, 2, 2, 2, 2]
    assert history.step == [1, 2, 3, 4, 5, 6, 7]
    assert [len(x) for x, _, _ in calls] == [5] * 4
    assert "3/3" in capsys.readouterr().err


def test_one_phase_of_several_is_as_one_alone():
    one, several = affine_flow(), affine_flow()
    history = fit(one, X, config(4, batch_size=10, ema=0.5), validation=None)
    of_several = fit(several, X, [config(4, batch_size=10, ema=0.5)], validation=None)
    assert_same(weights(one), weights(several))
    assert without_seconds(history) == without_seconds(of_several)


def test_phases_of_one_seed_draw_and_order_differently():
    calls, objective = spied()
    settings = config(2, batch_size=40, objective=objective, learning_rate=1e-9)
    fit(affine_flow(), X, (settings, settings), validation=None)
    assert len({draw for _, _, draw in calls}) == 4
    assert not torch.equal(calls[0][0], calls[2][0])


def test_a_phase_starts_from_the_average_of_the_one_before():
    averaged = affine_flow()
    fit(averaged, X, config(5, ema=0.9, learning_rate=0.1), validation=None)
    calls, objective = spied()
    phases = (config(5, ema=0.9, learning_rate=0.1), config(1, objective=objective))
    fit(affine_flow(), X, phases, validation=None)
    assert_same(calls[0][1], weights(averaged))


def test_each_phase_has_an_optimiser_and_a_schedule_of_its_own():
    flow, both = affine_flow(), affine_flow()
    fit(flow, X, config(5, learning_rate=0.1), validation=None)
    alone = copy.deepcopy(flow)
    history = fit(
        alone, X, config(5, learning_rate=0.01, schedule="cosine", batch_size=40), validation=None
    )

    phases = (
        config(5, learning_rate=0.1),
        config(5, learning_rate=0.01, schedule="cosine", batch_size=40),
    )
    history_of_both = fit(both, X, phases, validation=None)

    assert history_of_both.learning_rate[5:] == history.learning_rate
    # Only the order of the rows differs, of which each minibatch takes all.
    torch.testing.assert_close(weights(both), weights(alone), rtol=0, atol=1e-12)


def test_the_flow_ends_with_the_best_weights_of_all_phases():
    flow = affine_flow()
    x, held_out = 3 + X[:8] / 100, torch.full((8, 2), 1.0)
    phases = (
        config(40, learning_rate=0.1, validate_every=1),
        config(3, learning_rate=0.01, validate_every=1),
    )
    history = fit(flow, x, phases, validation=held_out)
    best = min(history.validation)
    assert history.phase[history.validation.index(best)] == 1
    assert best < min(history.validation[-3:]) - 0.01
    assert -flow.log_prob(held_out).mean().item() == pytest.approx(best, abs=1e-12)


def test_a_phase_out_of_patience_ends_and_the_next_starts_from_the_best_weights():
    calls, objective = spied()
    x, held_out = 3 + X[:8] / 100, torch.full((8, 2), 1.0)
    impatient = config(200, learning_rate=0.1, validate_every=2, patience=3)
    best_flow = affine_flow()
    alone = fit(best_flow, x, impatient, validation=held_out)

    history = fit(
        affine_flow(), x, (impatient, config(3, objective=objective)), validation=held_out
    )

    taken = [nll for nll in alone.validation if not math.isnan(nll)]
    assert min(taken) == taken[-4]  # three in a row were no better
    assert len(alone.step) == 2 * len(taken) < 200
    assert history.phase == [1] * len(alone.step) + [2] * 3
    assert_same(calls[0][1], weights(best_flow))


def test_patience_counts_anew_in_each_phase():
    x, held_out = 3 + X[:8] / 100, torch.full((8, 2), 1.0)
    impatient = config(200, learning_rate=0.3, validate_every=1, patience=2)
    worse = config(200, learning_rate=0.5, validate_every=1, patience=4)
    history = fit(affine_flow(), x, (impatient, worse), validation=held_out)
    assert history.phase.count(2) >= 4


def test_patience_that_is_not_needed_changes_nothing():
    flow, patient = affine_flow(), affine_flow()
    for each, patience in ((flow, None), (patient, 10)):
        fit(each, X, config(9, validate_every=1, patience=patience), validation=X)
    assert_same(weights(flow), weights(patient))


def test_a_failure_names_its_phase_and_leaves_its_last_good_weights():
    class Fails(Spy):
        def _loss(self, *given):
            loss = super()._loss(*given)
            return loss * (math.nan if len(self.calls) == 3 else 1)

    calls = []
    flow = affine_flow()
    phases = (
        config(2, ema=0.9),
        config(5, ema=0.9, objective=functools.partial(Fails, calls=calls)),
    )
    with pytest.raises(TrainingError, match=r"step 3 of 5 of phase 2: the loss is nan") as caught:
        fit(flow, X, phases, validation=None)
    assert caught.value.history.phase == [1, 1, 2, 2]
    assert_same(weights(flow), calls[1][1])


def test_training_goes_on_from_the_weights_that_the_flow_has():
    flow = affine_flow()
    fit(flow, X + 2, config(50, learning_rate=0.1), validation=None)
    before = weights(flow)
    calls, objective = spied()
    history = fit(flow, X + 2, config(2, objective=objective), validation=None)
    assert_same(calls[0][1], before)
    assert history.loss[0] < -affine_flow().log_prob(X + 2).mean()


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_parts_of_a_minibatch_add_up_to_the_same_step(parts):
    whole, cut = affine_flow(), affine_flow()
    settings = {"batch_size": 20, "learning_rate": 0.1, "ema": 0.5}
    history = fit(whole, X, config(6, **settings), validation=None)
    history_cut = fit(cut, X, config(6, **settings, accumulation_steps=parts), validation=None)
    assert history_cut.loss == pytest.approx(history.loss, rel=1e-12)
    torch.testing.assert_close(weights(cut), weights(whole), rtol=0, atol=1e-12)


def test_parts_are_equal_but_for_one_row_and_draw_differently():
    calls, objective = spied()
    fit(
        affine_flow(),
        X,
        config(2, batch_size=11, accumulation_steps=3, objective=objective),
        validation=None,
    )
    assert [len(x) for x, _, _ in calls] == [4, 4, 3, 4, 4, 3]
    assert len({draw for _, _, draw in calls}) == 6


@pytest.mark.slow
def test_nfe_counts_all_parts():
    objective = functools.partial(MaximumLikelihood, solver=CHEAP)
    whole, cut = (
        fit(
            small_cnf(),
            X,
            config(1, accumulation_steps=parts, objective=objective),
            validation=None,
        ).nfe
        for parts in (1, 3)
    )
    assert cut == [3 * whole[0]]


def test_more_parts_than_rows_are_refused():
    with pytest.raises(ValueError, match=r"minibatch of 4 rows cannot be cut into 5 parts"):
        fit(affine_flow(), X, config(batch_size=4, accumulation_steps=5), validation=None)


SMOOTH = functools.partial(CNF, layer="concatsquash", time_features=0, skip=False)
FLOAT32 = {
    "exact": lambda: SMOOTH(2),
    "estimate": lambda: SMOOTH(2, divergence=Hutchinson()),
    "augmented": lambda: Flow(
        [Augment(2, 1, hidden_features=(8,)), ContinuousTransform(SMOOTH(3).chain[-1].vector_field)]
    ),
    "dequantized": lambda: Flow([Flatten((2,)), Dequantize(2, 9), *SMOOTH(2).chain]),
}


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
@pytest.mark.parametrize("make", FLOAT32.values(), ids=FLOAT32)
def test_under_autocast_states_log_densities_and_gradients_keep_their_dtype(make, gradient):
    flow = make().float().using(solver=ODESolver(method="rk4", steps=3, gradient=gradient))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randint(0, 9, (16, 2)).float()
    seeded = torch.Generator().manual_seed
    exact = flow.log_prob(x, generator=seeded(0))

    with torch.autocast("cpu", torch.bfloat16):
        log_prob = flow.log_prob(x, generator=seeded(0))
        draws, log_q = flow.rsample_and_log_prob(3)
        loss = MaximumLikelihood(flow)(x)
    loss.backward()

    assert {tensor.dtype for tensor in (log_prob, draws, log_q, loss)} == {torch.float32}
    assert {parameter.grad.dtype for parameter in flow.parameters()} == {torch.float32}
    difference = (log_prob - exact).abs().max()
    assert 0 < difference < 0.05 * exact.abs().max()


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_rates_coarser_than_the_state_are_added_up_in_the_precision_of_the_state(method):
    rate, times = torch.ones(1, dtype=torch.bfloat16), torch.tensor([0.0, 1.0]).float()
    solver = ODESolver(method=method, steps=3)  # a third has no end in bfloat16
    (states,) = solver.solve(lambda t, state: (rate,), (torch.zeros(1).float(),), times)
    assert states[-1].item() == pytest.approx(1, abs=1e-6)


def test_under_autocast_a_draw_of_augment_has_the_density_that_it_was_drawn_from():
    augment = perturbed(Augment(2, 3, hidden_features=(8,)).float())
    x = torch.randn(50, 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        z, ladj = augment.to_base_and_ladj(x)
        _, ladj_back = augment.to_data_and_ladj(z)
    torch.testing.assert_close(ladj_back, -ladj, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_training_in_bfloat16_learns_and_evaluation_stays_exact():
    x = (0.3 * torch.randn(200, 2) + torch.tensor([2.0, -1.0])).float()
    flow = SMOOTH(2, hidden_features=(16, 16), solver=CHEAP).float()
    start, plain = copy.deepcopy(flow), copy.deepcopy(flow)
    settings = functools.partial(config, 12, learning_rate=0.05, batch_size=200)

    history = fit(flow, x, settings(precision="bfloat16", validate_every=12), validation=x)
    fit(plain, x, settings(), validation=None)

    nll = -flow.log_prob(x).double().mean().item()
    assert nll < -start.log_prob(x).mean() - 0.5
    assert history.validation[-1] == pytest.approx(nll, abs=1e-6)
    assert nll == pytest.approx(-plain.log_prob(x).mean().item(), abs=0.1)
    assert differ(weights(flow), weights(plain))
    assert {value.dtype for value in flow.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_bfloat16_is_for_flows_of_float32():
    with pytest.raises(ValueError, match=r"needs a flow in torch\.float32; got torch\.float64"):
        fit(affine_flow().double(), X, config(precision="bfloat16"), validation=None)


def test_a_callback_is_told_of_each_step_and_may_look_at_the_flow():
    def look(report):
        told.append(report)
        nlls.append(-report.flow.log_prob(X).mean().item())

    told, nlls = [], []
    settings = config(3, ema=0.5, validate_every=1)
    history = fit(affine_flow(), X, (settings, settings), validation=X, callbacks=[look])

    assert [report.phase for report in told] == [1, 1, 1, 2, 2, 2]
    assert [report.step for report in told] == [1, 2, 3, 4, 5, 6]
    for number, report in enumerate(told):
        expected = {name: column[number] for name, column in history.columns.items()}
        assert report.row == expected
    assert nlls == pytest.approx(history.validation)  # so the flow is the averaged one
    with pytest.raises(TypeError):
        told[0].row["loss"] = 0.0


def test_a_callback_that_returns_true_ends_the_training():
    calls = []
    flow, shorter = affine_flow(), affine_flow()
    history = fit(
        flow,
        X,
        (config(9, batch_size=5), config(9)),
        callbacks=[lambda report: report.step == 4, calls.append],
        validation=None,
    )
    fit(shorter, X, config(4, batch_size=5), validation=None)
    assert history.step == [1, 2, 3, 4]
    assert len(calls) == 4
    assert_same(weights(flow), weights(shorter))


def test_a_run_that_a_callback_ends_is_validated_where_it_ends():
    settings = functools.partial(config, learning_rate=0.1, validate_every=3)
    for last in (4, 6):
        flow, whole = affine_flow(), affine_flow()
        told = [lambda report, last=last: report.step == last]
        history = fit(flow, X + 3, settings(9), validation=X + 3, callbacks=told)
        shorter = fit(whole, X + 3, settings(last), validation=X + 3)
        assert str(history.validation) == str(shorter.validation)
        assert_same(weights(flow), weights(whole))


def test_an_error_in_a_callback_passes_through_and_leaves_the_best_weights():
    class OwnError(Exception):
        pass

    def fail(report):
        if report.step == 5:
            raise OwnError

    flow, whole = affine_flow(), affine_flow()
    settings = functools.partial(config, learning_rate=0.1, validate_every=2)
    with pytest.raises(OwnError):
        fit(flow, X + 1, settings(9), validation=X + 1, callbacks=[fail])
    fit(whole, X + 1, settings(4), validation=X + 1)
    assert_same(weights(flow), weights(whole))


class Entropic(Objective):
    """An objective without data: the mean log-density of draws, plus what pulls them to 1."""

    takes_data = False

    def __init__(self, flow, seen):
        super().__init__(flow)
        self.seen = seen

    def _loss(self, x, context, weight, draws, generator):
        self.seen.append(context)
        x, log_q = self.flow.rsample_and_log_prob(
            64 if context is None else (), context, generator=generator
        )
        return (log_q + 0.5 * (x - 1).square().sum(-1)).mean()


def test_an_objective_that_takes_no_data_is_trained_without():
    flow, seen = affine_flow(), []
    objective = Entropic(flow, seen)
    fit(objective, None, config(150, learning_rate=0.1, accumulation_steps=2), validation=None)
    assert seen == [None] * 300
    torch.testing.assert_close(flow.chain[0].loc, torch.ones(2), rtol=0, atol=0.2)


def test_an_objective_that_takes_no_data_is_given_contexts_alone():
    seen, context = [], torch.randn(10, 3)
    flow = CNF(2, 3, hidden_features=(4,), solver=CHEAP)
    objective = functools.partial(Entropic, seen=seen)
    fit(flow, context, config(5, batch_size=10, objective=objective), validation=None)
    fit(flow, {"context": context}, config(1, objective=objective), validation=None)
    for rows in seen:
        assert torch.equal(rows.sort(0).values, context.sort(0).values)


@pytest.mark.usefixtures("shapes_unchecked")
def test_data_that_an_objective_cannot_take_are_refused():
    flow = CNF(2, 3, hidden_features=(4,))
    objective = functools.partial(Entropic, seen=[])
    with pytest.raises(ValueError, match=r"data must be contexts of shape \(rows, 3\)"):
        fit(flow, None, config(objective=objective), validation=None)
    with pytest.raises(ValueError, match="context must have shape"):
        fit(flow, torch.zeros(5, 2), config(objective=objective), validation=None)
    with pytest.raises(ValueError, match="data must have the key context"):
        fit(flow, {"x": torch.zeros(5, 3)}, config(objective=objective), validation=None)
    with pytest.raises(ValueError, match="context must be None"):
        fit(affine_flow(), torch.zeros(5, 2), config(objective=objective), validation=None)
    with pytest.raises(TypeError, match=r"data must be a torch\.Tensor; got NoneType"):
        fit(affine_flow(), None, config(), validation=None)
    with pytest.raises(ValueError, match="phases must all take data, or none may"):
        fit(affine_flow(), X, (config(), config(objective=objective)), validation=None)


@pytest.mark.slow
def test_a_flow_alone_is_trained_by_the_recipe_on_standardised_data(monkeypatch):
    phases = recipe(matching_steps=3, likelihood_steps=2, progress=False)
    asked = []
    monkeypatch.setattr(
        "cnf.training.phases.recipe",
        lambda rows, patience: asked.append((rows, patience)) or phases,
    )
    module = sys.modules["cnf.training.fit"]
    monkeypatch.setattr(module, "become_mixture_if_better", lambda *_, **__: None)
    x = 100 + 10 * X
    flow = small_cnf()
    explicit = Flow([Standardize.from_data(x), copy.deepcopy(flow.chain[1])])

    history = fit(flow, x, validation=x[:5])
    history_explicit = fit(explicit, x, phases, validation=x[:5])

    assert history.loss == history_explicit.loss
    assert_same(weights(flow), weights(explicit))
    fit(flow, x)
    assert asked == [(40, 3), (36, 3)]


@pytest.mark.parametrize(
    ("given", "rows", "held_out"),
    [
        (lambda x: x, 40, 4),
        (TensorDataset, 40, 4),
        (lambda x: x.repeat(300, 1), 12_000, 1000),
        (lambda x: x[:9], 9, 0),
        (lambda x: {"x": x, "weight": torch.eye(40, dtype=x.dtype)[0]}, 1, 0),
    ],
    ids=["tensor", "dataset", "many", "few", "one that weighs"],
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_a_share_of_the_rows_is_held_out(given, rows, held_out):
    x = as_rows("data", given(X), small_cnf())
    training, validation = hold_out(x, 0.1)
    assert len(x) == rows
    assert len(training) == rows - held_out
    assert (0 if validation is None else len(validation)) == held_out
    if validation is not None:
        parts = [part.some(rows).x for part in (training, validation)]
        torch.testing.assert_close(
            torch.cat(parts).sort(0).values, x.some(rows).x.sort(0).values, rtol=0, atol=0
        )


@pytest.mark.slow
def test_few_rows_are_not_learnt_by_heart():
    generator = torch.Generator().manual_seed(0)
    x, fresh = (3 * torch.randn(rows, 2, generator=generator) for rows in (60, 1000))
    torch.manual_seed(0)
    flow = CNF(2)
    history = fit(flow, x)
    assert len(history.step) <= 59
    with torch.no_grad():
        truth = Normal(torch.zeros(2), 3 * torch.ones(2)).log_prob(fresh).sum(-1)
        assert (truth - flow.log_prob(fresh)).mean() < 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"validation": torch.zeros(3, 5, dtype=torch.float64)},
        {"callbacks": print},
        {"checkpoints": True},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_a_flow_that_fit_refuses_to_train_is_left_as_it_was(wrong, tmp_path):
    if "checkpoints" in wrong:
        (tmp_path / "history.csv").write_text("precious")
        wrong = {"checkpoints": Checkpoints(folder=tmp_path)}
    flow = small_cnf()
    before = weights(flow)
    with pytest.raises((ValueError, TypeError, FileExistsError)):
        fit(flow, X, **wrong)
    assert_same(weights(flow), before)


@pytest.mark.parametrize(
    "make", [lambda: small_cnf(blocks=2), affine_flow, small_cnf], ids=["blocks", "no ODE", "one"]
)
def test_a_flow_that_matching_cannot_train_is_trained_by_likelihood_alone(make):
    flow = make()
    plan = make_plan(flow, usual_phases(flow, 40, validated=False))
    expected = [FlowMatching, MaximumLikelihood] if make is small_cnf else [MaximumLikelihood]
    assert [type(objective) for objective, _ in plan] == expected


@pytest.mark.usefixtures("shapes_unchecked")
def test_settings_that_do_not_fit_are_refused():
    x = X.to(torch.get_default_dtype())
    with pytest.raises(ValueError, match="patience=2 needs validation data; got None"):
        fit(affine_flow(), x, config(patience=2), validation=None)
    with pytest.raises(TypeError, match=r"config must be a TrainingConfig or several; got tuple"):
        fit(affine_flow(), x, (), validation=None)
    with pytest.raises(TypeError, match=r"config must be a TrainingConfig or several; got int"):
        fit(affine_flow(), x, (config(), 3), validation=None)
    with pytest.raises(TypeError, match=r"TrainingConfig for an objective; got tuple"):
        fit(MaximumLikelihood(affine_flow()), x, (config(), config()), validation=None)
    with pytest.raises(TypeError, match=r"whose flow is the one given; got Linear"):
        fit(affine_flow(), x, config(objective=lambda flow: nn.Linear(1, 1)), validation=None)
    with pytest.raises(TypeError, match="put the single callback in brackets"):
        fit(affine_flow(), x, config(), callbacks=print, validation=None)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"patience": 0}, ValueError, "patience must be at least 1; got 0"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be at least 1; got 0"),
        ({"accumulation_steps": 1.5}, TypeError, "accumulation_steps must be an int; got 1.5"),
        ({"precision": "float16"}, ValueError, "precision must be one of .*got 'float16'"),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"objective": "likelihood"}, TypeError, "objective must be callable.*got 'likelihood'"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        TrainingConfig(**settings)


def test_the_recipe_matches_by_soap_and_raises_the_likelihood_by_adam():
    matching, likelihood = recipe(learning_rate=0.02)
    assert (matching.optimizer, matching.learning_rate) == (SOAP, 0.02)
    assert (likelihood.optimizer, likelihood.learning_rate) == (None, pytest.approx(0.001))


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [3, 13, 26])
def test_a_run_of_the_recipe_resumes_bit_for_bit(tmp_path, stopped):
    """Stopped before SOAP's first basis, after it, and in the likelihood phase."""
    phases = recipe(matching_steps=25, likelihood_steps=2, progress=False)

    def run(name, **settings):
        torch.manual_seed(0)
        flow = CNF(2, hidden_features=(8, 8))
        kept = Checkpoints(folder=tmp_path / name, every=1)
        fit(flow, X, phases, accuracy=None, checkpoints=kept, **settings)
        return weights(flow)

    def fail(report):
        if report.step == stopped:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run("stopped", callbacks=[fail])
    assert_same(run("stopped", resume=True), run("whole"))
