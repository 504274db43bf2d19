"""Regularizers of continuous flows: costs that are integrated along the path.

A regularizer maps a `FieldEvaluation` to the cost rate of each row, at least 0. Its integral over
time is the cost of the path, positive in both directions of time. Costs are sums over the features
of a row, beside a likelihood in nats for each row. RNODE's code takes means over the features, and
half of the kinetic energy, beside bits per dimension: multiply its weights by ln 2 (kinetic energy:
by half of ln 2) to get the weights here, for any number of features.

References:
    Finlay et al. (2020), How to Train Your Neural ODE (RNODE). https://arxiv.org/abs/2002.02798
    Onken et al. (2021), OT-Flow. https://arxiv.org/abs/2006.00104
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cnf._shapes import Values
from cnf.divergence import FieldEvaluation
from cnf.vector_fields import PotentialField

CostRate = Callable[[FieldEvaluation], Tensor]


@dataclass(frozen=True)
class Regularizer:
    """Cost rate with a name, which may use the Jacobian products of an evaluation.

    A plain function from `FieldEvaluation` to rates is a regularizer too; it always gets the
    products.
    """

    name: str
    """Name in records and tables."""
    rate: CostRate
    """The cost rate of each row, ``(*batch,)``."""
    needs_products: bool
    """Whether it uses `FieldEvaluation.products`."""

    def __call__(self, evaluation: FieldEvaluation) -> Values:
        """Return the cost rate of each row."""
        return self.rate(evaluation)


def _squared_speed(evaluation: FieldEvaluation) -> Tensor:
    return evaluation.velocity.square().sum(-1)


def _squared_jacobian(evaluation: FieldEvaluation) -> Tensor:
    if evaluation.products is None:
        raise ValueError("evaluation must hold products; ask for them with products=True.")
    return evaluation.weight * evaluation.products.square().sum(-1).sum(0)


def _squared_derivative(evaluation: FieldEvaluation, dt: float) -> Tensor:
    derivative = evaluation.vector_field.velocity_derivative(
        evaluation.t, evaluation.x, dt, evaluation.velocity, evaluation.context
    )
    return derivative.square().sum(-1)


def _squared_directional_derivative(evaluation: FieldEvaluation) -> Tensor:
    return _squared_derivative(evaluation, dt=0.0)


def _squared_acceleration(evaluation: FieldEvaluation) -> Tensor:
    return _squared_derivative(evaluation, dt=1.0)


def _hjb_residual(evaluation: FieldEvaluation) -> Tensor:
    field = evaluation.vector_field
    if not isinstance(field, PotentialField):
        raise ValueError(f"hjb_residual needs a PotentialField; got {type(field).__name__}.")
    rate = field.potential_rate(evaluation.t, evaluation.x, evaluation.context)
    return (rate - 0.5 * _squared_speed(evaluation)).abs()


kinetic_energy = Regularizer("kinetic_energy", _squared_speed, needs_products=False)
"""‖v‖²: favours straight paths of constant speed (RNODE's first penalty)."""

jacobian_frobenius = Regularizer("jacobian_frobenius", _squared_jacobian, needs_products=True)
"""‖∂v/∂x‖²_F, exact with the exact divergence, else its unbiased estimate from the products with
the probes of the trace: favours smooth fields (RNODE's second penalty)."""

directional_derivative = Regularizer(
    "directional_derivative", _squared_directional_derivative, needs_products=False
)
"""‖(∂v/∂x) v‖²: the change of the velocity along the path, without the time dependence of the
field. It, and each of the next two, costs one evaluation more."""

total_derivative = Regularizer("total_derivative", _squared_acceleration, needs_products=False)
"""‖∂v/∂t + (∂v/∂x) v‖², the squared acceleration: zero for straight paths of constant speed."""

hjb_residual = Regularizer("hjb_residual", _hjb_residual, needs_products=False)
"""Absolute residual of the Hamilton-Jacobi-Bellman equation ∂Φ/∂t = ½ ‖∇Φ‖², which the potential Φ
of an optimal transport solves (OT-Flow's penalty); for a `PotentialField` only. The equation is the
same in both directions of time."""


def needs_products(regularizer: CostRate) -> bool:
    """Return whether the regularizer uses the Jacobian products; True for a plain function."""
    return not isinstance(regularizer, Regularizer) or regularizer.needs_products
