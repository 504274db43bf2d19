"""Laws of checkpoints: a run that was cut off resumes to the same end, bit for bit."""

import functools
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jaxtyping
import killable
import pytest
import torch
from torch import nn
from training_runs import affine_flow, assert_same, config, weights, without_seconds

from cnf import Checkpoints, Flow, FlowMatching, History, MLPField, fit, load, save
from cnf.objectives import OptimalTransport, VariancePreservingPath
from cnf.regularizers import kinetic_energy
from cnf.training import TrainingError
from cnf.training.checkpoint import checkpoints_in, write_checkpoint
from cnf.training.fingerprint import differences
from cnf.transforms import Affine, ContinuousTransform

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

TESTS = Path(__file__).parents[1]


def assert_equal(first, second):
    """Of what a checkpoint may hold, but the seconds of the record."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds"}:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    else:
        assert first == second


def assert_same_run(folder, other):
    """All checkpoints left hold the same: weights, best, averages, moments and record."""
    names = [file.name for file in checkpoints_in(folder)]
    assert names == [file.name for file in checkpoints_in(other)]
    for name in names:
        assert_equal(*(torch.load(where / name) for where in (folder, other)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of `killable` without interruption: its folder, weights and record."""
    folder = tmp_path_factory.mktemp("whole")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    jaxtyping.config.update("jaxtyping_disable", True)  # for speed
    flow, history = killable.train(folder)
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.set_default_dtype(dtype)
    return folder, weights(flow), history


def test_the_run_has_all_that_a_checkpoint_must_keep(whole):
    folder, _, history = whole
    assert [history.phase.count(number) for number in (1, 2, 3)] == [25, 6, 14]  # out of patience
    nlls = [nll for nll in history.validation if not math.isnan(nll)]
    assert min(nlls) not in (nlls[0], nlls[-1])
    newest, *_, oldest = (torch.load(file) for file in checkpoints_in(folder))
    assert newest["phase"] is None
    assert oldest["phase"]["averaged"] is not None


