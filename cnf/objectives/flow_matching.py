"""Flow matching: training by regression, without solving the ODE."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_choice, check_type, refuse_overflow
from cnf.flows.flow import Flow
from cnf.objectives.base import Objective, weighted_mean
from cnf.objectives.pairings import IndependentPairing, Pairing
from cnf.objectives.paths import LinearPath, ProbabilityPath
from cnf.transforms import Chain, ContinuousTransform
from cnf.transforms.chain import context_for

_TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "logit_normal": lambda u: torch.special.ndtri(u).sigmoid(),
    "late": lambda u: 1 - (1 - u).square(),
}
"""Times by name, as functions of uniform numbers."""
_ROWS_PER_TIME = 16
"""What the layers of a field make of the time alone is then made once for so many rows."""


class FlowMatching(Objective):
    r"""Regression of the vector field on the velocities of paths from base to data.

    For each row, a path that ends in it and a time t are drawn; the loss of the row is the mean
    over the features of

    .. math:: (v(t, x_t) - \dot x_t)^2

    Whatever the distribution of t, the best field is the mean velocity of the paths through a point
    at a time, whose flow has at each time the density of the states :math:`x_t`, and so at t = 1
    that of the data. The least loss is not zero, but how much the velocities of paths through one
    point differ, so that the loss says nothing about the fit: judge by `Flow.log_prob`.

    A step takes one evaluation of the field for each row. It trains the field of a flow with one
    `ContinuousTransform`, and this alone: what the other transforms (and a learnt end time) are is
    taken as given, without gradient. `MaximumLikelihood` trains all.

    Args:
        flow: The flow to train. The transforms before its ODE take the data to where paths end,
            and those behind it with the base say where paths start.
        path: How a point moves; None for `LinearPath`.
        pairing: Which point of the base goes with which row of the data; None for
            `IndependentPairing`.
        times: Distribution of t: "uniform"; "late" for the density ``1 / (2 sqrt(1 - t))``, which
            favours the end, where sharp features of the data form and likelihood is won; or
            "logit_normal" for the sigmoid of a standard normal number, which favours the middle.
            A minibatch is spread evenly over the distribution.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the flow has not exactly one `ContinuousTransform`, and that among its own
            transforms, or `times` is unknown.

    References:
        Lipman et al. (2023), Flow Matching for Generative Modeling.
        https://arxiv.org/abs/2210.02747
        Esser et al. (2024), Scaling Rectified Flow Transformers for High-Resolution Image
        Synthesis, https://arxiv.org/abs/2403.03206, for logit-normal times.

    Example:
        >>> from cnf import CNF
        >>> objective = FlowMatching(CNF(2))
        >>> objective(torch.zeros(3, 2)).backward()
    """

    def __init__(
        self,
        flow: Flow,
        path: ProbabilityPath | None = None,
        pairing: Pairing | None = None,
        *,
        times: Literal["uniform", "late", "logit_normal"] = "uniform",
    ) -> None:
        super().__init__(flow)
        # In a tuple, so that they are no parts of this module beside the flow, which has them.
        self._parts = _around_the_ode(flow)
        self.path = LinearPath() if path is None else path
        check_type("path", self.path, ProbabilityPath, "use LinearPath()")
        self.pairing = IndependentPairing() if pairing is None else pairing
        check_type("pairing", self.pairing, Pairing, "use OptimalTransport()")
        self.times = check_choice("times", times, _TIMES)

    def _loss(
        self,
        x: Tensor,
        context: Tensor | None,
        weight: Tensor | None,
        draws: int | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        if weight is not None and not isinstance(self.pairing, IndependentPairing):
            x, context, weight = _resampled(x, context, weight, generator)
        before, transform, behind = self._parts
        with torch.no_grad():
            x1 = before.to_base(x, context, generator=generator)
            z = self.flow.base.rsample(x1.shape[:1], context, generator=generator)
            x0 = behind.to_data(z, context, generator=generator)
            x0 = self.pairing(x0, x1, context)
            rows = math.gcd(len(x1), _ROWS_PER_TIME) if transform.vector_field.shares_times else 1
            share = self._draw_times(len(x1) // rows, generator=generator, like=x1)
            if rows > 1:
                share = share.unsqueeze(-1)
                x0, x1 = (part.unflatten(0, (-1, rows)) for part in (x0, x1))
                context = None if context is None else context.unflatten(0, (-1, rows))
            state, target = self.path.state_and_velocity(share, x0, x1, generator=generator)
            start, end = transform.field_times(torch.tensor([0.0, 1.0]).to(x1))
            t = torch.lerp(start, end, share)
        velocity = transform.vector_field(t, state, context_for(transform, context))
        errors = (end - start) * velocity - target
        losses = errors.square().mean(-1).flatten()
        refuse_overflow("x", ~losses.detach().isfinite(), "the loss of flow matching", x.dtype)
        return weighted_mean(losses, weight)

    def _draw_times(
        self, number: int, *, generator: torch.Generator | None, like: Tensor
    ) -> Float[Tensor, " times"]:
        """Equal steps from a random start, in random order: so each is drawn as `times` says."""
        start = torch.rand((), generator=generator, dtype=like.dtype, device=like.device)
        steps = torch.randperm(number, generator=generator, device=like.device)
        return _TIMES[self.times]((start + steps) / number)


def _resampled(
    x: Tensor, context: Tensor | None, weight: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows drawn as often as they count, which then all count alike.

    A pairing of rows that count differently would not start from the base.
    """
    chances = weight.clamp(min=torch.finfo(weight.dtype).tiny)
    drawn = torch.multinomial(chances, len(x), replacement=True, generator=generator)
    context = None if context is None else context[drawn]
    return x[drawn], context, weight.mean().expand(len(x))


def _around_the_ode(flow: Flow) -> tuple[Chain, ContinuousTransform, Chain]:
    """The transforms between data and ODE, the ODE, and the transforms between it and the base.

    Raises:
        ValueError: If the flow has not exactly one ODE, or has it as a part of something else.
    """
    ode = flow.only_ode
    if ode is None:
        number = sum(isinstance(part, ContinuousTransform) for part in flow.chain)
        nested = number < sum(isinstance(part, ContinuousTransform) for part in flow.modules())
        inside = ", and there is one inside of another part" if nested else ""
        raise ValueError(
            "flow must have exactly one ContinuousTransform among its transforms, to know between "
            f"which ends paths run; got {number}{inside}. Use MaximumLikelihood."
        )
    place = flow.chain.transforms.index(ode)
    return flow.chain[:place], ode, flow.chain[place + 1 :]
