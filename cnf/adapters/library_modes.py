"""Calls of modules of other libraries: their mode, random numbers and initialisation.

Classes are recognised by name, so that no library is imported.
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
"""Classes without a likelihood, and the reason."""

_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    # Their gradients lack parameters in evaluation mode.
    ("zuko", "FFJTransform"): {"training": True},
    ("zuko", "MNN"): {"training": True},
    ("zuko", "UMNN"): {"training": True},
    # The value as in evaluation mode: a determinant for two features, else an unbiased estimate
    # with 20 exact terms. Training mode, because only it keeps the gradient of an estimate; without
    # the memory-saving options, with which the value is not a ladj.
    ("normflows", "iResBlock"): {
        "training": True,
        "brute_force": True,
        "n_power_series": None,
        "n_exact_terms": 20,
        "neumann_grad": False,
        "grad_in_forward": False,
    },
}
"""Settings with correct values and gradients, of classes for which evaluation mode has not both."""

_SERIES = "_logdetgrad"
"""Method of a residual block of normflows that draws from numpy."""

_FROM_FIRST_ROWS: dict[tuple[str, str], dict[str, Any]] = {
    ("nflows", "ActNorm"): {"training": True},
    ("nflows", "BatchNorm"): {"training": True, "momentum": 1.0},
    ("normflows", "ActNorm"): {},
}
"""Settings with which a call initialises these parts from its rows."""


def is_a(part: object, library: str, name: str) -> bool:
    """Return whether `part` is an instance of the class of this name of a library."""
    return any(
        kind.__name__ == name and kind.__module__.split(".")[0] == library
        for kind in type(part).__mro__
    )


def check_has_likelihood(module: nn.Module) -> None:
    """Raise a TypeError for a module with a part that is no bijection of single rows."""
    for part in module.modules():
        for (library, name), reason in _REFUSED.items():
            if is_a(part, library, name):
                raise TypeError(f"{name} of {library} cannot be wrapped: it {reason}.")


def is_estimate(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether a part has a random estimate of its ladj, for rows of this shape."""
    return any(
        (is_a(part, "zuko", "FFJTransform") and not part.exact)
        or (is_a(part, "normflows", "iResBlock") and shape != (2,))
        for part in module.modules()
    )


def parts_to_initialize(module: nn.Module) -> list[nn.Module]:
    """Return the parts that are not yet initialised from data."""
    return [part for part in module.modules() if _needs_initialization(part)]


def _needs_initialization(part: nn.Module) -> bool:
    if is_a(part, "nflows", "ActNorm"):
        return not part.initialized
    if is_a(part, "nflows", "BatchNorm"):  # its running variance is 0 until the first rows
        return not bool(part.get_buffer("running_var").any())
    return is_a(part, "normflows", "ActNorm") and not part.data_dep_init_done


@contextmanager
def correct_mode(module: nn.Module, *, starting: bool = False) -> Iterator[None]:
    """Set each part to the mode with correct values and gradients, then restore its own.

    This is evaluation mode, where dropout does nothing and batch normalisation has fixed
    statistics, but for the few parts that need another. With `starting`, uninitialised parts are
    initialised from the rows of the call.
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
    """Replace torch's global generators by `generator`, for this thread.

    Other libraries take no generator. The global ones are neither read nor set, so that other
    threads keep theirs. The numbers of terms that normflows draws from numpy follow `generator`
    too; other draws from numpy, such as in a user's distribution, do not.
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
    """Return the power series of a block, with its numbers of terms drawn from `terms`."""
    series = getattr(type(block), _SERIES)
    samplers = {"geometric_sample": terms.geometric, "poisson_sample": terms.poisson}
    names = {**series.__globals__, **samplers}
    copied = FunctionType(series.__code__, names, closure=series.__closure__)
    return MethodType(copied, block)


def as_rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Copy vectors ``(*batch, features)`` to events ``(rows, *shape)``."""
    return x.reshape(-1, *shape).clone()  # tensors made in inference mode have no gradient
