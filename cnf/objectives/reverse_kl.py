"""Reverse KL divergence: variational inference of an unnormalised target, without data."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_count
from cnf._row_names import name_rows
from cnf._shapes import Context
from cnf.divergence import Divergence
from cnf.flows.flow import Flow
from cnf.objectives.base import Objective
from cnf.objectives.solving import for_training, training_divergence, training_solver
from cnf.ode import ODESolver
from cnf.transforms import ContinuousTransform

_DRAWS = 512


class TargetError(ValueError):
    """The log-density of a target is not finite at draws of the flow."""


class ReverseKL(Objective):
    r"""Reverse KL divergence of the flow q to a target p with an unnormalised log-density.

    .. math:: \mathbb{E}_{x \sim q} [\log q(x) - \log \tilde p(x)] = \mathrm{KL}(q \| p) - \log Z
        \quad\text{for}\quad p = \tilde p / Z

    in nats, estimated from draws of the flow with reparametrised gradients. It needs no data: a
    target may be a posterior with known likelihood and prior. The loss is mode-seeking: it does not
    see parts of p without mass of q. `log_weights` show the fit where q has mass.

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
        if flow.likelihood not in ("exact", "estimate"):
            raise ValueError(
                "flow must have a log-density of its draws, exact or estimated without bias; its "
                f"likelihood is {flow.likelihood!r}. Leave out transforms such as Augment and "
                "Dequantize, and truncate no series: log_det=RussianRoulette()."
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
        points, log_prob = flow.rsample_and_log_prob(draws, context, generator=generator)
        target = self._target(points, log_prob, context)
        _refuse(~target.detach().isfinite(), "finite")
        return (log_prob - target).mean()

    @torch.no_grad()
    def log_weights(
        self,
        draws: int,
        context: Context | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "draws *batch"]:
        r"""Return log importance weights :math:`\log \tilde p(x) / q(x)` of new draws x, in nats.

        They use the solver of the flow, and are unbiased only if its likelihood is exact. See
        `cnf.metrics.effective_sample_size`; `cnf.metrics.log_mean_exp` of them estimates log Z.
        Here the target may be zero at draws; the log-weight is then -inf.

        Raises:
            TypeError: If `draws` is not an int.
            ValueError: If `draws` is less than 1, the context does not fit the flow, or
                `log_density` returns another shape, NaN or inf.
            ODEError: If the solve fails.
        """
        check_count("draws", draws)
        x, log_prob = self.flow.sample_and_log_prob(draws, context, generator=generator)
        target = self._target(x, log_prob, context)
        _refuse(target.isnan() | target.isposinf(), "finite or -inf")
        return target - log_prob

    def _for_training(self, transform: ContinuousTransform) -> ContinuousTransform:
        return for_training(transform, solver=self.solver, divergence=self.divergence)

    def _target(self, x: Tensor, log_prob: Tensor, context: Tensor | None) -> Tensor:
        """Return the log-density of the target at draws, in the shape of `log_prob`."""
        given = () if context is None else (context.expand(*log_prob.shape, context.shape[-1]),)
        # A network may be coarse in training; the target may not.
        with torch.autocast(x.device.type, enabled=False):
            value = self.log_density(x, *given)
        if not isinstance(value, Tensor):
            raise TypeError(f"log_density must return a tensor; got {type(value).__name__}.")
        if value.shape != log_prob.shape:
            raise ValueError(
                f"log_density must return shape {tuple(log_prob.shape)} for x of shape "
                f"{tuple(x.shape)}; got {tuple(value.shape)}."
            )
        return value


def _refuse(bad: Tensor, expected: str) -> None:
    if bad.any():
        raise TargetError(
            f"log_density must be {expected} wherever the flow draws; got other values in draws, "
            f"{name_rows(bad)}. If the target has bounded support, put a transform such as Logit "
            "first in the flow, so that its draws lie inside."
        )
