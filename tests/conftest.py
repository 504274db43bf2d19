"""Settings of every test."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Float64, a fixed seed, and one thread if OMP_NUM_THREADS names no number; then as before."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """Switch off jaxtyping, which would refuse bad input before our own messages can.

    It also takes more than half the time of whole solves, whose parts have tests of their own.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _slow_without_shapes(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("slow"):
        request.getfixturevalue("shapes_unchecked")


@pytest.fixture(scope="module")
def coarse_grid() -> Iterator[None]:
    """Densities of tables are evaluated in fewer steps, where precision does not count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnf.tables.fit.GRID_STEPS", 25)
        yield
