"""Checks of a certification: each measures one number, and has a limit."""

import dataclasses
import math
from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, constraints

from cnf.diagnostics.case import Case, NotMeasuredError, Outcome, by_gradient, scale_of
from cnf.divergence import Hutchinson
from cnf.flows.flow import Flow
from cnf.flows.references import LARGEST_ERROR, by_reference
from cnf.manifolds import Manifold, OnManifold
from cnf.ode import methods
from cnf.transforms import ContinuousTransform, FactorOut, Transform
from cnf.transforms.support.constraints import covers
from cnf.vector_fields import count_evaluations

_PROBES = 8
_DRAWS = 4000
_LEAST_OVERLAP = 0.01
"""Overlap of the draws of a flow with normal ones that counts enough of them."""
_MANY_FEATURES = 64
_GRID = 201
_POINTS = 10_000
_FACTOR = 5
"""Largest error of a row, in accuracies of a calibrated flow."""


def _hutchinson(case: Case) -> Outcome:
    case.need_ode()
    case.need_density()
    case.need_probes()
    if not all(part.vector_field.has_closed_form_divergence for part in case.continuous):
        case = case.few()
    exact = case.exact.log_prob()
    estimated = case.flow.using(divergence=Hutchinson(probes=_PROBES))
    log_prob, error = estimated.log_prob_and_error(case.x, case.context, generator=case.generator)
    # For a diagonal Jacobian the estimate is exact, and only the error of the solver is left.
    floor = 10 * max(max(part.solver.rtol, part.solver.atol) for part in case.continuous)
    spread = math.hypot(float(error.square().sum().sqrt()) / len(error), floor)
    return Outcome(
        float((exact - log_prob).mean().abs()) / spread,
        4.0,
        "exact mean log-density against the estimated one, in standard errors",
        "A field's velocity_and_products or velocity_and_divergence is wrong; compare both with "
        "the results of a ModuleField.",
    )


def _finite_differences(case: Case) -> Outcome:
    case.need_ode()
    case = case.few()
    found = [_deviation_of_products(part, case) for part in case.continuous]
    return Outcome(
        max(found),
        0.1,
        "median relative deviation of a Jacobian product from finite differences of the velocity",
        "The field's velocity does not go through autograd (detach, numpy, no_grad), or its "
        "velocity_and_products is wrong; write forward in operations of torch alone.",
    )


def _deviation_of_products(part: ContinuousTransform, case: Case) -> float:
    """Return the deviation of p^T J p from finite differences at random points, halfway in time."""
    field, like = part.vector_field, case.x
    shape, generator = (2, len(like), part.features), case.generator
    x, probe = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    probe = probe.sign()
    context = _context(part, case)
    if part.context_features not in (0, case.flow.context_features):
        # Inside of a surjection, z is a part of the context.
        context = torch.randn(
            *(len(x), part.context_features),
            generator=generator,
            dtype=like.dtype,
            device=like.device,
        )
    t = part.field_times(x.new_tensor(0.5)).detach()
    velocity, products = field.velocity_and_products(t, x, probe.unsqueeze(0), context)
    # This size balances the truncation error, of second order, and rounding.
    size = torch.finfo(like.dtype).eps ** (1 / 3)
    ahead, behind = (field(t, x + sign * size * probe, context) for sign in (1, -1))
    expected = (probe * (ahead - behind)).sum(-1) / (2 * size)
    made = (probe * products[0]).sum(-1)
    # A product much smaller than the velocity is lost in the rounding of the differences.
    floor = 0.01 * velocity.norm(dim=-1) + torch.finfo(like.dtype).tiny
    return float(((made - expected).abs() / (made.abs() + expected.abs() + floor)).median())


