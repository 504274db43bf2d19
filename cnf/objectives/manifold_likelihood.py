"""Likelihood on a learned surface, beside the distance of the data from it."""

import math

import torch
from torch import Tensor

from cnf._checks import check_number
from cnf.divergence import Divergence
from cnf.flows.flow import Flow
from cnf.objectives.base import Objective, weighted_mean
from cnf.objectives.solving import for_training, training_divergence, training_solver
from cnf.ode import ODESolver
from cnf.transforms import Chain, ContinuousTransform


class ManifoldLikelihood(Objective):
    r"""Density of the projections of the rows on a surface, and their distance from it.

    For a flow whose likelihood is "on_manifold", as with a `cnf.transforms.ConformalEmbedding`,
    the loss of a row x with the projection :math:`\hat x` is

    .. math:: -\log p(\hat x) + w \, |x - \hat x|^2

    in nats. The likelihood alone gains from a surface that crumples the data into a small area, far
    from them; only the distance keeps the surface at the data. A small weight w gives densities of
    misplaced projections, and a large weight gives a surface near the data, with a density that is
    learned late. For data with noise of standard deviation s about the surface, 1 / (2 s²) weighs
    the distance as a Gaussian does.

    Args:
        flow: The flow to train.
        weight: Weight w of the mean squared distance.
        solver: Solver in training, as in `MaximumLikelihood`, of the continuous transforms.
        divergence: Divergence in training, as in `MaximumLikelihood`.

    Raises:
        TypeError: If `flow` is not a `Flow`.
        ValueError: If its likelihood is not "on_manifold", or `weight` is negative or not finite.

    References:
        Brehmer & Cranmer (2020), Flows for simultaneous manifold learning and density estimation.
        https://arxiv.org/abs/2003.13913
        Ross & Cresswell (2021), Conformal Embedding Flows. https://arxiv.org/abs/2106.05275

    Example:
        >>> from cnf.transforms import Affine, ConformalEmbedding, Similarity
        >>> flow = Flow([ConformalEmbedding([Similarity(2)], base_features=1), Affine(1)])
        >>> ManifoldLikelihood(flow, weight=1.0)(torch.tensor([[0.0, 2.0]]))  # log(2 pi) / 2 + 4
        tensor(4.9189, grad_fn=<MeanBackward0>)
    """

    def __init__(
        self,
        flow: Flow,
        *,
        weight: float = 100.0,
        solver: ODESolver | None = None,
        divergence: Divergence | None = None,
    ) -> None:
        super().__init__(flow)
        if flow.likelihood != "on_manifold":
            raise ValueError(
                "flow must cover a surface alone, as with a ConformalEmbedding; its likelihood is "
                f"{flow.likelihood!r}. Use MaximumLikelihood."
            )
        self.weight = check_number(
            "weight", weight, "finite and at least 0", lambda number: 0 <= number < math.inf
        )
        self.solver = training_solver(solver)
        self.divergence = training_divergence(divergence)

    def _loss(
        self,
        x: Tensor,
        context: Tensor | None,
        weight: Tensor | None,
        draws: int | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        flow = self.flow.map_continuous(self._for_training)
        surface = flow.transforms.onto_surface
        rest = flow.transforms[len(surface) :]

        def given(chain: Chain) -> Tensor | None:
            return context if chain.context_features else None

        z = surface.to_base(x, given(surface), generator=generator)
        projection, stretch = surface.to_data_and_ladj(z, given(surface), generator=generator)
        z, ladj = rest.to_base_and_ladj(z, given(rest), generator=generator)
        log_prob = flow.base.log_prob(z, context, generator=generator) + ladj - stretch
        squares = (x - projection).square().flatten(1).sum(-1)
        return weighted_mean(self.weight * squares - log_prob, weight)

    def _for_training(self, transform: ContinuousTransform) -> ContinuousTransform:
        return for_training(transform, solver=self.solver, divergence=self.divergence)
