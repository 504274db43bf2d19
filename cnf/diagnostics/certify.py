"""Certification of a flow."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cnf.diagnostics.case import Case, NotMeasuredError, Outcome
from cnf.diagnostics.checks import CHECKS
from cnf.diagnostics.report import Check, LikelihoodReport
from cnf.flows.flow import Flow


def certify(
    flow: Flow,
    x: Float[Tensor, "rows *event"],
    context: Float[Tensor, "rows context_features"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> LikelihoodReport:
    """Check the accuracy of the likelihood, the samples and the inverse of a flow.

    The checks, each with a verdict and a remedy:

    - ``hutchinson``: difference of the exact mean log-density and its Hutchinson estimate, in
      standard errors of the estimate;
    - ``finite_differences``: deviation of the Jacobian products of a vector field, which define its
      divergence, from finite differences of the velocity;
    - ``standard_error``: standard error of the log-density of one row, if it is an estimate;
    - ``gradient_modes``: largest change of a log-density with gradients on, in training and
      evaluation mode;
    - ``tolerance``: largest change of a log-density when it is solved by steps of another kind, and
      by finer ones: for an adaptive solver, by at least 106 fixed steps (636 evaluations) and with
      a tenth of its tolerances; for a fixed grid, by an adaptive solver at a tight tolerance and
      with at least 106, and more than twice as many, equal steps. The limit is 0.05 nats or, if
      more, five times the stated accuracy of a calibrated flow;
    - ``path_weights``: difference of the overlap of the flow with a normal density, by the weights
      of paths from the base and from that density, in standard errors, where transforms draw;
    - ``round_trip``: largest error of x -> z -> x, in standard deviations of each feature; if x is
      drawn given z, the error of the worst part, of z -> x -> z for a surjection; the error of
      z -> x -> z for a flow onto a surface;
    - ``ladj``: deviation of the ladj of a discrete bijection, or a map onto a surface, from its
      Jacobian by autograd, for the worst part and direction;
    - ``sampled_log_prob``: largest difference between the log-density returned with a sample and
      `log_prob` of the sample;
    - ``integral``: distance from 1 of the integral of the density: over a grid in 2-D, and by draws
      on a compact manifold;
    - ``inverse_lipschitz``: Lipschitz constant of the inverse near the data, against the limit of
      the rounding errors of the dtype;
    - ``nfe``: evaluations of the vector fields for one `log_prob` of all rows.

    A check in which the flow overflows, refuses its own numbers or does not converge fails with the
    value inf and the message of the flow as remedy. A flow onto a surface is measured at the
    projections of the rows.

    Args:
        flow: The flow.
        x: Rows to measure on, best held-out ones; a few hundred suffice.
        context: One context for each row, if the flow is conditional.
        generator: Source of the seed of all draws; None for a fixed seed.

    Raises:
        TypeError: If `flow` is not a `Flow`, or `x` not a tensor.
        ValueError: If `x` has less than two rows, or it or `context` does not fit the flow.
        NotImplementedError: If the flow has one direction only.

    References:
        Behrmann et al. (2021), Understanding and Mitigating Exploding Inverses in Invertible
        Neural Networks. https://arxiv.org/abs/2006.09347
        Bennett (1976), Efficient Estimation of Free Energy Differences from Monte Carlo Data, for
        path_weights. https://doi.org/10.1016/0021-9991(76)90078-4

    Example:
        >>> from cnf import CNF
        >>> flow, x = CNF(3), torch.randn(50, 3)
        >>> flow.calibrate(x)
        >>> report = certify(flow, x)
        >>> report.passed, report["round_trip"].verdict
        (True, 'pass')
    """
    case = Case.of(flow, x, context, generator, least=2)
    if context is not None and context.shape[:-1] != x.shape[:1]:
        raise ValueError(
            f"context must have shape ({len(x)}, {flow.context_features}), a row for each of x; "
            f"got {tuple(context.shape)}."
        )
    with torch.inference_mode(False), torch.no_grad():
        if flow.likelihood == "on_manifold":
            case = case.on_surface
        flow.to_base_and_ladj(x[:0], None if context is None else context[:0])  # refuses bad input
        checks = tuple(_measured(name, measure, case) for name, measure in CHECKS.items())
    return LikelihoodReport(likelihood=flow.likelihood, rows=len(x), checks=checks)


def _measured(name: str, measure: Callable[[Case], Outcome], case: Case) -> Check:
    try:
        outcome = measure(case)
    except NotMeasuredError as reason:
        return Check(name=name, meaning=str(reason))
    except (NotImplementedError, torch.OutOfMemoryError):  # not failures of the numbers
        raise
    except (ValueError, RuntimeError) as error:
        outcome = Outcome(math.inf, 0.0, "the flow failed on numbers of its own", str(error))
    if math.isnan(outcome.value):
        outcome = outcome._replace(value=math.inf)
    passed = outcome.value <= outcome.limit
    return Check(name=name, verdict="pass" if passed else "fail", **outcome._asdict())
