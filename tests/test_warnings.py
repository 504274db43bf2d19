"""Laws of warnings: each points at the line of the user, whatever public door it comes from."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from old_files import without_digest
from training_runs import CHEAP, affine_flow, config
from zoo import UserNetwork, cnf, lipschitz_mlp

import cnf as package
from cnf import CNF, Checkpoints, Flow, MaximumLikelihood, ModuleField, ODESolver, fit, load, save
from cnf.data.table_files import read_table
from cnf.tables.estimator import CNFDensity
from cnf.transforms import ContinuousTransform, ResidualFlow, RussianRoulette

EULER = ODESolver(method="euler", steps=1)


def shared_values(rows=60):
    x = torch.randn(rows, 2)
    x[::3, 0] = 0.5
    return x


def old_flow(folder):
    save(affine_flow(), folder / "flow.safetensors")
    without_digest(folder / "flow.safetensors")
    return load(folder / "flow.safetensors")


def first_row_of_numbers(folder):
    (folder / "data.csv").write_text("1.5,-2\n3,4\n5,1\n")
    return read_table(folder / "data.csv")


def estimator(x):
    model = CNFDensity(
        matching_steps=1, likelihood_steps=1, hidden_features=(4,), validation_fraction=0.0
    )
    return model.fit(x)


def fill_values():
    x = np.random.RandomState(0).normal(size=(60, 2))
    x[3, 1] = 1e20
    return x


def damaged_run(folder):
    checkpoints = Checkpoints(folder=folder / "run", every=1, keep=3)
    settings = config(3, objective=MaximumLikelihood)
    x = torch.randn(20, 2)
    fit(affine_flow(), x, settings, checkpoints=checkpoints)
    newest = max((folder / "run").glob("*.pt"))
    newest.write_bytes(b"")
    return fit(affine_flow(), x, settings, checkpoints=checkpoints, resume=True)


def constant_context():
    x = torch.randn(40, 2)
    flow = CNF(2, 1, hidden_features=(4,), solver=CHEAP)
    return fit(flow, (x, torch.ones(40, 1)), config(1, objective=MaximumLikelihood))


def many_features(method):
    flow = Flow([ContinuousTransform(ModuleField(UserNetwork(65), 65), solver=EULER)])
    return getattr(flow, method)(torch.randn(1, 65))


def far_from_standard():
    flow = Flow([ContinuousTransform(ModuleField(UserNetwork(2), 2), solver=CHEAP)])
    return fit(flow, 1e3 * torch.randn(40, 2), config(1, objective=MaximumLikelihood))


def no_compiler():
    def fails(*_):
        raise RuntimeError("no compiler")

    flow = cnf(solver=ODESolver(method="rk4", steps=1, gradient="backprop"))
    flow.compile(backend=fails)
    return flow.log_prob(torch.randn(2, 2))


DOORS = {
    "fit, shared values": lambda folder: fit(
        cnf(solver=CHEAP), shared_values(), config(1, objective=MaximumLikelihood)
    ),
    "fit, a constant context": lambda folder: constant_context(),
    "fit, far from standard": lambda folder: far_from_standard(),
    "fit, a damaged checkpoint": damaged_run,
    "CNFDensity.fit, shared values": lambda folder: estimator(shared_values().numpy()),
    "CNFDensity.fit, fill values": lambda folder: estimator(fill_values()),
    "load": old_flow,
    "read_table": first_row_of_numbers,
    "log_prob": lambda folder: many_features("log_prob"),
    "to_base_and_ladj": lambda folder: many_features("to_base_and_ladj"),
    "ResidualFlow": lambda folder: ResidualFlow(
        lipschitz_mlp(coefficient=0.97), log_det=RussianRoulette(probability=0.9)
    ),
    "compile": lambda folder: no_compiler(),
}


@pytest.mark.slow
@pytest.mark.parametrize("call", DOORS.values(), ids=DOORS)
def test_a_warning_points_at_the_line_of_the_user(call, tmp_path):
    with pytest.warns(UserWarning) as caught:  # noqa: PT030 - whatever it says
        call(tmp_path)
    ours = [warning for warning in caught if "Dynamo" not in str(warning.message)]
    assert {warning.filename for warning in ours} == {__file__}


def test_all_warnings_are_given_by_one_function():
    folder = Path(package.__file__).parent
    for path in folder.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if _warns(node)]
        assert not calls or path == folder / "_warnings.py", path


def _warns(node):
    return isinstance(node, ast.Attribute) and node.attr in ("warn", "warn_explicit")
