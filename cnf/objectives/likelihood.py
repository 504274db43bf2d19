"""Maximum likelihood."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cnf.divergence import Divergence, Exact, Hutchinson
from cnf.flow import Flow
from cnf.ode import ODESolver
from cnf.transforms import ContinuousTransform, Transform
from cnf.vector_fields import VectorField

_FEW_FEATURES = 8


class MaximumLikelihood(nn.Module):
    """The mean negative log-likelihood of a minibatch, in nats.

    A gradient step needs less precision than a reported likelihood, so training has its own
    solver; the flow, and what its `log_prob` returns, stay as they are.

    Args:
        flow: The flow to train.
        solver: How the ODE is solved in training; None for dopri5 at tolerance 1e-3,
            differentiated by backprop.
        divergence: How the divergence is computed in training; None for the flow's own if it names
            one, else `Exact` where the field has a closed form or at most 8 features, and
            `Hutchinson` with one Rademacher probe otherwise.

    Raises:
        TypeError: If `flow` is not a `Flow`.

    References:
        Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367

    Example:
        >>> from cnf import CNF
        >>> MaximumLikelihood(CNF(2))(torch.zeros(3, 2))
        tensor(1.8379, grad_fn=<NegBackward0>)
    """

    def __init__(
        self,
        flow: Flow,
        *,
        solver: ODESolver | None = None,
        divergence: Divergence | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a cnf.Flow; got {type(flow).__name__}.")
        self.flow = flow
        self.solver = solver or ODESolver(rtol=1e-3, atol=1e-3, gradient="backprop")
        self.divergence = divergence

    def forward(
        self,
        x: Float[Tensor, "batch features"],
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
        flow = Flow(map(self._for_training, self.flow.chain), self.flow.base)
        return -flow.log_prob(x, context, generator=generator).mean()

    def _for_training(self, transform: Transform) -> Transform:
        if not isinstance(transform, ContinuousTransform):
            return transform
        divergence = self.divergence or transform.divergence or affordable(transform.vector_field)
        return transform.using(solver=self.solver, divergence=divergence)


def affordable(vector_field: VectorField) -> Divergence:
    """The exact divergence where it is cheap, else an estimate from one Rademacher probe."""
    cheap = vector_field.has_closed_form_divergence or vector_field.features <= _FEW_FEATURES
    return Exact() if cheap else Hutchinson()
