"""Settings of the examples in docstrings and docs, and of the checks of shapes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jaxtyping
import pytest

_jaxtyped = jaxtyping.jaxtyped


def _shapes_alone(function: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """`jaxtyped` where annotations have shapes; mypy checks the types of all other functions.

    The check of a call takes as long as a small operation of torch, and a local function is
    decorated each time that it is made.
    """
    if function is None:
        return partial(_shapes_alone, typechecker=typechecker)
    annotated = getattr(function, "fget", None) or getattr(function, "__func__", function)
    annotations = getattr(annotated, "__annotations__", {}).values()
    if any("[Tensor" in str(annotation) for annotation in annotations):
        return _jaxtyped(function, typechecker=typechecker)
    return function


jaxtyping.jaxtyped = _shapes_alone  # the option --jaxtyping-packages calls it by this name


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
