"""The solves of zuko's CNF, which have no bound of their own, with one."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform as TorchTransform

from cnf.ode.monitor import ODEError

_BUDGET = 10_000
"""Evaluations of a solve, as by default of `cnf.ODESolver`."""

_CALLS_OF_A_STEP = 7


class BoundedRate:
    """The right-hand side of a solve by zuko, which ends in an error where it would never end.

    Args:
        rate: Takes a time and a state.
        settings: What the solve is by, for the message.
    """

    def __init__(self, rate: Callable[[Tensor, Tensor], Tensor], settings: str) -> None:
        self.rate = rate
        self.settings = settings
        self.evaluations = 0
        self.last = float("nan")
        self.calls_there = 0
        self.ended = False

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """The rate.

        Raises:
            ODEError: If the solve asks too often.
        """
        if not self.ended:  # a backward pass redoes the steps, and no more
            self._count(float(t.detach()), x.dtype)
        return self.rate(t, x)

    def _count(self, t: float, dtype: torch.dtype) -> None:
        self.evaluations += 1
        self.calls_there = self.calls_there + 1 if t == self.last else 1
        self.last = t
        if self.calls_there < _CALLS_OF_A_STEP and self.evaluations <= _BUDGET:
            return
        stuck = self.calls_there >= _CALLS_OF_A_STEP
        what = "needs steps too small for the time to advance" if stuck else "spent its budget"
        raise ODEError(
            f"the solve with zuko's odeint {what}, at t = {t:.6g} after {self.evaluations - 1} "
            f"evaluations; {self.settings} may be finer than {dtype} can tell, or the field stiff: "
            "loosen these arguments of zuko's CNF, or use float64."
        )


@contextmanager
def bounded(transform: TorchTransform, dtype: torch.dtype) -> Iterator[None]:
    """Within, the solves of a transform end, and a ladj is as precise as the path.

    Args:
        transform: A torch transform, perhaps with solves of zuko inside.
        dtype: What is solved in.

    Raises:
        ValueError: If its tolerances are finer than the dtype can tell.
    """
    with ExitStack() as stack:
        if hasattr(transform, "trace_scale"):
            stack.enter_context(_bounded_solve(transform, dtype))
        for part in getattr(transform, "transforms", ()):
            stack.enter_context(bounded(part, dtype))
        yield


@contextmanager
def _bounded_solve(transform: Any, dtype: torch.dtype) -> Iterator[None]:
    atol, rtol = transform.atol, transform.rtol
    resolution = torch.finfo(dtype).eps
    if max(atol, rtol) < resolution:
        raise ValueError(
            f"atol and rtol of zuko's CNF must not both be finer than {dtype} can tell, "
            f"{resolution:.1e}; got {atol} and {rtol}. Loosen them, or use float64."
        )
    own = transform.f.rate if isinstance(transform.f, BoundedRate) else transform.f
    rate = BoundedRate(own, f"atol={atol} and rtol={rtol}")
    # They stay, for a backward pass looks at both again; the transform is made for one call.
    transform.f, transform.trace_scale = rate, 1.0
    try:
        yield
    finally:
        rate.ended = True
