"""An objective: the loss that training minimises."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from cnf._checks import (
    check_context,
    check_count,
    check_events,
    check_generator,
    check_support,
    check_trainable,
    joint_batch_shape,
    reference_tensor,
    refuse_overrides,
    refuse_rows,
)
from cnf._shapes import Context
from cnf.flows.flow import Flow

HOOKS = {"forward": "_loss(x, context, weight, draws, generator), which returns the loss"}
"""What a subclass writes in place of the final method."""


class Objective(nn.Module, ABC):
    """A module that returns the loss of a `flow`, as `cnf.training.fit` minimises it.

    `forward` is final: it checks what comes in. A subclass writes the hook `_loss`, which is given
    the rows, the context of each row, their weights, the number of draws and the generator (None
    for each that there is none of), and returns the loss, a scalar. The hook returns the loss and
    not one number for each row, because not every loss is a mean over the rows; `weighted_mean`
    takes it where it is. Parameters of the objective itself are trained too.

    Args:
        flow: The flow to train.

    Raises:
        TypeError: If `flow` is not a `Flow`, or a subclass overrides `forward`.

    Example:
        >>> from cnf import CNF
        >>> class MeanSquare(Objective):
        ...     def _loss(self, x, context, weight, draws, generator):
        ...         z = self.flow.to_base(x, context, generator=generator)
        ...         return weighted_mean(z.square().mean(-1), weight)
        >>> MeanSquare(CNF(2))(torch.ones(3, 2)).item()
        1.0
    """

    takes_data: ClassVar[bool] = True
    """Whether the loss is that of rows of data; if not, `fit` gives contexts alone, or nothing."""
    draws: int | None = None
    """Number of draws in a step, for an objective that makes its own points. `fit` shares it out
    among the parts of a step."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that overrides the final method, whose hook it would have to write."""
        super().__init_subclass__(**kwargs)
        refuse_overrides(cls, Objective, HOOKS)

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a cnf.Flow; got {type(flow).__name__}.")
        self.flow = flow

    @final  # type: ignore[misc]  # to torch, forward is an attribute that may be written
    def forward(
        self,
        x: Float[Tensor, "batch *event"] | None = None,
        context: Context | None = None,
        *,
        weight: Float[Tensor, " batch"] | None = None,
        draws: int | None = None,
        generator: Generator | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a minibatch.

        Args:
            x: Rows of data; None for an objective that takes none.
            context: What the flow is conditioned on.
            weight: How much each row counts, relative to a mean of 1; None for 1 each.
            draws: Number of draws in a part of a step, for an objective that makes its own points;
                None for `draws` of the objective.
            generator: Source of everything random.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the minibatch is empty or does not fit the flow, or the objective takes
                no such argument.
            ODEError: If a solve fails.
        """
        check_generator(generator, like=reference_tensor(self.flow))
        if torch.is_grad_enabled():
            check_trainable("flow", self.flow)
        if self.takes_data:
            x, context = self._validate(x, context, weight)
        else:
            if x is not None or weight is not None:
                raise ValueError(
                    f"x and weight must be None, because {type(self).__name__} takes no data; "
                    "give contexts as context=."
                )
            check_context(context, self.flow.context_features, like=reference_tensor(self.flow))
        if draws is None:
            draws = self.draws
        elif self.draws is None:
            raise ValueError(
                f"draws must be None, because {type(self).__name__} has none; got {draws}."
            )
        else:
            check_count("draws", draws)
        return self._loss(x, context, weight, draws, generator)

    @abstractmethod
    def _loss(
        self,
        x: Any,  # a Tensor; None for an objective that takes no data
        context: Tensor | None,
        weight: Tensor | None,
        draws: Any,  # an int; None for an objective without
        generator: Generator | None,
    ) -> Tensor:
        """Hook: the loss."""

    def _validate(
        self, x: Any, context: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Check rows, contexts and weights, and give every row its context."""
        flow = self.flow
        like = reference_tensor(flow)
        check_events("x", x, flow.event_shape, like=like)
        check_context(context, flow.context_features, like=like)
        check_support("x", x, flow.support)
        shape = joint_batch_shape(x, context, len(flow.event_shape))
        if len(shape) != 1 or shape[0] == 0:
            raise ValueError(
                f"x must have one batch axis and at least one row; got batch shape {tuple(shape)}."
            )
        if weight is not None:
            _check_weight(weight, shape[0], like=like)
        if context is not None:
            context = context.expand(*shape, -1)
        return x.expand(*shape, *flow.event_shape), context


def weighted_mean(
    losses: Float[Tensor, " batch"], weight: Float[Tensor, " batch"] | None
) -> Float[Tensor, ""]:
    """The mean of ``weight * losses``; None stands for ones.

    Weights are relative to a mean of 1 over the data, not over the minibatch: so the mean over
    minibatches is that over the data, and a row of weight 2 counts like two rows.
    """
    if weight is None:
        return losses.mean()
    # A row that does not count may have no density.
    return (weight * losses.where(weight > 0, 0.0)).mean()


def _check_weight(weight: Tensor, rows: int, *, like: Tensor) -> None:
    """Refuse what is not one finite number, at least 0, for each row.

    Raises:
        TypeError: If `weight` is not a tensor.
        ValueError: If it is not so, or of another dtype or device than `like`.
    """
    check_events("weight", weight, (), like=like)
    if weight.shape != (rows,):
        raise ValueError(
            f"weight must have one entry for each row, shape ({rows},); got {tuple(weight.shape)}."
        )
    refuse_rows("weight", weight < 0, "at least 0")
