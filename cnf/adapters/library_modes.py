"""Calls into modules of other libraries: their mode, their random numbers, and their traps.

Parts are known by the name of their class and library, so that none of these is imported.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from cnf._building import Building

_NO_BIJECTION = "is no bijection between data and base"

_REFUSED = {
    ("normflows", "BatchNorm"): "normalises each batch by its own statistics, and has no inverse",
    ("normflows", "HamiltonianMonteCarlo"): _NO_BIJECTION,
    ("normflows", "MetropolisHastings"): _NO_BIJECTION,
}
"""What no likelihood can be had of, and why."""

_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    # These leave parameters out of their gradients in evaluation mode.
    ("zuko", "FFJTransform"): {"training": True},
    ("zuko", "MNN"): {"training": True},
    ("zuko", "UMNN"): {"training": True},
    # The value of evaluation mode: a determinant in the plane, else an unbiased estimate with these
    # terms, whatever it is to truncate in training. But only training mode keeps the gradient of
    # an estimate; and with less memory, only that gradient is of a ladj, and the value is not.
    ("normflows", "iResBlock"): {
        "training": True,
        "brute_force": True,
        "n_power_series": None,
        "n_exact_terms": 20,
        "neumann_grad": False,
        "grad_in_forward": False,
    },
}
"""Under which settings values and gradients are right, for what is not to be in evaluation mode."""

_SERIES = "_logdetgrad"
"""The method of a residual block of normflows that draws from numpy."""

_FROM_FIRST_ROWS: dict[tuple[str, str], dict[str, Any]] = {
    ("nflows", "ActNorm"): {"training": True},
    ("nflows", "BatchNorm"): {"training": True, "momentum": 1.0},
    ("normflows", "ActNorm"): {},
}
"""Under which settings a call makes these parts start from its rows."""


def is_a(part: object, library: str, name: str) -> bool:
    """Whether `part` is an instance of the class of this name of a library, or of a subclass."""
    return any(
        kind.__name__ == name and kind.__module__.split(".")[0] == library
        for kind in type(part).__mro__
    )


def refuse_what_has_no_likelihood(module: nn.Module) -> None:
    """Refuse a module with a part that is no invertible map of each row by itself.

    Raises:
        TypeError: If it has one.
    """
    for part in module.modules():
        for (library, name), reason in _REFUSED.items():
            if is_a(part, library, name):
                raise TypeError(f"{name} of {library} cannot be wrapped: it {reason}.")


def is_estimate(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a part estimates its ladj at random, given rows of this shape."""
    return any(
        (is_a(part, "zuko", "FFJTransform") and not part.exact)
        or (is_a(part, "normflows", "iResBlock") and shape != (2,))
        for part in module.modules()
    )


def parts_to_initialize(module: nn.Module) -> list[nn.Module]:
    """The parts that still have to start from data."""
    return [part for part in module.modules() if _needs_initialization(part)]


def _needs_initialization(part: nn.Module) -> bool:
    if is_a(part, "nflows", "ActNorm"):
        return not part.initialized
    if is_a(part, "nflows", "BatchNorm"):  # whose running variance is 0 until it has seen rows
        return not bool(part.get_buffer("running_var").any())
    return is_a(part, "normflows", "ActNorm") and not part.data_dep_init_done


@contextmanager
def correct_mode(module: nn.Module, *, starting: bool = False) -> Iterator[None]:
    """Within, each part has the one mode in which it can be trusted, whatever `module.training`.

    It is evaluation mode, where dropout does nothing and batch normalisation has fixed statistics,
    but for the few parts that need another. Afterwards all is as it was.

    Args:
        module: What is called within.
        starting: Whether parts that await data are to start from the rows of the call.
    """
    settings: list[tuple[nn.Module, Mapping[str, Any]]] = [
        (part, {"training": False, **_settings_of(part, _SETTINGS)}) for part in module.modules()
    ]
    if starting:
        settings += [
            (part, _settings_of(part, _FROM_FIRST_ROWS)) for part in parts_to_initialize(module)
        ]
    before = [(part, {name: getattr(part, name) for name in chosen}) for part, chosen in settings]
    try:
        for part, chosen in settings:
            _set(part, chosen)
        yield
    finally:
        for part, values in before:
            _set(part, values)


def _settings_of(
    part: nn.Module, table: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Mapping[str, Any]:
    return next((chosen for kind, chosen in table.items() if is_a(part, *kind)), {})


def _set(part: nn.Module, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(part, name, value)


@contextmanager
def drawing_from(generator: Generator | None, module: nn.Module | None = None) -> Iterator[None]:
    """Within, what this thread draws from torch's global generators follows `generator`.

    Other libraries take no generator. The global ones are neither read nor set, so that other
    threads draw from them as ever. The numbers of terms that normflows draws from numpy follow too;
    whatever else draws from numpy, such as a distribution of a user's own, does not.

    Args:
        generator: The generator; None for leaving all as it is.
        module: What is called within.
    """
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    parts = [] if module is None else [*module.modules()]
    blocks = [part for part in parts if is_a(part, "normflows", "iResBlock")]
    terms = np.random.RandomState(seed)
    with Building(seed=seed):
        try:
            for block in blocks:
                vars(block)[_SERIES] = _drawing_terms_from(terms, block)
            yield
        finally:
            for block in blocks:
                vars(block).pop(_SERIES, None)


def _drawing_terms_from(terms: np.random.RandomState, block: Any) -> MethodType:
    """The block's power series, with another source of the numbers of its terms."""
    series = getattr(type(block), _SERIES)
    samplers = {"geometric_sample": terms.geometric, "poisson_sample": terms.poisson}
    names = {**series.__globals__, **samplers}
    copied = FunctionType(series.__code__, names, closure=series.__closure__)
    return MethodType(copied, block)


def as_rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Vectors ``(*batch, features)`` as events ``(rows, *shape)``, in memory of their own.

    A copy, since what was made in inference mode cannot be differentiated.
    """
    return x.reshape(-1, *shape).clone()