def _standard_error(case: Case) -> Outcome:
    if case.flow.likelihood != "estimate":
        raise NotMeasuredError(f"the likelihood is {case.flow.likelihood!r}, not 'estimate'")
    case.need_density()
    case.need_probes()
    divergences = [part.divergence for part in case.continuous]
    probes = [part.probes for part in divergences if isinstance(part, Hutchinson)]
    if len(probes) < sum(part is not None and not part.is_exact for part in divergences):
        raise NotMeasuredError("for estimates by Hutchinson's method only")
    estimated = case.flow.map_continuous(_with_probes)
    _, error = estimated.log_prob_and_error(case.x, case.context, generator=case.generator)
    return Outcome(
        float(error.mean()) * math.sqrt(_PROBES / min(probes)),
        0.1,
        "mean standard error of the log-density of a row",
        "Use divergence=Exact(), or Hutchinson with more probes.",
    )


def _gradient_modes(case: Case) -> Outcome:
    case = case.few()
    expected = case.log_prob()
    found = torch.stack([_with_gradients(case, training) for training in (True, False)])
    # A step whose error is near the tolerance may be rejected in one mode only.
    adaptive = [part.solver for part in case.continuous if part.solver.is_adaptive]
    steps = max((10 * max(solver.rtol, solver.atol) for solver in adaptive), default=0.0)
    rounding = 100 * torch.finfo(case.x.dtype).eps * (1 + float(expected.abs().max()))
    return Outcome(
        float((found - expected).abs().max()),
        steps + rounding,
        "largest change with gradients on, in training and evaluation mode",
        "Look for code that depends on requires_grad, or on training (dropout, batch norm).",
    )


def _tolerance(case: Case) -> Outcome:
    case.need_ode()
    log_prob = case.log_prob()
    changes = [
        (case.by(by_reference(case.flow, finer=finer)).log_prob() - log_prob).abs().max()
        for finer in (False, True)
    ]
    return Outcome(
        float(torch.stack(changes).max()),  # NaN if one is NaN
        max(LARGEST_ERROR, _FACTOR * (case.flow.accuracy or 0.0)),
        "largest change when solved by steps of another kind, or by finer ones",
        "Take more or finer steps: tighten rtol and atol of the ODESolver, or raise steps, or call "
        "flow.calibrate(x, accuracy=...). If that does not help, the velocity has a short pulse, "
        "or the flow was trained on steps too coarse for it: train again with finer ones. Float64 "
        "helps against rounding.",
    )


def _path_weights(case: Case) -> Outcome:
    flow = case.exact.flow
    if not (flow.transforms.stochastic_to_base or flow.transforms.stochastic_to_data):
        raise NotMeasuredError("no transform draws")
    kinds = flow.transforms.likelihoods | {flow.base.likelihood}
    if flow.likelihood not in ("exact", "lower_bound") or kinds - {"exact", "lower_bound"}:
        raise NotMeasuredError("a part is an estimate, with any divergence, or no density")
    inner = [part.chain.support for part in flow.modules() if isinstance(part, FactorOut)]
    supports = [flow.support, *(support for support in inner if support is not None)]
    if not all(covers(support, constraints.real) for support in supports):
        raise NotMeasuredError("for densities of real numbers only")
    context = None if case.context is None else case.context[0]
    generator = case.generator
    low, middle, high = torch.quantile(
        flow.sample(_DRAWS, context, generator=generator).double(),
        torch.tensor([0.16, 0.5, 0.84], dtype=torch.float64, device=case.x.device),
        dim=0,
    ).to(case.x.dtype)
    spread = ((high - low) / 2).where(high > low, 1.0)
    draws = spread.new_empty(_DRAWS, *spread.shape).normal_(generator=generator)
    target = Independent(Normal(middle, spread, validate_args=False), len(flow.event_shape))
    _, there = flow.rsample_and_log_weight(
        lambda x, *_: target.log_prob(x), _DRAWS, context, generator=generator
    )
    x = middle + spread * draws
    back = flow.log_prob(x, context, generator=generator) - target.log_prob(x)
    # Bounded, unlike weights, whose mean may come from draws that are never seen (Bennett 1976).
    overlaps = torch.stack([there, back]).double().sigmoid()
    means = overlaps.mean(1)
    if float(means.max()) < _LEAST_OVERLAP:
        raise NotMeasuredError("draws of the flow are too far from normal ones")
    error = float(overlaps.var(1).sum().sqrt()) / math.sqrt(_DRAWS)
    return Outcome(
        float((means[0] - means[1]).abs()) / (error + torch.finfo(case.x.dtype).eps),
        5.0,
        "difference of the overlap with a normal density by paths from base and data, in standard "
        "errors",
        "A transform that draws must return, beside x, the log-ratio of two densities: the way "
        "back over the way there; where only x is drawn, minus its contribution.",
    )


