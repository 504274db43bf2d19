"""Flow matching: regression of the vector field, without solving the ODE."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cnf._checks import check_choice, check_type, refuse_overflow
from cnf.bases import StandardNormal
from cnf.flows.flow import Flow
from cnf.objectives.base import Objective, weighted_mean
from cnf.objectives.pairings import IndependentPairing, Pairing
from cnf.objectives.paths import GeodesicPath, LinearPath, ProbabilityPath
from cnf.objectives.stable_target import mean_velocity
from cnf.transforms import Chain, ContinuousTransform

_TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "logit_normal": lambda u: torch.special.ndtri(u).sigmoid(),
    "late": lambda u: 1 - (1 - u).square(),
}
"""Quantile functions of the distributions of t."""
_ROWS_PER_TIME = 16
"""Rows that share a time, for which layers compute their functions of t once."""


class FlowMatching(Objective):
    r"""Flow matching: regression of the vector field on the velocities of paths.

    For each row, a path from the base to this row and a time t are drawn; the loss of the row is
    the mean over the features of

    .. math:: (v(t, x_t) - \dot x_t)^2

    For any distribution of t, the loss is least for the mean velocity of the paths through each
    point at each time; the flow of this field has the density of the states :math:`x_t` at each
    time, so the density of the data at t = 1. The minimum is not zero but the variance of the
    velocities of paths through a point, so judge the fit by `Flow.log_prob`, not by the loss.

    A step takes one evaluation of the field for each row. It trains only the field of a flow with
    one `ContinuousTransform`; the other transforms, and a learnt end time, get no gradient.
    `MaximumLikelihood` trains all parts.

    Args:
        flow: The flow to train. Its transforms between data and ODE map the data to the ends of
            paths; the base, and the transforms between it and the ODE, draw the starts.
        path: Path between two points; None for `LinearPath`, or on a manifold for `GeodesicPath`.
        pairing: Pairing of base points with rows of data; None for `IndependentPairing`.
        target: Velocity that the field is compared with at a state: "pair" for the velocity of its
            own path, "stable" for the mean over the paths that may lead there from the base to the
            rows of the minibatch with the same context: less noise, and the same minimum. None for
            "stable" where it is possible: from a standard normal base, by a `LinearPath`, with an
            `IndependentPairing`.
        times: Distribution of t: "uniform"; "late" for the density ``1 / (2 sqrt(1 - t))``, which
            favours the end, where sharp features of the data form and the likelihood improves most;
            or "logit_normal" for the sigmoid of a standard normal number, which favours the middle.
            Times of a minibatch are stratified.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the flow does not have exactly one `ContinuousTransform`, among its own
            transforms, `times` or `target` is unknown, or `target` is "stable" where the mean has
            no closed form.

    References:
        Lipman et al. (2023), Flow Matching for Generative Modeling.
        https://arxiv.org/abs/2210.02747
        Chen and Lipman (2024), Flow Matching on General Geometries,
        https://arxiv.org/abs/2302.03660, for manifolds.
        Esser et al. (2024), Scaling Rectified Flow Transformers for High-Resolution Image
        Synthesis, https://arxiv.org/abs/2403.03206, for logit-normal times.
        Xu, Tong and Jaakkola (2023), Stable Target Field for Reduced Variance Score Estimation in
        Diffusion Models, https://arxiv.org/abs/2302.00670, for the stable target.

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
        target: Literal["stable", "pair"] | None = None,
        times: Literal["uniform", "late", "logit_normal"] = "uniform",
    ) -> None:
        super().__init__(flow)
        # In a tuple, so that they are not registered as modules beside the flow.
        self._parts = _around_the_ode(flow)
        manifold = self._parts[1].vector_field.manifold
        usual = LinearPath() if manifold is None else GeodesicPath(manifold)
        self.path = usual if path is None else path
        check_type("path", self.path, ProbabilityPath, "use LinearPath()")
        if self.path != usual and (manifold is not None or isinstance(self.path, GeodesicPath)):
            raise ValueError(
                f"path must stay on the manifold of the flow, as {usual} does; got {self.path}."
            )
        self.pairing = IndependentPairing() if pairing is None else pairing
        check_type("pairing", self.pairing, Pairing, "use OptimalTransport()")
        self.times = check_choice("times", times, _TIMES)
        chosen = self._best_target if target is None else target
        self.target = check_choice("target", chosen, ("stable", "pair"))
        if self.target == "stable" != self._best_target:
            raise ValueError(
                "target must be 'pair', unless paths start from a standard normal base, follow a "
                "LinearPath and end by an IndependentPairing; got 'stable'."
            )

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
            times = self._draw_times(len(x1) // rows, generator=generator, like=x1)
            share = times.repeat_interleave(rows)
            state, target = self.path.state_and_velocity(share, x0, x1, generator=generator)
            if isinstance(self.path, LinearPath) and self.target == "stable":
                target = mean_velocity(
                    target, state, x1, share, self.path.sigma_min, context=context, weight=weight
                )
            start, end = transform.field_times(torch.tensor([0.0, 1.0]).to(x1))
            t = torch.lerp(start, end, times)
            if rows > 1:
                t = t.unsqueeze(-1)
                state, target = (part.unflatten(0, (-1, rows)) for part in (state, target))
                context = None if context is None else context.unflatten(0, (-1, rows))
        given = context if transform.context_features else None
        velocity = transform.vector_field(t, state, given)
        errors = (end - start) * velocity - target
        losses = errors.square().mean(-1).flatten()
        refuse_overflow("x", ~losses.detach().isfinite(), "the loss of flow matching", x.dtype)
        return weighted_mean(losses, weight)

    @property
    def _best_target(self) -> str:
        """The stable target, where the chances of paths through a state are known."""
        normal = isinstance(self.flow.base, StandardNormal) and not len(self._parts[2])
        straight = isinstance(self.path, LinearPath)
        free = isinstance(self.pairing, IndependentPairing)
        return "stable" if normal and straight and free else "pair"

    def _draw_times(
        self, number: int, *, generator: torch.Generator | None, like: Tensor
    ) -> Tensor:
        """Draw stratified times in random order: quantiles at equal steps from a random start."""
        start = torch.rand((), generator=generator, dtype=like.dtype, device=like.device)
        steps = torch.randperm(number, generator=generator, device=like.device)
        return _TIMES[self.times]((start + steps) / number)


def _resampled(
    x: Tensor, context: Tensor | None, weight: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Resample rows by weight, because paths of paired weighted rows do not start from the base."""
    chances = weight.clamp(min=torch.finfo(weight.dtype).tiny)
    drawn = torch.multinomial(chances, len(x), replacement=True, generator=generator)
    context = None if context is None else context[drawn]
    return x[drawn], context, weight.mean().expand(len(x))


def _around_the_ode(flow: Flow) -> tuple[Chain, ContinuousTransform, Chain]:
    """Split a chain into the transforms before its only ODE, the ODE, and those behind it."""
    ode = flow.only_ode
    if ode is None:
        number = sum(isinstance(part, ContinuousTransform) for part in flow.transforms)
        nested = number < sum(isinstance(part, ContinuousTransform) for part in flow.modules())
        inside = ", and there is one inside of another part" if nested else ""
        raise ValueError(
            "flow must have exactly one ContinuousTransform among its transforms, for paths from "
            f"its start to its end; got {number}{inside}. Use MaximumLikelihood."
        )
    place = flow.transforms.transforms.index(ode)
    return flow.transforms[:place], ode, flow.transforms[place + 1 :]
