"""How the ODE of a flow is solved in training: less precisely than for a reported likelihood."""

from cnf._checks import check_type
from cnf.divergence import Divergence, Exact, Hutchinson
from cnf.ode import ODESolver
from cnf.transforms import ContinuousTransform
from cnf.vector_fields import VectorField

_FEW_FEATURES = 8


def training_solver(solver: ODESolver | None) -> ODESolver:
    """The solver of an objective; None is for dopri5, loose, differentiated by backprop.

    Raises:
        TypeError: If `solver` is of another type.
    """
    if solver is None:
        return ODESolver(rtol=1e-3, atol=1e-3, gradient="backprop")
    check_type("solver", solver, ODESolver, "use ODESolver(method=...)")
    return solver


def training_divergence(divergence: Divergence | None) -> Divergence | None:
    """The divergence of an objective, if it names one.

    Raises:
        TypeError: If it is of another type.
    """
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
    """The same transform as it is solved in training.

    Args:
        transform: The transform, whose parameters are shared.
        solver: Solver of the objective.
        divergence: Divergence of the objective; None for the transform's own if it names one, else
            what is `affordable`.
        products: Whether Jacobian products are needed too.
    """
    chosen = (
        divergence or transform.divergence or affordable(transform.vector_field, products=products)
    )
    return transform.using(solver=solver, divergence=chosen)


def affordable(vector_field: VectorField, *, products: bool) -> Divergence:
    """The exact divergence where it is cheap, else an estimate from one Rademacher probe.

    Where Jacobian products are needed too, a closed form of the divergence alone saves nothing.
    """
    closed_form = vector_field.has_closed_form_divergence and not products
    return Exact() if closed_form or vector_field.features <= _FEW_FEATURES else Hutchinson()
