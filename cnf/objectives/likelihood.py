"""Maximum likelihood."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cnf.divergence import Divergence, Exact, Hutchinson
from cnf.flow import Flow
from cnf.ode import ODESolver
from cnf.regularizers import CostRate, needs_products
from cnf.transforms import ContinuousTransform
from cnf.vector_fields import VectorField

_FEW_FEATURES = 8


class MaximumLikelihood(nn.Module):
    """The mean negative log-likelihood of a minibatch, in nats, plus weighted costs of the paths.

    A gradient step needs less precision than a reported likelihood, so training has its own
    solver; the flow, and what its `log_prob` returns, stay as they are.

    Penalties belong to the objective: the flow, and what its `log_prob` returns, know none.

    Args:
        flow: The flow to train.
        regularizers: Weight of each regularizer, such as
            ``{kinetic_energy: 0.01, jacobian_frobenius: 0.01}`` of `cnf.regularizers`.
        solver: How the ODE is solved in training; None for dopri5 at tolerance 1e-3,
            differentiated by backprop.
        divergence: How the divergence is computed in training; None for the flow's own if it names
            one, else `Exact` where the field has at most 8 features, or a closed form and no
            regularizer that needs Jacobian products; `Hutchinson` with one Rademacher probe
            otherwise.

    Raises:
        TypeError: If `flow` is not a `Flow`, or a regularizer is not callable.
        ValueError: If a weight is negative or not finite.

    References:
        Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367
        Finlay et al. (2020), How to Train Your Neural ODE. https://arxiv.org/abs/2002.02798

    Example:
        >>> from cnf import CNF
        >>> MaximumLikelihood(CNF(2))(torch.zeros(3, 2))
        tensor(1.8379, grad_fn=<MeanBackward0>)
    """

    def __init__(
        self,
        flow: Flow,
        regularizers: Mapping[CostRate, float] | None = None,
        *,
        solver: ODESolver | None = None,
        divergence: Divergence | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a cnf.Flow; got {type(flow).__name__}.")
        self.flow = flow
        self.regularizers = dict(regularizers or {})
        for regularizer, weight in self.regularizers.items():
            if not callable(regularizer):
                raise TypeError(f"regularizers must be callable; got {regularizer!r}.")
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"regularizers must have finite weights, at least 0; got {weight}."
                )
        self.solver = solver or ODESolver(rtol=1e-3, atol=1e-3, gradient="backprop")
        self.divergence = divergence

    def forward(
        self,
        x: Float[Tensor, "batch *event"],
        context: Float[Tensor, "batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a minibatch; `generator` draws the probes.

        Raises:
            ValueError: If the minibatch is empty or does not fit the flow.
            ODEError: If the solve fails.
        """
        if x.numel() == 0:
            raise ValueError(f"x must have at least one row; got shape {tuple(x.shape)}.")
        chain = [part.rebuilt(self._for_training) for part in self.flow.chain]
        flow = Flow(chain, self.flow.base)
        z, ladj, costs = flow.to_base_with_costs(
            x, context, regularizers=list(self.regularizers), generator=generator
        )
        weights = x.new_tensor(list(self.regularizers.values()))
        return (weights @ costs - flow.base.log_prob(z) - ladj).mean()

    def _for_training(self, transform: ContinuousTransform) -> ContinuousTransform:
        products = any(map(needs_products, self.regularizers))
        divergence = (
            self.divergence
            or transform.divergence
            or affordable(transform.vector_field, products=products)
        )
        return transform.using(solver=self.solver, divergence=divergence)


def affordable(vector_field: VectorField, *, products: bool) -> Divergence:
    """The exact divergence where it is cheap, else an estimate from one Rademacher probe.

    Where Jacobian products are needed too, a closed form of the divergence alone saves nothing.
    """
    closed_form = vector_field.has_closed_form_divergence and not products
    return Exact() if closed_form or vector_field.features <= _FEW_FEATURES else Hutchinson()
