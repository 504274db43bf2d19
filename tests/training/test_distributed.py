"""Laws of training by several processes, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from together import train

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def torchrun(what, folder):
    """Start two processes of `together.py`; what each told, if it could."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", TESTS / "together.py", what, folder),
        ],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    told = [torch.load(file) for file in sorted(folder.glob(f"{what}[01]"))]
    return done, told


def assert_repeats(told, other):
    assert {name: str(column) for name, column in told["history"].items()} == {
        name: str(column) for name, column in other["history"].items()
    }
    for name, value in other["flow"].items():
        assert torch.equal(told["flow"][name], value)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes tell that trained together: what each told, and the folder.

    Two before them were killed in the midst of the run that they resume.
    """
    folder = tmp_path_factory.mktemp("together")
    done, told = torchrun("killed", folder)
    assert done.returncode != 0
    assert told == []
    assert (folder / "run" / "checkpoint_000000016.pt").exists()
    done, told = torchrun("resumed", folder)
    assert done.returncode == 0, done.stderr
    return *told, folder


def test_two_processes_learn_what_one_does_that_takes_both_parts_in_turn(together):
    first, _, _ = together
    flow, history = train(None, parts=2)

    for name in ("loss", "validation", "learning_rate", "nfe"):
        column = torch.tensor(first["history"][name], dtype=torch.float64)
        expected = torch.tensor(history.columns[name], dtype=torch.float64)
        torch.testing.assert_close(column, expected, rtol=1e-10, atol=0, equal_nan=True)
    for name, value in flow.state_dict().items():
        torch.testing.assert_close(first["flow"][name], value, rtol=0, atol=1e-10)


def test_all_processes_end_with_the_same_weights_and_record(together):
    assert_repeats(*together[:2])


def test_the_first_process_alone_writes(together):
    first, second, folder = together
    assert first["writes"] > 0
    assert second["writes"] == 0
    for run in ("run", "whole"):
        assert len(list((folder / run).glob("checkpoint_*.pt"))) == 2


def test_what_fails_in_one_process_fails_in_all(together):
    first, second, _ = together
    message, losses, weights = first["failure"]
    other, other_losses, other_weights = second["failure"]
    assert "training stopped at step 3 of 5: another process failed" in message
    assert "training stopped at step 3 of 5: the solve with dopri5 spent its budget" in other
    assert losses == other_losses
    assert len(losses) == 2
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_what_the_first_process_refuses_or_stops_all_do(together):
    for told in together[:2]:
        assert "holds a run already" in told["refusal"]
        assert told["steps until stopped"] == 3


def test_all_processes_stop_at_the_same_step_of_a_time_budget(together):
    first, second, _ = together
    assert first["steps of a budget"] == second["steps of a budget"] < 5


def test_a_run_of_two_processes_that_was_killed_resumes_to_the_same_end(together):
    for each in together[:2]:
        assert_repeats(each["resumed"], each)
