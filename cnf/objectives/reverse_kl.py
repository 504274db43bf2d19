"""Reverse KL divergence: variational inference of an unnormalised target, without data."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_count
from cnf._shapes import Context
from cnf.divergence import Divergence
from cnf.flows.flow import Flow
from cnf.flows.unnormalized.target import refuse_targets
from cnf.objectives.base import Objective
from cnf.objectives.solving import for_training, training_divergence, training_solver
from cnf.ode import ODESolver
from cnf.transforms import ContinuousTransform

_DRAWS = 512

_WEIGHED = ("exact", "estimate", "lower_bound")
"""Kinds of likelihood whose draws have weights."""


class ReverseKL(Objective):
    r"""Reverse KL divergence of the flow q to a target p with an unnormalised log-density.

    .. math:: \mathbb{E}_{x \sim q} [\log q(x) - \log \tilde p(x)] = \mathrm{KL}(q \| p) - \log Z
        \quad\text{for}\quad p = \tilde p / Z

    in nats, estimated from draws of the flow with reparametrised gradients. It needs no data: a
    target may be a posterior with known likelihood and prior. The loss is mode-seeking: it does not
    see parts of p without mass of q. `log_weights` show the fit where q has mass. For a flow with
    random steps, such as `Langevin`, the loss is minus the mean log-weight of its paths, a bound of
    the divergence from above.

    Args:
        flow: The flow to train.
        log_density: Unnormalised log-density of the target, in nats: ``log_density(x)``, or
            ``log_density(x, context)`` for a conditional flow, with x of shape ``(draws, *batch,
            *event_shape)`` and the context ``(draws, *batch, context_features)``, returns shape
            ``(draws, *batch)``. It must be differentiable in x, and finite at all draws of the
            flow, else a `TargetError` is raised: for a target with bounded support, the first
            transforms of the flow must map into it, as `Logit` does.
        draws: Number of draws in a step, for each context if there are contexts; None for 512, or
            for 1 of a conditional flow.
        solver: Solver in training; None for `ODESolver(rtol=1e-2, atol=1e-2)`.
        divergence: Divergence in training; None as for `MaximumLikelihood`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `draws` is less than 1, or the likelihood of the flow is neither exact nor an
            unbiased estimate.

    References:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows.
        https://arxiv.org/abs/1505.05770

    Example:
        >>> from cnf import CNF
        >>> flow = CNF(2, skip=False)
        >>> objective = ReverseKL(flow, lambda x: -0.5 * x.square().sum(-1), draws=4)
        >>> objective()
        tensor(-1.8379, grad_fn=<MeanBackward0>)
    """

    takes_data = False

    def __init__(
        self,
        flow: Flow,
        log_density: Callable[..., Tensor],
        *,
        draws: int | None = None,
        solver: ODESolver | None = None,
        divergence: Divergence | None = None,
    ) -> None:
        super().__init__(flow)
        if flow.likelihood not in _WEIGHED or flow.support.is_discrete:
            kind = "on integers" if flow.support.is_discrete else f"{flow.likelihood!r}"
            raise ValueError(
                "flow must have weights of its draws, exact or estimated without bias, with "
                f"gradients; its likelihood is {kind}. Leave out transforms such as Dequantize, "
                "and truncate no series: log_det=RussianRoulette()."
            )
        if not callable(log_density):
            raise TypeError(f"log_density must be callable; got {type(log_density).__name__}.")
        self.log_density = log_density
        if draws is None:
            draws = 1 if flow.context_features else _DRAWS
        self.draws = check_count("draws", draws)
        self.solver = training_solver(solver)
        self.divergence = training_divergence(divergence)

    def _loss(
        self,
        x: Tensor | None,
        context: Tensor | None,
        weight: Tensor | None,
        draws: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        flow = self.flow.map_continuous(self._for_training)
        _, log_weight = flow.rsample_and_log_weight(
            self.log_density, draws, context, generator=generator
        )
        refuse_targets(~log_weight.detach().isfinite(), "finite")
        return (-log_weight).mean()

    @torch.no_grad()
    def log_weights(
        self,
        draws: int,
        context: Context | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "draws *batch"]:
        r"""Return log importance weights :math:`\log \tilde p(x) / q(x)` of new draws x, in nats.

        `Flow.rsample_and_log_weight` makes them, with the solver of the flow. See
        `cnf.metrics.effective_sample_size`; `cnf.metrics.log_mean_exp` of them estimates log Z.
        Here the target may be zero at draws; the log-weight is then -inf.

        Raises:
            TypeError: If `draws` is not an int.
            ValueError: If `draws` is less than 1, the context does not fit the flow, or
                `log_density` returns another shape, NaN or inf.
            ODEError: If the solve fails.
        """
        check_count("draws", draws)
        return self.flow.rsample_and_log_weight(
            self.log_density, draws, context, generator=generator
        )[1]

    def _for_training(self, transform: ContinuousTransform) -> ContinuousTransform:
        return for_training(transform, solver=self.solver, divergence=self.divergence)
