"""Evaluation budget for the solves of zuko's CNF, which have none."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform as TorchTransform

from cnf.ode.monitor import ODEError

_BUDGET = 10_000
"""Evaluations of a solve, as by default of `cnf.ODESolver`."""

_CALLS_PER_STEP = 7


@dataclass(eq=False)
class BoundedRate:
    """Right-hand side of a solve by zuko, with an evaluation budget."""

    rate: Callable[[Tensor, Tensor], Tensor]
    settings: str
    """Settings of the solve, for the message."""
    evaluations: int = 0
    last: float = math.nan
    calls_there: int = 0
    ended: bool = False

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the rate; raise an `ODEError` beyond the budget."""
        if not self.ended:  # a backward pass repeats the steps and adds none
            self._count(float(t.detach()), x.dtype)
        return self.rate(t, x)

    def _count(self, t: float, dtype: torch.dtype) -> None:
        self.evaluations += 1
        self.calls_there = self.calls_there + 1 if t == self.last else 1
        self.last = t
        if self.calls_there < _CALLS_PER_STEP and self.evaluations <= _BUDGET:
            return
        stuck = self.calls_there >= _CALLS_PER_STEP
        what = "needs steps too small for the time to advance" if stuck else "spent its budget"
        raise ODEError(
            f"the solve with zuko's odeint {what}, at t = {t:.6g} after {self.evaluations - 1} "
            f"evaluations; {self.settings} may be finer than {dtype} resolves, or the field stiff: "
            "loosen these arguments of zuko's CNF, or use float64."
        )


@contextmanager
def bounded(transform: TorchTransform, dtype: torch.dtype) -> Iterator[None]:
    """Bound the solves of zuko in a transform, and make its ladj as precise as the path.

    A ValueError refuses tolerances that are finer than the dtype of the state resolves.
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
            f"atol and rtol of zuko's CNF must not both be finer than {dtype} resolves, "
            f"{resolution:.1e}; got {atol} and {rtol}. Loosen them, or use float64."
        )
    own = transform.f.rate if isinstance(transform.f, BoundedRate) else transform.f
    rate = BoundedRate(own, f"atol={atol} and rtol={rtol}")
    # Both stay set for the backward pass; the transform is made for one call.
    transform.f, transform.trace_scale = rate, 1.0
    try:
        yield
    finally:
        rate.ended = True
