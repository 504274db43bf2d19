"""Training objective: the base class of losses."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Shaped
from torch import Generator, Tensor, nn

from cnf._checks import (
    check_context,
    check_count,
    check_dense,
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
"""Hook of a subclass for the final method."""
TARGETS_REMEDY = (
    "Train an objective with takes_targets=True, such as HybridObjective for class labels; or a "
    "conditional flow (context_features=...), whose contexts they are."
)
"""What to do with targets that are refused."""


class Objective(nn.Module, ABC):
    """Training objective: a module whose `forward` returns the loss of a `flow`.

    `forward` is final: it checks the arguments. A subclass writes the hook `_loss`, which gets the
    rows, the context of each row, their weights, the number of draws and the generator (each may be
    None), and returns the scalar loss; `weighted_mean` averages losses of rows. An objective that
    takes targets gets them as the keyword `target` too. Parameters of the objective itself are
    trained too.

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
        >>> MeanSquare(CNF(2, skip=False))(torch.ones(3, 2)).item()
        1.0
    """

    takes_data: ClassVar[bool] = True
    """Whether the loss needs rows of data; if not, `fit` gives contexts alone, or nothing."""
    takes_targets: bool = False
    """Whether the loss needs a target for each row of data, such as a label."""
    draws: int | None = None
    """Number of draws in a step, for an objective that draws its points. `fit` divides it among the
    parts of a step."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that overrides the final method, or takes targets without rows."""
        super().__init_subclass__(**kwargs)
        refuse_overrides(cls, Objective, HOOKS)
        if cls.takes_targets and not cls.takes_data:
            raise TypeError(f"{cls.__name__}.takes_data must be True, because it takes targets.")

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
        target: Shaped[Tensor, "batch *target"] | None = None,
        weight: Float[Tensor, " batch"] | None = None,
        draws: int | None = None,
        generator: Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of a minibatch.

        Args:
            x: Rows of data; None for an objective that takes no data.
            context: Context of a conditional flow.
            target: Target of each row, for an objective that takes targets: integers (int64), or
                numbers of the dtype of the flow.
            weight: Weight of each row, relative to a mean of 1; None for 1 each.
            draws: Number of draws in a part of a step, for an objective that draws its points; None
                for `draws` of the objective.
            generator: Source of random numbers.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the minibatch is empty or does not fit the flow, or an argument is not
                for this objective.
            ODEError: If a solve fails.
        """
        like = reference_tensor(self.flow)
        check_generator(generator, like=like)
        if torch.is_grad_enabled():
            check_trainable("flow", self.flow)
        if self.takes_data:
            x, context = self._validate(x, context, weight, like)
        else:
            if x is not None or weight is not None:
                raise ValueError(
                    f"x and weight must be None, because {type(self).__name__} takes no data; "
                    "give contexts as context=."
                )
            check_context(context, self.flow.context_features, like=like)
        if draws is None:
            draws = self.draws
        elif self.draws is None:
            raise ValueError(
                f"draws must be None, because {type(self).__name__} has none; got {draws}."
            )
        else:
            check_count("draws", draws)
        targets = self._check_target(target, x, like)
        loss = self._loss(x, context, weight, draws, generator, **targets)
        if loss.ndim:
            raise ValueError(
                f"{type(self).__name__}._loss must return a scalar; got shape {tuple(loss.shape)}."
            )
        return loss

    @property
    def is_more_than_its_flow(self) -> bool:
        """Whether it takes targets, or has parameters beside those of the flow."""
        of_the_flow = set(map(id, self.flow.parameters()))
        has_own = any(id(parameter) not in of_the_flow for parameter in self.parameters())
        return self.takes_targets or has_own

    @property
    def is_kept_whole(self) -> bool:
        """Whether `fit` validates by this loss, and keeps the best of all parameters.

        Otherwise it validates the flow alone, by its log-density. This is true of an objective that
        is more than its flow, because its parts belong together; or if the flow covers a surface
        alone, off which rows have a loss but no density.
        """
        return self.is_more_than_its_flow or self.flow.likelihood == "on_manifold"

    @abstractmethod
    def _loss(
        self,
        x: Any,  # a Tensor; None for an objective that takes no data
        context: Tensor | None,
        weight: Tensor | None,
        draws: Any,  # an int; None for an objective without
        generator: Generator | None,
    ) -> Tensor:
        """Hook: the loss; with the keyword `target` if the objective takes targets."""

    def _check_target(self, target: Any, x: Any, like: Tensor) -> dict[str, Tensor]:
        """Return the checked target as a keyword of the hook, or nothing."""
        if self.takes_targets:
            check_target("target", target, len(x), like=like)
            return {"target": target}
        if target is not None:
            raise ValueError(
                f"target must be None, because {type(self).__name__} takes no targets; got a "
                f"{type(target).__name__}. {TARGETS_REMEDY}"
            )
        return {}

    def _validate(
        self, x: Any, context: Tensor | None, weight: Tensor | None, like: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Check rows, contexts and weights, and give every row its context."""
        flow = self.flow
        check_events("x", x, flow.event_shape, like=like)
        check_context(context, flow.context_features, like=like)
        check_support("x", x, flow.support)
        shape = joint_batch_shape(x, context, len(flow.event_shape))
        if len(shape) != 1 or shape[0] == 0:
            raise ValueError(
                f"x must have one batch axis and at least one row; got batch shape {tuple(shape)}."
            )
        if weight is not None:
            check_weight("weight", weight, shape[0], like=like)
        if context is not None:
            context = context.expand(*shape, -1)
        return x.expand(*shape, *flow.event_shape), context


def weighted_mean(
    losses: Float[Tensor, " batch"], weight: Float[Tensor, " batch"] | None
) -> Float[Tensor, ""]:
    """Return the mean of ``weight * losses``; None stands for weights of 1.

    Weights have a mean of 1 over the data, not over the minibatch, so a row of weight 2 counts as
    two rows, and the mean over minibatches is the mean over the data.
    """
    if weight is None:
        return losses.mean()
    # The loss of a row of weight 0 may be infinite.
    return (weight * losses.where(weight > 0, 0.0)).mean()


def check_weight(name: str, weight: Tensor, rows: int, *, like: Tensor) -> None:
    """Refuse weights that are not one finite number, at least 0, for each row."""
    check_events(name, weight, (), like=like)
    if weight.shape != (rows,):
        raise ValueError(
            f"{name} must have one entry for each row, shape ({rows},); got {tuple(weight.shape)}."
        )
    refuse_rows(name, weight < 0, "at least 0")


def check_target(name: str, target: Any, rows: int, *, like: Tensor) -> None:
    """Refuse targets that are not one for each row, of int64 or finite numbers like `like`."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(target).__name__}.")
    check_dense(name, target)
    if target.shape[:1] != (rows,):
        raise ValueError(
            f"{name} must have one entry for each row, shape ({rows}, ...); got "
            f"{tuple(target.shape)}."
        )
    if target.is_floating_point():
        check_events(name, target, target.shape[1:], like=like)
    elif target.dtype != torch.int64:
        raise ValueError(
            f"{name} must have the dtype torch.int64, or {like.dtype}; got {target.dtype}. "
            f"Convert labels with {name}.long()."
        )
    elif target.device != like.device:
        raise ValueError(
            f"{name} must be on the model's device {like.device}; got {target.device}."
        )
