"""Solver and divergence in training."""

from cnf._checks import check_type
from cnf.divergence import Divergence, Exact, Hutchinson
from cnf.ode import ODESolver
from cnf.transforms import ContinuousTransform

_FEW_FEATURES = 8


def training_solver(solver: ODESolver | None) -> ODESolver:
    """Return the checked solver of an objective; for None, the default one at 1e-2."""
    if solver is None:
        return ODESolver(rtol=1e-2, atol=1e-2)
    check_type("solver", solver, ODESolver, "use ODESolver(method=...)")
    return solver


def training_divergence(divergence: Divergence | None) -> Divergence | None:
    """Return the checked divergence of an objective, or None."""
    if divergence is not None:
        check_type("divergence", divergence, Divergence, "use Exact() or Hutchinson()")
    return divergence


def for_training(
    transform: ContinuousTransform,
    *,
    solver: ODESolver,
    divergence: Divergence | None,
    products: bool = False,
) -> ContinuousTransform:
    """Return the transform with the solver and divergence of training; it shares every parameter.

    For None, the divergence is the transform's own if it has one, else `Exact` where it is cheap,
    else `Hutchinson`. A closed form saves nothing if Jacobian `products` are needed too.
    """
    field = transform.vector_field
    cheap = field.features <= _FEW_FEATURES or (field.has_closed_form_divergence and not products)
    chosen = divergence or transform.divergence or (Exact() if cheap else Hutchinson())
    return transform.using(solver=solver, divergence=chosen)
