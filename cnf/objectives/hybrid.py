"""Hybrid of a classifier and a density."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cnf._checks import check_count, check_number, reference_tensor, refuse_rows
from cnf._shapes import Context, Events
from cnf.divergence import Divergence
from cnf.flows.flow import Flow
from cnf.objectives.base import Objective, weighted_mean
from cnf.objectives.solving import for_training, training_divergence, training_solver
from cnf.ode import ODESolver
from cnf.transforms import ContinuousTransform


class HybridObjective(Objective):
    r"""Hybrid model: one flow is the features of a classifier, and a density that also samples.

    The logits of the classes are a linear map, the `head`, of the base point z of x. The loss of a
    row x with the label y, in nats, is

    .. math:: -\log p(y \mid z(x)) - \lambda \log p(x)

    from one evaluation of z and the ladj. With :math:`\lambda = 1` it is minus the joint
    log-density of x and y; with less, the labels count more, for a density often has many more nats
    to gain than a classifier. `fit` takes ``(x, labels)``.

    The head starts at zero, where all classes have the same probability. It is trained with the
    flow, and saved by `state_dict` of the objective.

    Args:
        flow: The flow to train.
        classes: Number of classes; labels are integers from 0 to `classes` - 1.
        likelihood_weight: The weight :math:`\lambda` of the log-density; None for 1 / features.
        solver: Solver in training; None for `ODESolver()`.
        divergence: Divergence in training, as in `MaximumLikelihood`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there are fewer than 2 classes, or `likelihood_weight` is negative or not
            finite.

    References:
        Nalisnick et al. (2019), Hybrid Models with Deep and Invertible Features.
        https://arxiv.org/abs/1902.02767
        Chen et al. (2019), Residual Flows for Invertible Generative Modeling.
        https://arxiv.org/abs/1906.02735

    Example:
        >>> from cnf.transforms import Affine
        >>> objective = HybridObjective(Flow([Affine(2)]), classes=3)
        >>> labels = torch.tensor([0, 1, 2, 1])
        >>> objective(torch.zeros(4, 2), target=labels)  # log(3) + log(2 π) / 2
        tensor(2.0176, grad_fn=<MeanBackward0>)
        >>> objective.logits(torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """

    takes_targets = True

    def __init__(
        self,
        flow: Flow,
        classes: int,
        *,
        likelihood_weight: float | None = None,
        solver: ODESolver | None = None,
        divergence: Divergence | None = None,
    ) -> None:
        super().__init__(flow)
        self.classes = check_count("classes", classes, least=2)
        self.likelihood_weight = check_number(
            "likelihood_weight",
            1 / flow.features if likelihood_weight is None else likelihood_weight,
            "finite and at least 0",
            lambda number: 0 <= number < math.inf,
        )
        self.solver = training_solver(solver)
        self.divergence = training_divergence(divergence)
        like = reference_tensor(flow)
        self.head = nn.Linear(
            flow.base.features, self.classes, dtype=like.dtype, device=like.device
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def logits(
        self, x: Events, context: Context | None = None, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*joint_batch classes"]:
        """Return the logits of the classes at `x`; their softmax is p(y | x).

        A flow that draws on the way to the base, as by `Dequantize`, has random logits.

        Args:
            x: Points, ``(*batch, *event_shape)``.
            context: Context of a conditional flow.
            generator: Source of random numbers.

        Raises:
            TypeError: If `x` or `context` is not a tensor.
            ValueError: If an argument does not fit the flow, or x is outside of its support.
            ODEError: If a solve fails.
        """
        logits: Tensor = self.head(self.flow.to_base(x, context, generator=generator))
        return logits

    @torch.no_grad()
    def classify(
        self, x: Events, context: Context | None = None, *, generator: torch.Generator | None = None
    ) -> Int[Tensor, "*joint_batch"]:
        """Return the most probable class of each point; arguments and errors as in `logits`."""
        return self.logits(x, context, generator=generator).argmax(-1)

    def _loss(
        self,
        x: Tensor,
        context: Tensor | None,
        weight: Tensor | None,
        draws: int | None,
        generator: torch.Generator | None,
        target: Any = None,  # never None: the objective takes targets
    ) -> Tensor:
        if target.shape != x.shape[:1] or target.is_floating_point():
            raise ValueError(
                f"target must be labels of shape ({len(x)},) and dtype torch.int64; got "
                f"{tuple(target.shape)} of {target.dtype}."
            )
        outside = (target < 0) | (target >= self.classes)
        refuse_rows("target", outside, f"class labels from 0 to {self.classes - 1}")
        flow = self.flow.map_continuous(self._for_training)
        # The chain, not the flow, which would check the rows again.
        z, ladj = flow.transforms.to_base_and_ladj(x, context, generator=generator)
        log_prob = flow.base.log_prob(z, context, generator=generator) + ladj
        errors = functional.cross_entropy(self.head(z), target, reduction="none")
        return weighted_mean(errors - self.likelihood_weight * log_prob, weight)

    def _for_training(self, transform: ContinuousTransform) -> ContinuousTransform:
        return for_training(transform, solver=self.solver, divergence=self.divergence)
