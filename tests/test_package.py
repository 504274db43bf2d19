"""Laws of the package as a whole: what importing it does, and does not do."""

import json
import subprocess
import sys

import pytest

import cnf

pytestmark = pytest.mark.slow


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100
    )


def test_every_public_name_exists_once_in_order():
    assert all(hasattr(cnf, name) for name in cnf.__all__)
    assert len(set(cnf.__all__)) == len(cnf.__all__)


def test_every_public_object_is_documented():
    undocumented = [name for name in cnf.__all__ if not getattr(cnf, name).__doc__]
    assert undocumented == []


LATE = [
    "scipy",
    "lightning_fabric",
    "matplotlib",
    "tyro",
    "zuko",
    "nflows",
    "normflows",
    "pyro",
    "sklearn",
    "torchdiffeq",
    "tensorboard",
    "pyarrow",
    "h5py",
]


DOORS = (
    "cnf.cli",
    "cnf.tables.estimator",
    "cnf.adapters.zuko_flow",
    "cnf.adapters.pyro_distribution",
)
"""What builds on such a library from its first line, and no other module imports."""


STATE = """
import json, logging, os, random, sys, warnings, numpy, torch

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomalies": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "random of torch": torch.get_rng_state().tolist(),
        "random of numpy": str(numpy.random.get_state()),
        "random of Python": str(random.getstate()),
        "validation": torch.distributions.Distribution._validate_args,
        "warnings": [str(entry) for entry in warnings.filters],
        "print options": str(vars(torch._tensor_str.PRINT_OPTS)),
        "environment": dict(os.environ),
        "excepthook": str(sys.excepthook),
        "log level": logging.getLogger().level,
        "log handlers": len(logging.getLogger().handlers),
    }
"""


IMPORTS = """
import importlib, pkgutil, types

def late():
    return [name for name in LATE if name in sys.modules]

def changed():
    after = state()
    return [name for name in before if before[name] != after[name]]

found, before = {}, state()
import cnf
found["changed by cnf"], found["late by cnf"] = changed(), late()
names = {}
exec("from cnf import *", names)
found["star"] = [name for name in names if name != "__builtins__"]
import cnf.training, cnf.objectives, cnf.saving, cnf.plots
found["changed by training"] = changed()
modules = [module.name for module in pkgutil.walk_packages(cnf.__path__, "cnf.")]
modules.remove("cnf.cli.__main__")
for name in modules:
    if not name.startswith(DOORS):
        importlib.import_module(name)
found["late by others"] = late()
found["hidden"] = [
    [name, public]
    for name in ["cnf", *modules]
    for public in getattr(importlib.import_module(name), "__all__", ())
    if isinstance(getattr(importlib.import_module(name), public), types.ModuleType)
]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported():
    """What one process finds that imports `cnf`, then its public names, then every module."""
    done = run_python(f"{STATE}\nLATE, DOORS = {LATE}, {DOORS}\n{IMPORTS}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_star_import_brings_the_public_names_and_no_others(imported):
    assert set(imported["star"]) == set(cnf.__all__)


def test_importing_cnf_imports_no_library_that_few_need(imported):
    assert imported["late by cnf"] == []


def test_importing_every_other_module_of_cnf_imports_no_library_that_few_need(imported):
    assert imported["late by others"] == []


def test_importing_cnf_changes_no_global_state(imported):
    assert imported["changed by cnf"] == imported["changed by training"] == []


def test_using_cnf_changes_no_global_state_but_for_its_draws():
    # Those that are imported before bring filters of warnings of their own.
    done = run_python(f"""{STATE}
import torchdiffeq, sympy
before = state()
import cnf
cnf.CNF(2).log_prob(torch.ones(2)).backward()
after = state()
print(json.dumps([name for name in before if before[name] != after[name]]))
""")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["random of torch"]  # the initial weights


@pytest.fixture(scope="module")
def used():
    """What a process prints that uses `cnf`, where warnings are errors, and then fails."""
    return run_python(
        "import sys, warnings; warnings.simplefilter('error')\n"
        "import torch, cnf\n"
        "flow = cnf.CNF(2)\n"
        "flow.log_prob(flow.sample(3)).sum().backward()\n"
        "print('used', file=sys.stderr)\n"
        "flow.log_prob(torch.full((3, 2), float('nan')))"
    )


def test_importing_and_using_cnf_prints_and_warns_nothing(used):
    assert used.stdout == ""
    assert used.stderr.startswith("used\nTraceback")


def test_bad_rows_are_named_without_any_help_from_the_tests(used):
    last = used.stderr.strip().splitlines()[-1]
    assert used.returncode == 1
    assert last.startswith("ValueError: x must be finite")
    assert "rows 0, 1, 2" in last


def test_no_module_hides_a_name_that_its_package_offers(imported):
    assert imported["hidden"] == []
