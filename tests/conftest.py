"""Settings of every test."""

import gc
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

_TRACED = ("ablation", "cli", "tables", "vector_fields")
"""Folders whose slow tests are the only ones of some lines."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run slow tests without coverage, which adds a third to their time; other tests have it."""
    if not config.pluginmanager.hasplugin("_cov"):
        return
    tests = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(tests).parts[0] if item.path.is_relative_to(tests) else ""
        if item.get_closest_marker("slow") and folder not in _TRACED:
            item.add_marker("no_cover")


def pytest_collection_finish() -> None:
    """Leave what is there by now out of all garbage collections, which it would make slow."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Float64, a fixed seed, and one thread if OMP_NUM_THREADS names no number; then as before."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.default_generator.manual_seed(0)  # not of every device, which takes a millisecond
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _slow_without_shapes(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("slow"):
        request.getfixturevalue("shapes_unchecked")


@pytest.fixture
def run_program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a module as ``python -m`` does, in this process, which has imported torch already."""

    def run(module: str, *arguments: object) -> None:
        path = Path(__file__).parents[1] / f"{module.replace('.', '/')}.py"
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")

    return run


@pytest.fixture
def coarse_integral(monkeypatch: pytest.MonkeyPatch) -> None:
    """`certify` integrates a density over fewer points, where precision does not count."""
    monkeypatch.setattr("cnf.diagnostics.checks._GRID", 61)


@pytest.fixture
def quick_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """`calibrate` looks at fewer times and numbers of steps, for the same accuracy."""
    monkeypatch.setattr("cnf.ode.calibration._INTERVALS", 8)
    monkeypatch.setattr("cnf.ode.calibration._ROUNDS", 1)
    monkeypatch.setattr("cnf.ode.calibration._LEAST_STEPS", (8,))
