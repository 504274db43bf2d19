"""Training of an energy-based model together with the flow that measures its integral."""

from functools import partial

import torch
from torch import Generator, Tensor

from cnf._checks import check_count, check_type
from cnf.flows.unnormalized.energy import EnergyModel
from cnf.flows.unnormalized.target import log_density_of_target
from cnf.metrics import log_mean_exp
from cnf.objectives.base import Objective, weighted_mean


class EnergyObjective(Objective):
    r"""Loss of an `EnergyModel`: the network by maximum likelihood, its proposal by reverse KL.

    With draws x' of the proposal q, and weights :math:`w = \exp D(x') / q(x')`,

    .. math:: -\mathbb{E} [D(x)] + \log \overline{w}
        \; + \; \mathbb{E}_{x' \sim q} [\log q(x') - D(x')]

    in nats. The first two terms train D alone: they are its negative log-likelihood, from below.
    The last trains q alone, towards p; its entropy, which the generators of adversarial training
    lack, keeps it spread out.

    Args:
        model: The model.
        draws: Number of draws of the proposal in a step.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `draws` is less than 2.

    References:
        Ben-Dov et al. (2024), Adversarial Likelihood Estimation With One-Way Flows.
        https://arxiv.org/abs/2307.09882

    Example:
        >>> from cnf import Flow
        >>> from cnf.flows import EnergyModel
        >>> from cnf.transforms import Affine
        >>> class Quadratic(torch.nn.Module):
        ...     def forward(self, x):
        ...         return -0.5 * x.square().sum(-1)
        >>> objective = EnergyObjective(EnergyModel(Quadratic(), Flow([Affine(2)])), draws=4)
        >>> objective(torch.zeros(8, 2))  # log(2 pi) - log(2 pi)
        tensor(0., grad_fn=<AddBackward0>)
    """

    def __init__(self, model: EnergyModel, *, draws: int = 512) -> None:
        check_type("model", model, EnergyModel, "use EnergyModel(energy, proposal)")
        super().__init__(model.proposal)
        self.model = model
        self.draws = check_count("draws", draws, least=2)

    @property
    def is_kept_whole(self) -> bool:
        """False: the loss is too low where the proposal is poor, so its lowest is not the best.

        `fit` keeps the last network, and the proposal that is the best density of validation rows:
        any proposal measures any network.
        """
        return False

    def _loss(
        self,
        x: Tensor,
        context: Tensor | None,
        weight: Tensor | None,
        draws: int,
        generator: Generator | None,
    ) -> Tensor:
        energy = self.model.energy
        drawn, log_q = self.flow.rsample_and_log_prob(draws, generator=generator)
        evaluate = partial(log_density_of_target, context=None, name="energy")
        of_draws = evaluate(energy, drawn.detach(), batch=log_q.shape)
        of_data = evaluate(energy, x, batch=x.shape[:1])
        of_network = log_mean_exp(of_draws - log_q.detach()) - weighted_mean(of_data, weight)

        def held(points: Tensor) -> Tensor:
            tensors = {name: part.detach() for name, part in energy.named_parameters()}
            value: Tensor = torch.func.functional_call(energy, tensors, (points,))
            return value

        target = evaluate(held, drawn, batch=log_q.shape)
        return of_network + (log_q - target).mean()
