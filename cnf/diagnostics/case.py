"""Flow and rows of a diagnosis, and the outcome of a check."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnf._checks import (
    check_context,
    check_events,
    check_generator,
    check_support,
    check_type,
    reference_tensor,
)
from cnf.divergence import Exact, Hutchinson
from cnf.flows.flow import Flow
from cnf.flows.standard_error import hidden_estimates
from cnf.ode import Gradient
from cnf.transforms import ContinuousTransform

_FEW_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """Flow and rows of a diagnosis."""

    flow: Flow
    x: Tensor
    context: Tensor | None
    seed: int

    @classmethod
    def of(
        cls, flow: Flow, x: Tensor, context: Tensor | None, generator: Any, *, least: int
    ) -> "Case":
        """Return the case of a user's arguments, after their checks; `least` counts rows."""
        check_type("flow", flow, Flow, "wrap the transforms in Flow([...])")
        check_type("x", x, Tensor, "use torch.as_tensor(x)")
        if x.ndim != 1 + len(flow.event_shape) or len(x) < least:
            raise ValueError(
                f"x must have at least {least} {'row' if least == 1 else 'rows'}, and shape "
                f"(rows, {', '.join(map(str, flow.event_shape))}); got {tuple(x.shape)}."
            )
        check_events("x", x, flow.event_shape, like=reference_tensor(flow))
        check_context(context, flow.context_features, like=reference_tensor(flow))
        check_support("x", x, flow.support)
        check_generator(generator, like=x)
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        return cls(flow=flow, x=x.detach(), context=context, seed=seed)

    def few(self) -> "Case":
        """Return the case with the first rows only, for costly checks."""
        context = None if self.context is None else self.context[:_FEW_ROWS]
        return dataclasses.replace(self, x=self.x[:_FEW_ROWS], context=context)

    def by(self, flow: Flow) -> "Case":
        """Return the case with another flow."""
        return dataclasses.replace(self, flow=flow)

    @property
    def generator(self) -> torch.Generator:
        """New generator with a fixed seed, so that repeated draws are equal."""
        return torch.Generator(self.x.device).manual_seed(self.seed)

    @property
    def continuous(self) -> list[ContinuousTransform]:
        """Continuous transforms, nested ones included."""
        return [part for part in self.flow.modules() if isinstance(part, ContinuousTransform)]

    @property
    def scale(self) -> Tensor:
        """Standard deviation of each entry of x; 1 where it does not vary."""
        return scale_of(self.x)

    @property
    def exact(self) -> "Case":
        """The case with the exact divergence in all continuous transforms."""
        return self.by(self.flow.using(divergence=Exact()))

    @property
    def on_surface(self) -> "Case":
        """The case with the projections of the rows on the surface of the flow."""
        z = self.flow.to_base(self.x, self.context, generator=self.generator)
        x = self.flow.to_data(z, self.context, generator=self.generator)
        return dataclasses.replace(self, x=x)

    def log_prob(self) -> Tensor:
        """Return the log-density of the rows."""
        if self.flow.base.likelihood == "not_a_likelihood":
            raise NotMeasuredError("the base has no log-density")
        return self.flow.log_prob(self.x, self.context, generator=self.generator)

    def need_ode(self) -> None:
        """Raise a `NotMeasuredError` for a flow that follows no ODE."""
        if not self.continuous:
            raise NotMeasuredError("the flow follows no ODE")

    def need_density(self) -> None:
        """Raise a `NotMeasuredError` for a flow without a density, with any divergence."""
        kind = self.exact.flow.likelihood
        if kind != "exact":
            raise NotMeasuredError(f"the likelihood is {kind!r}, with any divergence")

    def need_probes(self) -> None:
        """Raise a `NotMeasuredError` for a flow whose probes give no standard error."""
        estimated = self.flow.using(divergence=Hutchinson())
        hidden = hidden_estimates(estimated.transforms)
        if estimated.base.likelihood != "exact":
            hidden.append(type(estimated.base).__name__)
        if hidden:
            raise NotMeasuredError(f"an ODE is inside of {', '.join(hidden)}")


def scale_of(x: Tensor) -> Tensor:
    """Return the standard deviation of each entry of x; 1 where it does not vary."""
    std = x.std(0)
    return torch.where(std > 0, std, torch.ones_like(std))


class Outcome(NamedTuple):
    """Value, limit, meaning and remedy of a check, as in `cnf.diagnostics.Check`."""

    value: float
    limit: float
    meaning: str
    remedy: str


class NotMeasuredError(Exception):
    """A check does not apply; the message says why."""


def by_gradient(gradient: Gradient, flow: Flow) -> Flow:
    """Return the flow with another gradient method; raise a ValueError if a solver has none."""
    return flow.map_continuous(
        lambda part: part.using(solver=dataclasses.replace(part.solver, gradient=gradient))
    )
