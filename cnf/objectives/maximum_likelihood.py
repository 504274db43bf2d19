"""Maximum likelihood."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from cnf._checks import check_number
from cnf.divergence import Divergence
from cnf.flows.flow import Flow
from cnf.objectives.base import Objective, weighted_mean
from cnf.objectives.solving import for_training, training_divergence, training_solver
from cnf.ode import ODESolver
from cnf.regularizers import CostRate, needs_products
from cnf.transforms import ContinuousTransform
from cnf.transforms.continuous import without_costs


class MaximumLikelihood(Objective):
    """Mean negative log-likelihood of a minibatch, in nats, plus weighted costs of the paths.

    A gradient step needs less precision than a reported likelihood, so training has its own solver.
    Solver and regularizers do not change `log_prob` of the flow.

    Args:
        flow: The flow to train.
        regularizers: Weight of each regularizer, such as
            ``{kinetic_energy: 0.01, jacobian_frobenius: 0.01}`` of `cnf.regularizers`.
        solver: Solver in training; None for `ODESolver(rtol=1e-2, atol=1e-2)`.
        divergence: Divergence in training; None for the flow's own if it has one, else `Exact` for
            a field with at most 8 features, or with a closed form and no regularizer that needs
            Jacobian products, else `Hutchinson` with one Rademacher probe.
        random_end_time: STEER's half-width b, in [0, 1): each solve from data to base stops at a
            time drawn uniformly from [-b, b], in units of the end time, instead of 0.

    Raises:
        TypeError: If `flow` is not a `Flow`, or a regularizer is not callable.
        ValueError: If a weight is negative or not finite, `random_end_time` is out of range, the
            flow covers only a surface, or regularizers do not see an ODE of the flow.

    References:
        Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367
        Finlay et al. (2020), How to Train Your Neural ODE. https://arxiv.org/abs/2002.02798
        Ghosh et al. (2020), STEER: Simple Temporal Regularization for Neural ODEs.
        https://arxiv.org/abs/2006.10711

    Example:
        >>> from cnf import CNF
        >>> MaximumLikelihood(CNF(2, skip=False))(torch.zeros(3, 2))
        tensor(1.8379, grad_fn=<MeanBackward0>)
    """

    def __init__(
        self,
        flow: Flow,
        regularizers: Mapping[CostRate, float] | None = None,
        *,
        solver: ODESolver | None = None,
        divergence: Divergence | None = None,
        random_end_time: float = 0.0,
    ) -> None:
        super().__init__(flow)
        if flow.likelihood == "on_manifold":
            raise ValueError(
                "flow must have a density where the data are; this one has it on its surface "
                "alone, to which its likelihood does not draw the surface. Train it with "
                "ManifoldLikelihood(flow)."
            )
        if regularizers is not None and not isinstance(regularizers, Mapping):
            raise TypeError(
                "regularizers must be weights by regularizer, such as {kinetic_energy: 0.01}; "
                f"got {regularizers!r}."
            )
        self.regularizers = {} if regularizers is None else dict(regularizers)
        for regularizer, weight in self.regularizers.items():
            if not callable(regularizer):
                raise TypeError(f"regularizers must be callable; got {regularizer!r}.")
            self.regularizers[regularizer] = check_number(
                "each weight of regularizers",
                weight,
                "finite and at least 0",
                lambda number: 0 <= number < math.inf,
            )
        hidden = {name for name, _ in without_costs(flow.transforms)}
        if any(isinstance(part, ContinuousTransform) for part in flow.base.modules()):
            hidden.add(type(flow.base).__name__)
        if self.regularizers and hidden:
            raise ValueError(
                f"regularizers must see every path; the ODEs inside of {', '.join(sorted(hidden))} "
                "follow paths of their own. Leave them out, or put the ODEs among the transforms "
                "of the flow."
            )
        self.solver = training_solver(solver)
        self.divergence = training_divergence(divergence)
        self.random_end_time = check_number(
            "random_end_time", random_end_time, "in [0, 1)", lambda share: 0 <= share < 1
        )

    def _loss(
        self,
        x: Tensor,
        context: Tensor | None,
        weight: Tensor | None,
        draws: int | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        flow = self.flow.map_continuous(partial(self._for_training, generator=generator))
        # The chain, not the flow, which would check the rows again.
        z, ladj, costs = flow.transforms.to_base_with_costs(
            x, context, regularizers=list(self.regularizers), generator=generator
        )
        losses = -flow.base.log_prob(z, context, generator=generator) - ladj
        # Not a matrix product, which autocast would round.
        for each, cost in zip(self.regularizers.values(), costs, strict=True):
            losses = losses + each * cost
        return weighted_mean(losses, weight)

    def _for_training(
        self, transform: ContinuousTransform, *, generator: torch.Generator | None
    ) -> ContinuousTransform:
        products = any(map(needs_products, self.regularizers))
        transform = for_training(
            transform, solver=self.solver, divergence=self.divergence, products=products
        )
        if not self.random_end_time:
            return transform
        device = "cpu" if generator is None else generator.device
        draw = torch.rand((), generator=generator, device=device).item()
        shift = (1 - transform.start_time) * self.random_end_time * (2 * draw - 1)
        return transform.using(start_time=transform.start_time + shift)