def _round_trip(case: Case) -> Outcome:
    if case.flow.transforms.stochastic_to_data:
        return _round_trip_of_parts(case)
    if case.flow.likelihood == "on_manifold":
        z = case.flow.to_base(case.x, case.context, generator=case.generator)
        error = _error_of_round_trip(case.flow, z, case, from_base=True)
        return _outcome_of_round_trip(error, "z -> x -> z")
    return _outcome_of_round_trip(_error_of_round_trip(case.flow, case.x, case), "x -> z -> x")


def _round_trip_of_parts(case: Case) -> Outcome:
    """Measure each part the way round that undoes itself: x -> z -> x, or z -> x -> z."""
    x, found = case.x, []
    for place, part in enumerate(case.flow.transforms):
        if not part.stochastic_to_data:
            way = f"x -> z -> x of part {place}, {type(part).__name__}"
            found.append((_error_of_round_trip(part, x, case), way))
        z = part.to_base(x, _context(part, case), generator=case.generator)
        if part.stochastic_to_data and not part.stochastic_to_base:
            way = f"z -> x -> z of part {place}, {type(part).__name__}"
            found.append((_error_of_round_trip(part, z, case, from_base=True), way))
        x = z
    if not found:
        raise NotMeasuredError("every part draws both ways")
    return _outcome_of_round_trip(*max(found, key=itemgetter(0)))


def _error_of_round_trip(
    part: Flow | Transform, start: Tensor, case: Case, *, from_base: bool = False
) -> float:
    """Return the largest error of a way there and back, in standard deviations of each entry."""
    context = _context(part, case)
    moves = (part.to_data, part.to_base) if from_base else (part.to_base, part.to_data)
    there = moves[0](start, context, generator=case.generator)
    back = moves[1](there, context, generator=case.generator)
    moved = back - start
    if isinstance(part.support, OnManifold):  # where π and -π are the same angle
        _, moved = part.support.manifold.geodesic(start.new_zeros(()), start, back)
    return float((moved.abs() / scale_of(start)).max())


def _context(part: Flow | Transform, case: Case) -> Tensor | None:
    return case.context if part.context_features else None


def _outcome_of_round_trip(error: float, way: str) -> Outcome:
    return Outcome(
        error,
        0.01,
        f"largest error of {way}, in standard deviations",
        "Solve more precisely (see tolerance), use float64, or regularise (see inverse_lipschitz); "
        "in a transform of your own, to_data must be the inverse of to_base.",
    )


def _sampled_log_prob(case: Case) -> Outcome:
    if case.flow.likelihood != "on_manifold":
        case.need_density()
    if case.flow.likelihood not in ("exact", "on_manifold"):
        case = case.few().exact
    draws = len(case.x) if case.context is None else ()
    x, log_prob = case.flow.sample_and_log_prob(draws, case.context, generator=case.generator)
    again = case.flow.log_prob(x, case.context)
    return Outcome(
        float((log_prob - again).abs().max()),
        0.05,
        "largest difference of a sample's log-density, evaluated anew",
        "Solve more precisely (see tolerance), or use float64; the ladj of a transform of your own "
        "must change its sign with the direction (see ladj).",
    )


