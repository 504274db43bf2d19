"""Penalties by name: of the package, of a user, and sums."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cnf.divergence import Exact, FieldEvaluation
from cnf.regularizers import (
    CostRate,
    directional_derivative,
    jacobian_frobenius,
    kinetic_energy,
    total_derivative,
)
from cnf.vector_fields import VectorField

PENALTIES: Mapping[str, CostRate] = {
    "kinetic": kinetic_energy,
    "jacobian-frobenius": jacobian_frobenius,
    "directional-derivative": directional_derivative,
    "total-derivative": total_derivative,
}
"""Penalties of the package by name."""


def find_penalty(name: str) -> CostRate:
    """Return a penalty by its name, or import a user's own by ``module:name``.

    A class is called without arguments; a function or another object is the penalty itself.

    Raises:
        ValueError: If there is no such penalty, or it cannot be imported or called.

    Example:
        >>> find_penalty("cnf.regularizers:hjb_residual").name
        'hjb_residual'
    """
    if name in PENALTIES:
        return PENALTIES[name]
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(
            f"penalties must be {', '.join(PENALTIES)}, a sum such as "
            f"kinetic+jacobian-frobenius, or your own as module:name; got {name!r}."
        )
    here = str(Path.cwd())  # which is not searched by a command that is installed
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute)
        penalty = found() if isinstance(found, type) else found
    except Exception as error:  # of a user's code
        raise ValueError(
            f"the penalty {name!r} cannot be imported: {error}. The module must be installed, or "
            "lie in the folder that you are in, and a class must take no arguments."
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(penalty):
        raise ValueError(
            f"the penalty {name!r} must be callable, from a FieldEvaluation to the cost rate of "
            f"each row; got {type(penalty).__name__}."
        )
    rate: CostRate = penalty
    return rate


def check_penalty(
    name: str, penalty: CostRate, field: VectorField, x: Tensor, context: Tensor | None
) -> None:
    """Refuse a penalty whose rates of some rows are not one finite number for each row."""
    with torch.enable_grad():
        time = x.new_tensor(0.5)
        evaluation: FieldEvaluation = Exact()(field, time, x, None, context, products=True)
        rates = penalty(evaluation)
    if not isinstance(rates, Tensor) or rates.shape != x.shape[:-1]:
        shape = tuple(rates.shape) if isinstance(rates, Tensor) else type(rates).__name__
        raise ValueError(
            f"the penalty {name!r} must return a rate for each row, a tensor of shape "
            f"{tuple(x.shape[:-1])}; got {shape}."
        )
    if not rates.isfinite().all():
        raise ValueError(f"the penalty {name!r} must return finite rates; got {rates.tolist()}.")
