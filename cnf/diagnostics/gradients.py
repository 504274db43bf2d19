"""Comparison of the gradients of a flow by backprop, checkpoint and adjoint."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_number, check_trainable, is_positive
from cnf.diagnostics.case import Case, by_gradient
from cnf.flows.flow import Flow
from cnf.ode import Gradient, ODEError
from cnf.vector_fields import count_evaluations

_REMEDIES: dict[Gradient, str] = {
    "adjoint": "Tighten rtol and atol of the ODESolver (with fixed steps: raise steps), or choose "
    "gradient='checkpoint'.",
    "checkpoint": "The field does not return the same value twice: look for randomness in it.",
}


@dataclass(frozen=True, kw_only=True)
class GradientCheck:
    """Deviation of the gradient by one method from the gradient by backprop."""

    gradient: Gradient
    """The method, as in `ODESolver.gradient`."""
    error: float = math.nan
    """Norm of the difference from the gradient by backprop, relative to the norm of the latter; NaN
    if the method gives no gradient."""
    tolerance: float
    """The largest error that passes."""
    nfe: int = 0
    """Evaluations of the vector fields, in the solves and in the backward pass together."""
    verdict: Literal["pass", "fail", "skip"] = "skip"
    """Whether the error is within the tolerance; "skip" if the solver has no such gradient."""
    remedy: str = ""
    """Remedy if it fails, or the reason why it was skipped."""

    def __str__(self) -> str:
        if self.verdict == "skip":
            return f"{self.verdict:<5}{self.gradient:<12}{self.remedy}"
        line = (
            f"{self.verdict:<5}{self.gradient:<12}relative error {self.error:<9.2g}"
            f"(tolerance {self.tolerance:g}), {self.nfe} evaluations"
        )
        return f"{line}\n     -> {self.remedy}" if self.verdict == "fail" else line


@dataclass(frozen=True, kw_only=True)
class GradientReport:
    """Report of `check_gradients`."""

    rows: int
    """Number of rows."""
    parameters: int
    """Number of entries of the gradient."""
    checks: tuple[GradientCheck, ...]
    """One check for each gradient method, backprop first."""

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != "fail" for check in self.checks)

    def __getitem__(self, gradient: str) -> GradientCheck:
        """Return the check of a gradient method; raise a KeyError if there is none."""
        named: dict[str, GradientCheck] = {check.gradient: check for check in self.checks}
        return named[gradient]

    def __str__(self) -> str:
        title = (
            f"gradient of the mean log-likelihood of {self.rows} rows in {self.parameters} "
            "parameters, against backprop"
        )
        return "\n".join([title, *map(str, self.checks)])


def check_gradients(
    flow: Flow,
    x: Float[Tensor, "rows *event"],
    context: Float[Tensor, "rows context_features"] | None = None,
    *,
    tolerance: float = 0.01,
    generator: torch.Generator | None = None,
) -> GradientReport:
    """Compare the gradients of the mean log-likelihood by backprop, checkpoint and adjoint.

    Each part of the flow is solved by its own solver; to check another solver, such as the one of
    training, pass ``flow.using(solver=solver)``. Backprop is the reference, as it differentiates
    the steps taken; checkpoint should agree to rounding errors, the adjoint to about the tolerance
    of the solver, or to the errors of its steps.

    Args:
        flow: The flow; it, and the ``grad`` of its parameters, are not changed.
        x: Rows, best as many as in a minibatch.
        context: One context for each row, if the flow is conditional.
        tolerance: The largest relative error that passes.
        generator: Source of the seed of all draws; None for a fixed seed.

    Raises:
        TypeError: If `flow` is not a `Flow`, or `x` not a tensor.
        ValueError: If the flow follows no ODE, has nothing to train, or is solved by a method
            without backprop; if `x` is empty or does not fit; if `tolerance` is not positive.
        ODEError: If the solve fails by backprop too.

    Example:
        >>> from cnf import CNF, ODESolver
        >>> solver = ODESolver(method="rk4", steps=8)
        >>> report = check_gradients(CNF(2, solver=solver, skip=False), torch.randn(20, 2))
        >>> report.passed, report["checkpoint"].nfe
        (True, 64)
    """
    case = Case.of(flow, x, context, generator, least=1)
    with torch.inference_mode(False):
        check_trainable("flow", flow)
    check_number("tolerance", tolerance, "positive and finite", is_positive)
    if not case.continuous:
        raise ValueError("flow must follow an ODE; other flows have one gradient method only.")
    if not _trainable(flow):
        raise ValueError("flow must have parameters that require a gradient; got none.")
    reference, nfe = _gradient(case.by(by_gradient("backprop", flow)))
    first = GradientCheck(
        gradient="backprop", error=0.0, tolerance=tolerance, nfe=nfe, verdict="pass"
    )
    others = (
        _check(gradient, case, reference, tolerance)
        for gradient in get_args(Gradient)
        if gradient != "backprop"
    )
    return GradientReport(rows=len(x), parameters=len(reference), checks=(first, *others))


def _check(gradient: Gradient, case: Case, reference: Tensor, tolerance: float) -> GradientCheck:
    found = partial(GradientCheck, gradient=gradient, tolerance=tolerance)
    try:
        case = case.by(by_gradient(gradient, case.flow))
    except ValueError as reason:
        return found(remedy=str(reason))
    try:
        vector, nfe = _gradient(case)
    except ODEError as failure:
        return found(error=math.inf, verdict="fail", remedy=str(failure))
    # If the reference is zero, the other gradient must be zero, too.
    scale = reference.norm().clamp_min(torch.finfo(reference.dtype).tiny)
    error = float((vector - reference).norm() / scale)
    verdict: Literal["pass", "fail"] = "pass" if error <= tolerance else "fail"
    return found(error=error, nfe=nfe, verdict=verdict, remedy=_REMEDIES[gradient])


def _gradient(case: Case) -> tuple[Tensor, int]:
    """Return the gradient of the mean log-likelihood, as one vector, and the evaluations."""
    context = case.context
    with torch.inference_mode(False), torch.enable_grad(), count_evaluations(case.flow) as nfe:
        x, context = case.x.clone(), None if context is None else context.detach().clone()
        loss = case.flow.log_prob(x, context, generator=case.generator).mean()
        found = torch.autograd.grad(loss, _trainable(case.flow), materialize_grads=True)
    return torch.cat([part.flatten() for part in found]), nfe.value


def _trainable(flow: Flow) -> list[Tensor]:
    return [parameter for parameter in flow.parameters() if parameter.requires_grad]
