"""Energy-based model: a network is the log-density up to a constant, which a flow measures."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from cnf._checks import check_events, check_type, reference_tensor, rows_inside
from cnf._shapes import Events
from cnf.bases import Likelihood
from cnf.flows.flow import Flow
from cnf.flows.unnormalized.importance import LogNormalizer, log_normalizer
from cnf.flows.unnormalized.target import log_density_of_target
from cnf.transforms.support.constraints import spread


class EnergyModel(nn.Module):
    r"""Density model by a network of any form, up to a constant.

    .. math:: \log p(x) = D(x) - \log Z, \qquad Z = \mathbb{E}_{x \sim q} [\exp D(x) / q(x)]

    with Z by importance sampling from a flow q, the proposal. `EnergyObjective` trains both. The
    log of the estimate of Z is too small on average, so that log-densities are too large: the
    likelihood is a biased estimate, with the standard error that `estimate_normalizer` returns.

    Args:
        energy: Module that returns D(x), ``(*batch,)``, for x of shape ``(*batch, features)``. It
            must fall off, such as ``network(x) - x.square().sum(-1) / 8``, or Z is infinite.
        proposal: Flow with an exact likelihood and no context. Its tails must not be lighter than
            the model's.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the flow is conditional or has no exact likelihood.

    References:
        Ben-Dov et al. (2024), Adversarial Likelihood Estimation With One-Way Flows.
        https://arxiv.org/abs/2307.09882

    Example:
        >>> from cnf.transforms import Affine
        >>> class Quadratic(nn.Module):
        ...     def forward(self, x):
        ...         return -0.5 * x.square().sum(-1)
        >>> model = EnergyModel(Quadratic(), Flow([Affine(2)]))
        >>> found = model.estimate_normalizer(100)
        >>> model.log_prob(torch.zeros(2))  # -log(2 pi)
        tensor(-1.8379)
    """

    def __init__(self, energy: nn.Module, proposal: Flow) -> None:
        super().__init__()
        check_type("energy", energy, nn.Module, "wrap a function in a torch.nn.Module")
        check_type("proposal", proposal, Flow, "wrap transforms in Flow([...])")
        if proposal.likelihood != "exact" or proposal.context_features:
            raise ValueError(
                "proposal must have an exact likelihood and no context; its likelihood is "
                f"{proposal.likelihood!r}, and context_features={proposal.context_features}."
            )
        self.energy = energy
        self.proposal = proposal
        like = reference_tensor(proposal)
        self.register_buffer("log_z", like.new_tensor(torch.nan))
        self.log_z: Tensor
        """Log of Z, in nats, by the last `estimate_normalizer`; NaN before the first."""

    @property
    def likelihood(self) -> Likelihood:
        """A biased estimate."""
        return "biased_estimate"

    def log_density(self, x: Events) -> Float[Tensor, "*joint_batch"]:
        """Return D(x), in nats.

        Raises:
            TypeError: If the energy returns no tensor.
            ValueError: If x does not fit, or the energy returns another shape, NaN or inf.
        """
        check_events("x", x, self.proposal.event_shape, like=reference_tensor(self.proposal))
        batch = x.shape[: x.ndim - len(self.proposal.event_shape)]
        return log_density_of_target(self.energy, x, None, batch, name="energy")

    @torch.no_grad()
    def estimate_normalizer(
        self, draws: int = 10_000, *, generator: Generator | None = None
    ) -> LogNormalizer:
        """Estimate log Z with its standard error, and keep it for `log_prob`.

        It must be called again after training. A warning says where the proposal has lighter tails.

        Args:
            draws: Number of draws of the proposal.
            generator: Source of the draws.

        Raises:
            ValueError: If `draws` is less than 2, or the energy is not finite at a draw.
        """
        energy: Callable[..., Tensor] = self.energy
        found = log_normalizer(energy, self.proposal, draws, generator=generator)
        self.log_z.copy_(found.log_z)
        return found

    def log_prob(self, x: Events) -> Float[Tensor, "*joint_batch"]:
        """Return the estimated log-density, in nats; -inf outside of the support of the proposal.

        Raises:
            ValueError: If there is no estimate of Z yet, or x does not fit.
        """
        if bool(self.log_z.isnan()):
            raise ValueError(
                "log_z must be known for a log-density; call model.estimate_normalizer() first."
            )
        check_events("x", x, self.proposal.event_shape, like=reference_tensor(self.proposal))
        inside = rows_inside(x, self.proposal.support)
        return spread(inside, self.log_density(x[inside]) - self.log_z, elsewhere=-math.inf)