def _ladj(case: Case) -> Outcome:
    case = case.few()
    if math.prod(case.flow.event_shape) > _MANY_FEATURES:
        raise NotMeasuredError(f"for at most {_MANY_FEATURES} features")
    x, found = case.x, []
    for place, part in enumerate(case.flow.transforms):
        context = _context(part, case)
        follows_ode = any(isinstance(inner, ContinuousTransform) for inner in part.modules())
        is_exact = part.is_bijective and part.likelihood == "exact"
        if (is_exact or part.likelihood == "on_manifold") and not follows_ode:
            found += [
                (deviation, f"{method} of part {place}, {type(part).__name__}")
                for method, deviation in _deviations_of_ladj(part, x, context, case).items()
            ]
        x = part.to_base(x, context, generator=case.generator)
    if not found:
        raise NotMeasuredError("no part is a bijection with an exact ladj that follows no ODE")
    worst, where = max(found, key=itemgetter(0))  # the first of equals
    return Outcome(
        worst,
        0.05,
        f"largest difference of a ladj from the Jacobian, in {where}",
        f"The value and the ladj that {where} returns do not fit: the ladj must be log |det| of "
        "the Jacobian of the value. Compare both with torch.autograd.functional.jacobian; if "
        "the ladj is right, the value does not go through autograd (detach, numpy).",
    )


def _deviations_of_ladj(
    part: Transform, x: Tensor, context: Tensor | None, case: Case
) -> dict[str, float]:
    """Return the deviation of both ladjs from the Jacobian of one of the ways.

    It is the way to the base, or to the data where these are on a surface, whose own volume J^T J
    measures.
    """
    onto_surface = part.likelihood == "on_manifold"
    names = ("to_base_and_ladj", "to_data_and_ladj")
    there, back = reversed(names) if onto_surface else names
    start = part.to_base(x, context, generator=case.generator) if onto_surface else x
    with torch.enable_grad():
        point = start.detach().clone().requires_grad_()
        end, ladj = getattr(part, there)(point, context, generator=case.generator)
        if not end.requires_grad:
            return {there: math.inf}
        jacobian = _jacobian(end, point).double()
    if onto_surface:
        expected = torch.linalg.slogdet(jacobian.mT @ jacobian).logabsdet / 2
    else:
        expected = torch.linalg.slogdet(jacobian).logabsdet
    _, ladj_back = getattr(part, back)(end.detach(), context, generator=case.generator)
    # The median, because a row may lie at a kink.
    return {
        there: float((ladj.detach() - expected).abs().median()),
        back: float((ladj_back + expected).abs().median()),
    }


def _integral(case: Case) -> Outcome:
    case.need_density()
    if isinstance(case.flow.support, OnManifold):
        return _integral_on_manifold(case, case.flow.support.manifold)
    if case.flow.event_shape != (2,) or case.flow.support is not constraints.real_vector:
        raise NotMeasuredError("for densities of the whole plane only")
    flow = case.exact.flow
    context = None if case.context is None else case.context[0]
    samples = flow.sample(1000, context, generator=case.generator)
    low, high = samples.amin(0), samples.amax(0)
    steps = torch.linspace(-0.5, 1.5, _GRID, dtype=torch.float64).to(samples)
    axes = torch.lerp(low, high, steps.unsqueeze(-1)).T
    points = torch.cartesian_prod(*axes)
    log_prob = flow.map_continuous(_to_a_hundredth).log_prob(points, context).view(_GRID, _GRID)
    total = torch.trapezoid(torch.trapezoid(log_prob.exp(), axes[1]), axes[0])
    return Outcome(
        float((total - 1).abs()),
        0.02,
        f"distance of the integral from 1, on {_GRID} x {_GRID} points",
        "Solve more precisely (see tolerance); or the density has details finer than the grid.",
    )


def _integral_on_manifold(case: Case, manifold: Manifold) -> Outcome:
    """Draw half of the points uniformly, and half from the flow: no weight is larger than 2."""
    if manifold.log_volume == math.inf:
        raise NotMeasuredError("for compact manifolds only")
    flow = case.exact.flow.map_continuous(_to_a_hundredth)
    context = None if case.context is None else case.context[0]
    shape, generator = torch.Size([_POINTS]), case.generator
    uniform = manifold.rand(shape, like=case.x, generator=generator)
    x = torch.cat([uniform, flow.sample(shape, context, generator=generator)])
    log_prob = flow.log_prob(x, context).double()
    ratios = 2 * (log_prob + manifold.log_volume).sigmoid()
    error = float((ratios[:_POINTS].var() + ratios[_POINTS:].var()).sqrt()) / 2 / _POINTS**0.5
    return Outcome(
        float((ratios.mean() - 1).abs()),
        max(0.02, 4 * error),
        f"distance of the integral from 1, by {2 * _POINTS} draws",
        "Solve more precisely (see tolerance); or the divergence of the field is not the one on "
        "the manifold: use a TangentField.",
    )


