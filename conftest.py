"""Settings of the examples in docstrings and docs."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """Switch off jaxtyping, which would refuse bad input before our own messages can.

    It also takes more than half the time of whole solves, whose parts have tests of their own.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _examples_run_as_for_a_user(request: pytest.FixtureRequest) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("shapes_unchecked")
