"""Costs of a path, to be integrated along it: how fast, how rough a flow is.

A regularizer maps a `FieldEvaluation` to the cost rate of each row, at least 0. Its integral over
the length of time is the cost of the path, positive whichever way time runs. Costs are sums over
the features of a row; RNODE's published code takes means over them, and half of the kinetic energy:
divide its weights by the number of features d (kinetic energy: by 2 d) to get the same loss per
feature.

References:
    Finlay et al. (2020), How to Train Your Neural ODE (RNODE). https://arxiv.org/abs/2002.02798
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from cnf.divergence import FieldEvaluation

CostRate = Callable[[FieldEvaluation], Tensor]


@dataclass(frozen=True)
class Regularizer:
    """A cost rate with a name, and whether it looks at the Jacobian products of an evaluation.

    A plain function from `FieldEvaluation` to rates serves as a regularizer too; it always gets
    the products.
    """

    name: str
    """Name in records and tables."""
    rate: CostRate
    """The cost rate of each row, ``(*batch,)``."""
    needs_products: bool
    """Whether it looks at `FieldEvaluation.products`."""

    def __call__(self, evaluation: FieldEvaluation) -> Float[Tensor, "*batch"]:
        """The cost rate of each row."""
        return self.rate(evaluation)


def _squared_speed(evaluation: FieldEvaluation) -> Tensor:
    return evaluation.velocity.square().sum(-1)


def _squared_jacobian(evaluation: FieldEvaluation) -> Tensor:
    if evaluation.products is None:
        raise ValueError("evaluation must hold products; ask for them with products=True.")
    return evaluation.share * evaluation.products.square().sum(-1).sum(0)


kinetic_energy = Regularizer("kinetic_energy", _squared_speed, needs_products=False)
"""‖v‖²: favours straight paths of constant speed (RNODE's first penalty)."""

jacobian_frobenius = Regularizer("jacobian_frobenius", _squared_jacobian, needs_products=True)
"""‖∂v/∂x‖²_F, exact with the exact divergence, else its unbiased estimate from the products with
the probes of the trace: favours smooth fields (RNODE's second penalty)."""


def needs_products(regularizer: CostRate) -> bool:
    """Whether the regularizer looks at the Jacobian products; of a plain function, yes."""
    return not isinstance(regularizer, Regularizer) or regularizer.needs_products