def _inverse_lipschitz(case: Case) -> Outcome:
    if case.flow.transforms.stochastic_to_data:
        raise NotMeasuredError("x is drawn given z, so that there is no inverse")
    if case.flow.features > _MANY_FEATURES:
        raise NotMeasuredError(f"for at most {_MANY_FEATURES} features")
    if any(methods()[part.solver.method] == "external" for part in case.continuous):
        raise NotMeasuredError("the solver leaves torch, so that autograd has no Jacobian")
    few = case.few()
    flow = by_gradient("backprop", few.flow)
    with torch.enable_grad():
        x = few.x.clone().requires_grad_()
        z = flow.to_base(x, few.context, generator=few.generator)
        jacobians = _jacobian(z, x) * case.scale.flatten()
    smallest, allowed = 0.0, 0.0
    if jacobians.isfinite().all():
        smallest = float(torch.linalg.svdvals(jacobians.double()).min())
        # The rounding of z grows on the way to the data. That of x has grown on the way to the
        # base, and shrinks again; sampled_log_prob shows it.
        allowed = 1e-3 / (torch.finfo(x.dtype).eps * (1 + float(z.detach().abs().max())))
    return Outcome(
        1 / smallest if smallest else math.inf,
        allowed,
        "largest growth of an error from base to data; rounding errors set the limit",
        "Regularise (jacobian_frobenius), bound the scales, or use float64; samples and "
        "reconstructions near these rows may be wrong.",
    )


def _nfe(case: Case) -> Outcome:
    case.need_ode()
    if not any(part.solver.is_adaptive for part in case.continuous):
        raise NotMeasuredError("the grid of the solver is fixed")
    with count_evaluations(case.flow) as nfe:
        case.log_prob()
    return Outcome(
        float(nfe.value),
        200.0 * len(case.continuous),
        "evaluations of the vector fields",
        "Train with kinetic_energy and jacobian_frobenius, standardise the data, or loosen the "
        "tolerance.",
    )


CHECKS: dict[str, Callable[[Case], Outcome]] = {
    measure.__name__.removeprefix("_"): measure
    for measure in (
        *(_hutchinson, _finite_differences, _standard_error, _gradient_modes, _tolerance),
        *(
            _path_weights,
            _round_trip,
            _ladj,
            _sampled_log_prob,
            _integral,
            _inverse_lipschitz,
            _nfe,
        ),
    )
}


def _with_gradients(case: Case, training: bool) -> Tensor:
    """Return the log-density of rows that require gradients, with the whole flow in one mode."""
    modes = [(part, part.training) for part in case.flow.modules()]
    case = dataclasses.replace(case, x=case.x.clone().requires_grad_())
    try:
        case.flow.train(training)
        with torch.enable_grad():
            return case.log_prob().detach()
    finally:
        for part, mode in modes:
            part.training = mode


def _jacobian(z: Tensor, x: Tensor) -> Tensor:
    """Return the Jacobian of each row of z in its row of x, ``(rows, entries of z, of x)``."""
    rows = [
        torch.autograd.grad(column, x, retain_graph=True, materialize_grads=True)[0]
        for column in z.flatten(1).sum(0)
    ]
    return torch.stack(rows, 1).flatten(2)


def _to_a_hundredth(part: ContinuousTransform) -> ContinuousTransform:
    """Return the transform with at most the accuracy that an integral needs."""
    if part.solver.accuracy is None:
        return part
    accuracy = max(0.01, part.solver.accuracy)
    return part.using(solver=dataclasses.replace(part.solver, accuracy=accuracy))


def _with_probes(part: ContinuousTransform) -> ContinuousTransform:
    if not isinstance(part.divergence, Hutchinson):
        return part
    return part.using(divergence=dataclasses.replace(part.divergence, probes=_PROBES))