KILLS = {
    "between steps": ["step:3", "step:7", "step:30", "step:43"],
    "in a step": ["forward:5", "forward:31", "forward:60", "forward:9"],
    "while writing": [f"write:{n}" for n in (1, 2, 3, 4, 8, 6)],
    "at any moment": ["after:0.05", "after:0.15", "write:3", "after:0.1", "forward:23"],
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folders of runs that were killed, and how the processes ended, by the name of KILLS."""
    folders = {name: tmp_path_factory.mktemp("killed") for name in KILLS}
    runs = [f"{folders[name]}={','.join(kills)}" for name, kills in KILLS.items()]
    done = subprocess.run(
        [sys.executable, TESTS / "killable.py", *runs],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},  # with its kernels of torch
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return {
        name: (folder, [end for of, end in ends if of == str(folder)])
        for name, folder in folders.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(name, killed, whole):
    resumed, (*ends, last) = killed[name]
    sure = [kill for kill in KILLS[name] if not kill.startswith("after")]
    assert {f"{kill}: killed" for kill in sure} <= set(ends)
    assert last == "None: exit 0"
    folder, final, history = whole
    told = torch.load(resumed / "result")
    assert_same(told["flow"], final)
    assert {name: str(column) for name, column in told["history"].items()} == without_seconds(
        history
    )
    assert_same_run(resumed, folder)
    assert not list(resumed.glob(".*"))


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_unchecked")  # for speed
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_interrupted_anywhere_resumes_to_the_same_end(error, whole, tmp_path):
    def interrupt(report):
        if report.step in steps:
            steps.remove(report.step)
            raise error

    steps = {2, 7, 8, 25, 26, 42, 43}
    for _ in range(7):
        with pytest.raises(error):
            killable.train(tmp_path, callbacks=[interrupt])
    flow, history = killable.train(tmp_path, callbacks=[interrupt])

    folder, final, record = whole
    assert not steps
    assert_same(weights(flow), final)
    assert without_seconds(history) == without_seconds(record)
    assert history.seconds == sorted(history.seconds)
    assert_same_run(tmp_path, folder)


def test_a_finished_run_is_given_back_at_once(whole, monkeypatch):
    folder, final, history = whole
    before = [file.read_bytes() for file in checkpoints_in(folder)]
    monkeypatch.setattr(killable.MaximumLikelihood, "forward", None)  # that none may call

    flow, again = killable.train(folder)

    assert_same(weights(flow), final)
    assert str(again.columns) == str(history.columns)
    assert [file.read_bytes() for file in checkpoints_in(folder)] == before


X = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None] ** torch.tensor([1, 2])


def short(folder, *, flow=None, resume=False, every=2, keep=2, data=X, validation=X, **settings):
    """Six steps of the cheapest flow."""
    torch.manual_seed(0)
    flow = affine_flow() if flow is None else flow
    settings = config(**{"steps": 6, "batch_size": 5, "validate_every": 3, **settings})
    checkpoints = Checkpoints(folder=folder, every=every, keep=keep)
    history = fit(
        flow, data, settings, validation=validation, checkpoints=checkpoints, resume=resume
    )
    return flow, history


def test_the_folder_holds_the_newest_checkpoints_the_record_and_the_flow(tmp_path):
    flow, history = short(tmp_path / "deep" / "run", every=1, keep=3)

    names = sorted(file.name for file in (tmp_path / "deep" / "run").iterdir())
    checkpoints = [f"checkpoint_00000000{step}.pt" for step in (4, 5, 6)]
    assert names[:5] == ["best.safetensors", *checkpoints, names[4]]
    assert names[4].startswith("events.out.tfevents")
    assert names[5:] == ["history.csv"]
    assert str(History.load(tmp_path / "deep" / "run" / "history.csv")) == str(history)
    assert_same(weights(load(tmp_path / "deep" / "run" / "best.safetensors")), weights(flow))


def test_the_flow_in_the_folder_is_the_best_so_far(tmp_path):
    held_out = X[:5] + 0.3

    def check(report):
        told.append(report.row["validation"])
        if report.step % 2 == 1 and report.step > 1:  # the file is that of the step before
            nll = -load(tmp_path / "best.safetensors").log_prob(held_out).mean().item()
            seen.append((nll, told[-2]))

    seen, told = [], []
    fit(
        affine_flow(),
        X,
        config(40, learning_rate=0.3, batch_size=4, validate_every=2),
        validation=held_out,
        checkpoints=Checkpoints(folder=tmp_path, every=2),
        callbacks=[check],
    )
    bests = itertools.accumulate((nll for _, nll in seen), min)
    assert [nll for nll, _ in seen] == pytest.approx(list(bests))
    assert seen[-1][0] < seen[-1][1]


class Foreign(nn.Module):
    """A part that no file of a flow can describe."""


def test_a_flow_that_cannot_be_saved_is_kept_in_the_checkpoint_alone(tmp_path):
    def foreign():
        part = Affine(2)
        part.extra = Foreign()
        return Flow([part, part])

    with pytest.warns(UserWarning, match="was not written") as caught:
        final = weights(short(tmp_path, flow=foreign(), every=1)[0])
    (warning,) = caught
    assert re.search(
        r"best\.safetensors' was not written, because flow must not share tensors.*resume\.",
        str(warning.message),
    )
    assert not (tmp_path / "best.safetensors").exists()
    again, _ = short(tmp_path, flow=foreign(), resume=True)
    assert_same(weights(again), final)


def test_without_checkpoints_resume_starts_from_the_beginning(tmp_path):
    plain, history = short(tmp_path / "plain")
    resumed, other = short(tmp_path / "resumed", resume=True)
    assert_same(weights(resumed), weights(plain))
    assert without_seconds(other) == without_seconds(history)


@pytest.mark.parametrize("name", ["checkpoint_000000006.pt", "history.csv", "best.safetensors"])
def test_nothing_is_overwritten_unasked(name, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=rf"holds a run already \({name}\).*resume=True"):
        short(tmp_path)
    assert (tmp_path / name).read_text() == "precious"


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def flipped(file):
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    for place in range(middle, middle + 200):  # more than the padding, which no checksum guards
        content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, emptied, flipped])
def test_a_damaged_checkpoint_falls_back_on_the_one_before(damage, tmp_path):
    flow, history = short(tmp_path)
    newest, _ = checkpoints_in(tmp_path)
    damage(newest)

    with pytest.warns(UserWarning, match=rf"{newest.name}' is damaged"):
        again, record = short(tmp_path, resume=True)

    assert_same(weights(again), weights(flow))
    assert without_seconds(record) == without_seconds(history)


def test_checkpoints_that_are_all_damaged_are_refused(tmp_path):
    short(tmp_path)
    for file in checkpoints_in(tmp_path):
        truncated(file)
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="is damaged"),
            pytest.raises(
                ValueError,
                match=r"every checkpoint in .* is damaged: checkpoint_000000006.pt, .*Restore",
            ),
        ):
            short(tmp_path, resume=True)


def test_a_file_without_a_state_counts_as_damaged(tmp_path):
    flow, _ = short(tmp_path)
    newest, _ = checkpoints_in(tmp_path)
    for content in ({"a": 1}, [1]):
        torch.save(content, newest)
        with pytest.warns(UserWarning, match="is damaged .it holds no training state"):
            again, _ = short(tmp_path, resume=True)
        assert_same(weights(again), weights(flow))


def test_new_checkpoints_outlive_a_damaged_one_of_a_later_step(tmp_path):
    def interrupt(report):
        if report.step == 5:
            raise KeyboardInterrupt

    short(tmp_path, every=3)
    newest, oldest = checkpoints_in(tmp_path)
    truncated(newest)
    settings, checkpoints = (
        config(6, batch_size=5, validate_every=3),
        Checkpoints(folder=tmp_path, every=1, keep=1),
    )
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(KeyboardInterrupt):
        fit(
            affine_flow(),
            X,
            settings,
            validation=X,
            checkpoints=checkpoints,
            resume=True,
            callbacks=[interrupt],
        )
    assert [file.name for file in checkpoints_in(tmp_path)] == ["checkpoint_000000004.pt"]
    assert newest.with_name(f"{newest.name}.damaged").exists()
    assert not oldest.exists()


class Code:
    """Does something when it is unpickled."""

    def __reduce__(self):
        return warnings.warn, ("code was run",)


def test_a_checkpoint_is_data_and_never_code(tmp_path):
    short(tmp_path)
    newest, _ = checkpoints_in(tmp_path)
    for disguise in (
        lambda: torch.save({"format": 1, "history": Code()}, newest),
        lambda: newest.write_bytes(pickle.dumps(Code())),
    ):
        disguise()
        with pytest.warns(UserWarning, match="is damaged") as caught:
            short(tmp_path, resume=True)
        assert not any(str(warning.message) == "code was run" for warning in caught)


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    short(tmp_path)
    newest, _ = checkpoints_in(tmp_path)
    torch.save({**torch.load(newest), "format": 2}, newest)
    with pytest.raises(ValueError, match=r"has format 2, newer than the 1 .*Upgrade cnf-flows"):
        short(tmp_path, resume=True)


OTHER_RUNS = {
    "steps": ({"steps": 7}, "steps of phase 1: 6 there, 7 here"),
    "average": ({"ema": 0.5}, "ema of phase 1: None there, 0.5 here"),
    "parts": ({"accumulation_steps": 2}, r"parts of a minibatch .* in phase 1: 1 there, 2 here"),
    "fewer rows": ({"data": X[:19]}, "data: 20 rows .* there, 19 rows .* here"),
    "other rows": ({"data": X + 1e-9}, "data: 20 rows with the hash .* there, 20 rows with"),
    "no validation": ({"validation": None}, "validation: 20 rows .* there, none here"),
    "other flow": (
        {"flow": Flow([Affine(2), Affine(2)]).double()},
        r"tensor 'transforms.1.loc' of the flow: none there, torch.float64 \(2,\) here",
    ),
    "the same in other words": ({"data": {"x": X}}, None),
    "other looks": ({"progress": True, "every": 3, "keep": 1}, None),
}


@pytest.mark.parametrize(("change", "message"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_a_run_with_other_settings_data_or_flow_is_told_apart(change, message, tmp_path):
    short(tmp_path)
    if message is None:
        assert len(short(tmp_path, resume=True, **change)[1].step) == 6
    else:
        with pytest.raises(ValueError, match=f"are of another run.*{message}.*another folder"):
            short(tmp_path, resume=True, **change)


def likelihood(**settings):
    return lambda: killable.MaximumLikelihood(Flow([Affine(2)]).double(), **settings)


def matching(path=None, *, end_time=1.0, activation="tanh", **settings):
    def make():
        field = MLPField(2, hidden_features=(4,), activation=activation)
        return FlowMatching(
            Flow([ContinuousTransform(field, end_time=end_time)]).double(), path, **settings
        )

    return make


OTHER_OBJECTIVES = {
    "regularizer": (
        likelihood(regularizers={kinetic_energy: 0.01}),
        likelihood(regularizers={kinetic_energy: 10.0}),
        "regularizers of objective of phase 1: .*: 0.01} there, .*: 10.0} here",
    ),
    "solver": (
        likelihood(),
        likelihood(solver=killable.CHEAP),
        r"solver of objective of phase 1: .*'dopri5'.* there, .*'rk4'",
    ),
    "random end time": (
        likelihood(),
        likelihood(random_end_time=0.5),
        "random_end_time of objective of phase 1: 0.0 there, 0.5 here",
    ),
    "path": (
        matching(),
        matching(VariancePreservingPath()),
        r"path of objective of phase 1: LinearPath.* there, VariancePreservingPath\(\) here",
    ),
    "pairing": (matching(), matching(pairing=OptimalTransport()), "pairing of objective"),
    "times": (matching(), matching(times="late"), "times of .*: 'uniform' there, 'late' here"),
    "end time": (
        matching(),
        matching(end_time=2.0),
        "end_time of transforms.0 of the flow: 1.0 there, 2.0 here",
    ),
    "activation": (
        matching(),
        matching(activation="silu"),
        "activation of transforms.0.vector_field of the flow: .*tanh.* there, .*silu.* here",
    ),
}


@pytest.mark.parametrize(
    ("make", "other", "message"), OTHER_OBJECTIVES.values(), ids=OTHER_OBJECTIVES
)
def test_a_run_with_another_objective_or_field_is_told_apart(make, other, message, tmp_path):
    def run(objective):
        checkpoints = Checkpoints(folder=tmp_path)
        return fit(objective, X, config(1), checkpoints=checkpoints, resume=True, validation=None)

    first = run(make())
    assert str(run(make()).columns) == str(first.columns)
    with pytest.raises(ValueError, match=f"are of another run.*{message}"):
        run(other())


def test_a_run_of_before_settings_got_other_names_is_the_same():
    """The texts are those that commit c3fd381 wrote."""
    solver = "ODESolver(method='rk4', rtol=1e-05, atol=1e-05, {}='points', first_step=None)"
    there = {
        "solver of objective of phase 1": solver.format("control"),
        "parts of a minibatch (accumulate times processes) in phase 1": "2",
        "kept of transforms.0 of the flow": "'last'",
    }
    here = {
        "solver of objective of phase 1": solver.format("error_norm"),
        "parts of a minibatch (accumulation_steps times processes) in phase 1": "2",
        "mask of transforms.0 of the flow": "'last'",
    }
    assert differences(there, here) == ""
    other = {**here, "mask of transforms.0 of the flow": "'first'"}
    assert (
        differences(there, other) == "mask of transforms.0 of the flow: 'last' there, 'first' here"
    )


def test_the_flow_in_the_folder_is_never_older_than_the_newest_checkpoint(tmp_path, monkeypatch):
    def die_in_the_last(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(*args)

    calls = []
    with monkeypatch.context() as patched:
        patched.setattr("cnf.training.checkpoint.save", die_in_the_last)
        with pytest.raises(KeyboardInterrupt):
            short(tmp_path, every=4)
    for _ in range(2):
        flow, _ = short(tmp_path, every=4, resume=True)
        assert_same(weights(load(tmp_path / "best.safetensors")), weights(flow))


def test_a_callback_is_asked_again_about_a_step_that_it_did_not_finish(tmp_path):
    def stop(report):
        asked.append(report.step)
        if asked == [1, 2, 3, 4]:
            raise KeyboardInterrupt
        return report.step == 4

    asked = []
    run = functools.partial(
        fit,
        data=X,
        config=config(6),
        checkpoints=Checkpoints(folder=tmp_path, every=2),
        resume=True,
        callbacks=[stop],
    )
    with pytest.raises(KeyboardInterrupt):
        run(affine_flow())
    assert run(affine_flow()).step == [1, 2, 3, 4]
    assert asked == [1, 2, 3, 4, 3, 4]


def test_a_run_cut_off_after_it_was_told_to_stop_does_not_go_on(tmp_path, monkeypatch):
    def write_and_die(*args, **kwargs):
        write_checkpoint(*args, **kwargs)
        raise KeyboardInterrupt

    run = functools.partial(
        fit,
        data=X,
        config=(config(6), config(6)),
        checkpoints=Checkpoints(folder=tmp_path, every=4),
        resume=True,
        callbacks=[lambda report: report.step == 4],
    )
    with monkeypatch.context() as patched:
        patched.setattr("cnf.training.checkpoint.write_checkpoint", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(affine_flow())
    monkeypatch.setattr(killable.MaximumLikelihood, "forward", None)  # that none may call
    assert run(affine_flow()).step == [1, 2, 3, 4]


def test_settings_without_a_stable_name_do_not_keep_a_run_from_resuming(tmp_path):
    def run():
        def objective(flow):  # another object each time
            return killable.MaximumLikelihood(flow)

        settings, checkpoints = config(3, objective=objective), Checkpoints(folder=tmp_path)
        return fit(
            affine_flow(), X, settings, checkpoints=checkpoints, resume=True, validation=None
        )

    first, again = run(), run()
    assert str(again.columns) == str(first.columns)


def test_a_failure_leaves_the_record_in_the_folder_and_happens_again(tmp_path):
    settings = {"flow": affine_flow(), "learning_rate": 1e200, "steps": 20, "every": 1}
    with pytest.raises(TrainingError) as caught:
        short(tmp_path, **settings)
    record = History.load(tmp_path / "history.csv")
    assert str(record.columns) == str(caught.value.history.columns)

    with pytest.raises(TrainingError) as again:
        short(tmp_path, **{**settings, "flow": affine_flow()}, resume=True)

    assert str(again.value) == str(caught.value)


def test_parameters_of_the_objective_itself_are_kept(tmp_path):
    class Scaled(killable.MaximumLikelihood):
        def __init__(self, flow):
            super().__init__(flow)
            self.own = nn.Parameter(torch.zeros(()))

        def _loss(self, *given):
            return super()._loss(*given) + (self.own - 3).square()

    def run(folder, steps=9, callbacks=()):
        objective = Scaled(affine_flow())
        checkpoints = Checkpoints(folder=folder, every=4)
        settings = config(steps, learning_rate=0.1)
        fit(
            objective,
            X,
            settings,
            checkpoints=checkpoints,
            resume=True,
            callbacks=callbacks,
            validation=None,
        )
        return weights(objective)

    def interrupt(report):
        if report.step == 6:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", callbacks=[interrupt])
    assert_same(run(tmp_path / "cut"), whole)
    assert_same(run(tmp_path / "cut"), whole)  # finished by now


def test_tensorboard_shows_each_step_once_after_a_resumption(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    # Files of one second are read in the order of their numbers as text: not with 9 and then 10.
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))

    def interrupt(report):
        if report.step == 5:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(folder=tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        fit(
            affine_flow(),
            X,
            config(6),
            checkpoints=checkpoints,
            callbacks=[interrupt],
            validation=None,
        )
    history = fit(
        affine_flow(), X, config(6), checkpoints=checkpoints, resume=True, validation=None
    )

    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert [event.step for event in events.Scalars("loss")] == history.step
    assert list(shown.values()) == pytest.approx(history.loss)
    assert "validation" not in events.Tags()["scalars"]


@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="every must be at least 1; got 0"):
        Checkpoints(folder=tmp_path, every=0)
    with pytest.raises(ValueError, match="keep must be at least 1; got 0"):
        Checkpoints(folder=tmp_path, keep=0)
    with pytest.raises(TypeError, match=r"checkpoints must be a Checkpoints; got str.*\(folder="):
        fit(affine_flow(), X, config(), checkpoints=str(tmp_path), validation=None)
    with pytest.raises(ValueError, match=r"resume=True needs checkpoints=Checkpoints\("):
        fit(affine_flow(), X, config(), resume=True, validation=None)
