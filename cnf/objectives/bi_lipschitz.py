"""Penalty on the Lipschitz constants of both directions of a flow."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.nn import functional

from cnf._checks import check_number, check_type, is_positive, refuse_overflow
from cnf._shapes import Context, Events
from cnf.objectives.base import Objective, weighted_mean
from cnf.transforms.support.constraints import covers


class BiLipschitz(Objective):
    r"""Another objective, plus a penalty that keeps both directions of the flow well-conditioned.

    .. math::
        \lambda \, \mathbb{E} \left[
        \frac{|F(x + \epsilon v) - F(x)|^2}{\epsilon^2}
        + \frac{|F^{-1}(z + \epsilon v') - F^{-1}(z)|^2}{\epsilon^2} \right],
        \qquad z = F(x)

    where F is the map from data to base, and v and v' are unit vectors in random directions, drawn
    for each row. Where F is linear with matrix A, the mean is
    :math:`(|A|^2 + |A^{-1}|^2) / D` with Frobenius norms and D features. Lengths are in the units
    of the data, also where the flow begins with a `Standardize`; so bring the data to about 1.

    The penalty is evaluated at the data, so it bounds nothing far away from them: an architecture
    with bounded slopes does, such as an `AdditiveCoupling`. A step takes one more evaluation
    of each direction, of twice the rows. A continuous flow is solved by its own solver, with the
    same steps for both points of a difference.

    Args:
        objective: The objective that is penalised; it takes data.
        weight: Weight :math:`\lambda` of the penalty.
        step: Length :math:`\epsilon` of the step, positive and finite.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, `objective` takes no data, or its flow is no
            bijection between real vectors.

    References:
        Behrmann et al. (2021), Understanding and Mitigating Exploding Inverses in Invertible Neural
        Networks. https://arxiv.org/abs/2006.09347

    Example:
        >>> from cnf import Flow, MaximumLikelihood
        >>> from cnf.transforms import Affine
        >>> objective = BiLipschitz(MaximumLikelihood(Flow([Affine(2)])), weight=0.5)
        >>> objective(torch.zeros(3, 2))  # log(2 pi) + 0.5 (1 + 1)
        tensor(2.8379, grad_fn=<AddBackward0>)
    """

    def __init__(self, objective: Objective, *, weight: float, step: float = 1e-2) -> None:
        check_type("objective", objective, Objective, "use MaximumLikelihood(flow)")
        super().__init__(objective.flow)
        if not objective.takes_data:
            raise ValueError(
                "objective must take data, at which the penalty is evaluated; "
                f"{type(objective).__name__} takes none."
            )
        real, transforms = constraints.real_vector, self.flow.transforms
        ends = (self.flow.support, self.flow.base.support)
        if not transforms.is_bijective or not all(covers(end, real) for end in ends):
            raise ValueError(
                "the flow of objective must be a bijection between real vectors, because points "
                f"are moved in every direction; its support is {ends[0]}, and is_bijective is "
                f"{transforms.is_bijective}. Map or dequantise the data before training."
            )
        self.objective = objective
        self.takes_targets = objective.takes_targets
        self.draws = objective.draws
        self.weight = check_number("weight", weight, "positive and finite", is_positive)
        self.step = check_number("step", step, "positive and finite", is_positive)

    @property
    def is_kept_whole(self) -> bool:
        """Whether the objective without the penalty is."""
        return self.objective.is_kept_whole

    def penalty(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> Float[Tensor, "*joint_batch"]:
        """Return the penalty of each row, without its weight.

        Args:
            x: Points, ``(*batch, *event_shape)``.
            context: Context of a conditional flow.
            generator: Source of the directions.

        Raises:
            TypeError: If `x` or `context` is not a tensor.
            ValueError: If an argument does not fit the flow.
            ODEError: If a solve fails.
        """
        pair = self._pair(x, len(self.flow.event_shape), generator)
        z, z_moved = self.flow.to_base(pair, context, generator=generator)
        pair = self._pair(z, 1, generator)
        # The chain, not the flow, which would call an infinite z an argument of the caller.
        back, back_moved = self.flow.transforms.to_data(pair, context, generator=generator)
        there = ((z_moved - z) / self.step).square().sum(-1)
        again = ((back_moved - back) / self.step).square().flatten(z.ndim - 1).sum(-1)
        penalty: Tensor = there + again
        refuse_overflow("x", ~penalty.detach().isfinite(), "the penalty", x.dtype)
        return penalty

    def _pair(self, x: Tensor, axes: int, generator: Generator | None) -> Tensor:
        """Stack points, with events of so many axes, on points one step away."""
        normal = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        unit = functional.normalize(normal.flatten(x.ndim - axes), dim=-1).view_as(x)
        return torch.stack([x, x + self.step * unit])

    def _loss(
        self,
        x: Tensor,
        context: Tensor | None,
        weight: Tensor | None,
        draws: int | None,
        generator: Generator | None,
        target: Any = None,
    ) -> Tensor:
        loss: Tensor = self.objective(
            x, context, target=target, weight=weight, draws=draws, generator=generator
        )
        penalty = self.penalty(x, context, generator=generator)
        return loss + self.weight * weighted_mean(penalty, weight)
