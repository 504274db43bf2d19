"""A flow: a base distribution and a chain of transforms."""

import math
from collections.abc import Callable, Iterable, Sequence
from operator import methodcaller
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.distributions import constraints

from cnf._checks import (
    check_context,
    check_events,
    check_generator,
    check_sample_shape,
    check_support,
    check_trainable,
    holds,
    is_hidden,
    joint_batch_shape,
    reference_tensor,
    refuse_overflow,
    rows_inside,
)
from cnf._memory import check_fits
from cnf._row_names import rows_of_caller
from cnf._shapes import BaseRows, Context, Events
from cnf.bases import Base, Likelihood, weakest
from cnf.divergence import Divergence
from cnf.flows.distribution import FlowDistribution
from cnf.flows.standard_error import to_base_with_error
from cnf.flows.trajectory import check_times, follow
from cnf.ode import ODESolver
from cnf.regularizers import CostRate
from cnf.transforms import Chain, ContinuousTransform, Transform
from cnf.transforms.chain import (
    agreed_context_features,
    as_list,
    base_for,
    check_importance_samples,
)
from cnf.transforms.continuous import map_continuous
from cnf.transforms.support.constraints import row_before, select, spread
from cnf.vector_fields import VectorField
from cnf.vector_fields.compiled import Compilation

AnyFlow = TypeVar("AnyFlow", bound="Flow")


class Flow(nn.Module):
    """A density model: `base`, reached from the data through `transforms`.

    ``log p(x) = log base(z) + ladj`` in nats, where z and ladj are what the transforms make of x.
    Points have shape ``(*batch, *event_shape)``: vectors, unless the first transform takes images.
    A context ``(*batch, context_features)`` broadcasts; a conditional flow needs one. Everything
    random takes a `generator`. Each method raises what `log_prob` raises.

    Args:
        transforms: From data to base.
        base: Distribution at the base; None for a standard normal. Of a flow, the transforms follow
            these, and its base is the base.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the parts do not fit together, or the base has its density where the
            transforms do not lead.

    References:
        Papamakarios et al. (2021), https://arxiv.org/abs/1912.02762; for the mean of importance
        weights Burda et al. (2016), https://arxiv.org/abs/1509.00519
    """

    def __init__(self, transforms: Iterable[Transform], base: "Base | Flow | None" = None) -> None:
        super().__init__()
        parts = as_list(transforms)
        if isinstance(base, Flow):
            parts = [*parts, *base.chain]
        self.base: Base = base_for(parts, base.base if isinstance(base, Flow) else base)
        self.transforms = Chain(parts, None if parts else self.base.features)
        self.features = self.transforms.features
        self.event_shape = self.transforms.event_shape
        self.context_features = agreed_context_features([self.transforms, self.base])

    @property
    def chain(self) -> Chain:
        """The transforms, from data to base: the same as `transforms`."""
        return self.transforms

    @property
    def likelihood(self) -> Likelihood:
        """What `log_prob` is: the weakest kind among the parts, in the order of `Likelihood`."""
        return weakest([self.transforms.likelihood, self.base.likelihood])

    @property
    def support(self) -> constraints.Constraint:
        """Which x may be asked about: real numbers, or those that the first transforms take."""
        support = self.transforms.support
        if support is None:
            support = self.base.support
        more_axes = len(self.event_shape) - 1
        return constraints.independent(support, more_axes) if more_axes else support

    @property
    def only_ode(self) -> ContinuousTransform | None:
        """The one `ContinuousTransform`, if it is among `transforms` and no other part holds one.

        None for a flow with several, with none, or with one inside of another transform or the
        base.
        """
        own = [part for part in self.transforms if isinstance(part, ContinuousTransform)]
        every = [part for part in self.modules() if isinstance(part, ContinuousTransform)]
        return own[0] if len(own) == len(every) == 1 else None

    @torch.no_grad()
    def initialize(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> None:
        """Set what starts from data from these rows, as `fit` does by itself.

        This is `Standardize`, `ActNorm`, the scaling of contexts and the like. What has been set,
        or was loaded, is left as it is.

        Raises:
            ValueError: If the rows do not fit, are constant in a column, or vary in one by less
                than their dtype can tell.
        """
        check_trainable("flow", self)
        x = self._validate("x", x, context, generator)
        self.transforms.initialize(x, context, generator=generator)
        if self.base.needs_initialization:
            z = self.transforms.to_base(x, context, generator=generator)
            self.base.initialize(z.reshape(-1, self.base.features), generator=generator)

    def using(
        self: AnyFlow, *, solver: ODESolver | None = None, divergence: Divergence | None = None
    ) -> AnyFlow:
        """The same flow, sharing every parameter, with another solver or divergence."""
        change = methodcaller("using", solver=solver, divergence=divergence)
        return self.map_continuous(change)

    def map_continuous(
        self: AnyFlow, change: Callable[[ContinuousTransform], ContinuousTransform]
    ) -> AnyFlow:
        """The same flow, sharing every parameter, with `change` made to each continuous transform.

        It reaches those inside of other transforms too. `change` returns a transform of the same
        size, such as ``part.using(start_time=0.1)``.
        """
        return map_continuous(self, change)

    def compile(
        self, *, backend: str | Callable[..., Any] = "inductor", mode: str | None = None
    ) -> None:
        """Compile the evaluations of the vector fields, in place: the same numbers, faster.

        Each program is made when it is first needed, in seconds to a minute: for the velocity, for
        the divergence, for Jacobian products and for whole steps of fixed size, with and without
        gradients. Batches of every size and all times share one; so do `using` and the objectives.
        What is saved, copied or pickled is not compiled. Where torch.compile cannot work, a warning
        says what to install, and the flow goes on without it. Within `torch.func` it runs
        uncompiled; gradients of gradients, which torch.compile has none of, are an error.

        Args:
            backend: As `torch.compile` takes it.
            mode: Likewise.

        Raises:
            ValueError: If the flow has no vector field.
            RuntimeError: If torch knows no such backend or mode.
        """
        fields = [part for part in self.modules() if isinstance(part, VectorField)]
        if not fields:
            raise ValueError(
                "flow must have a vector field to compile; got one of discrete transforms alone. "
                "Try torch.compile(flow.log_prob)."
            )
        compilation = Compilation(backend=backend, mode=mode)
        for field in fields:
            field.compilation = compilation

    @classmethod
    def _with_parts(cls: type[AnyFlow], transforms: Iterable[Transform], base: Base) -> AnyFlow:
        """A flow of this class from its parts; a subclass may only add a constructor."""
        flow = cls.__new__(cls)
        Flow.__init__(flow, transforms, base)
        return flow

    def forward(self, context: Context | None = None) -> FlowDistribution:
        """The flow given a context, as a `torch.distributions.Distribution`."""
        check_context(context, self.context_features, like=reference_tensor(self))
        return FlowDistribution(self, context)

    def log_prob(
        self,
        x: Events,
        context: Context | None = None,
        *,
        importance_samples: int = 1,
        generator: Generator | None = None,
    ) -> Float[Tensor, "*joint_batch"]:
        """Log-density of `x`, in nats, or what `likelihood` says in its place.

        Outside of `support` it is -inf; the other methods refuse such rows. A lower bound is the
        log of the mean of `importance_samples` random weights, computed at once; the more, the
        tighter on average.

        Args:
            x: Points, ``(*batch, *event_shape)``.
            context: What the density is conditioned on.
            importance_samples: Number of weights; 1 unless the likelihood is a lower bound.
            generator: Source of the probes of an estimate, and of the draws of a bound.

        Raises:
            TypeError: If `x` or `context` is not a tensor.
            ValueError: If an argument has a wrong shape, dtype, device or value.
            ODEError: If a solve fails.
        """
        if importance_samples != 1:
            kinds = self.transforms.likelihoods | {self.base.likelihood}
            check_importance_samples(kinds, importance_samples)
        x = self._validate("x", x, context, generator, "anywhere")
        inside = rows_inside(x, self.support)
        if holds(~inside.all()):
            with rows_of_caller(row_before(inside)):
                log_prob = self.log_prob(
                    *select(inside, x, context),
                    importance_samples=importance_samples,
                    generator=generator,
                )
            return spread(inside, log_prob, elsewhere=-math.inf)
        if importance_samples > 1:
            log_prob = self._log_mean_weight(x, context, importance_samples, generator)
        else:
            z, ladj = self.transforms.to_base_and_ladj(x, context, generator=generator)
            log_prob = self.base.log_prob(z, context, generator=generator) + ladj
        refuse_overflow("x", log_prob.detach().isnan(), "its log-density", x.dtype)
        if not is_hidden(inside):
            return log_prob
        # NaN is outside of every support, and could not be refused.
        nan = x.detach().isnan().flatten(x.ndim - len(self.event_shape)).any(-1)
        return torch.where(inside, log_prob, torch.where(nan, math.nan, -math.inf))

    def log_prob_and_error(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> tuple[Float[Tensor, "*joint_batch"], Float[Tensor, "*joint_batch"]]:
        """Log-density in nats and its standard error across the probes of an estimate, else 0.

        Raises:
            ValueError: If the likelihood is a lower bound or biased, or an estimate by less than
                two probes, or not by the divergence alone.
        """
        x = self._validate("x", x, context, generator, "anywhere")
        inside = rows_inside(x, self.support)
        if holds(~inside.all()):
            rows = select(inside, x, context)
            with rows_of_caller(row_before(inside)):
                log_prob, error = self.log_prob_and_error(*rows, generator=generator)
            error = spread(inside, error, elsewhere=0.0)
            return spread(inside, log_prob, elsewhere=-math.inf), error
        z, ladj, error = to_base_with_error(
            self.transforms, x, context, kind=self.likelihood, generator=generator
        )
        return self.base.log_prob(z, context) + ladj, error

    def sample(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> Float[Tensor, "*shape_and_event"]:
        """Draw from the flow, without gradient; see `rsample`."""
        with torch.no_grad():
            return self.rsample(sample_shape, context, generator=generator)

    def rsample(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> Float[Tensor, "*shape_and_event"]:
        """Draw from the flow, differentiably: ``(*sample_shape, *batch, *event_shape)``.

        Args:
            sample_shape: Number or shape of the draws for each context.
            context: What the density is conditioned on.
            generator: Source of the draws.
        """
        shape = self._shape(sample_shape, context, generator)
        z = self.base.rsample(shape, context, generator=generator)
        return self.transforms.to_data(z, context, generator=generator)

    def sample_and_log_prob(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> tuple[Float[Tensor, "*shape_and_event"], Float[Tensor, "*shape"]]:
        """Draws and their log-densities, without gradient; see `rsample_and_log_prob`."""
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape, context, generator=generator)

    def rsample_and_log_prob(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> tuple[Float[Tensor, "*shape_and_event"], Float[Tensor, "*shape"]]:
        """Draws and their log-densities in nats from one solve, differentiably.

        A part that makes a lower bound takes a second solve, by `log_prob`: the weight at the very
        numbers that the draw came from is too large on average to be a bound.
        """
        if "lower_bound" in self.transforms.likelihoods:
            x = self.rsample(sample_shape, context, generator=generator)
            return x, self.log_prob(x, context, generator=generator)
        shape = self._shape(sample_shape, context, generator)
        z = self.base.rsample(shape, context, generator=generator)
        x, ladj = self.transforms.to_data_and_ladj(z, context, generator=generator)
        return x, self.base.log_prob(z, context, generator=generator) - ladj

    def to_base(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> Float[Tensor, "*joint_batch base_features"]:
        """From data to base."""
        x = self._validate("x", x, context, generator)
        return self.transforms.to_base(x, context, generator=generator)

    def to_data(
        self, z: BaseRows, context: Context | None = None, *, generator: Generator | None = None
    ) -> Float[Tensor, "*joint_batch_and_event"]:
        """From base to data."""
        z = self._validate("z", z, context, generator, "base")
        return self.transforms.to_data(z, context, generator=generator)

    def to_base_and_ladj(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> tuple[Float[Tensor, "*joint_batch base_features"], Float[Tensor, "*joint_batch"]]:
        """From data to base: z and log|det dz/dx|, in nats."""
        x = self._validate("x", x, context, generator)
        return self.transforms.to_base_and_ladj(x, context, generator=generator)

    def to_base_with_costs(
        self,
        x: Events,
        context: Context | None = None,
        *,
        regularizers: Sequence[CostRate],
        generator: Generator | None = None,
    ) -> tuple[
        Float[Tensor, "*joint_batch base_features"],
        Float[Tensor, "*joint_batch"],
        Float[Tensor, "costs *joint_batch"],
    ]:
        """From data to base: z, ladj in nats, and the cost of the path by each regularizer."""
        x = self._validate("x", x, context, generator)
        return self.transforms.to_base_with_costs(
            x, context, regularizers=regularizers, generator=generator
        )

    def to_data_and_ladj(
        self, z: BaseRows, context: Context | None = None, *, generator: Generator | None = None
    ) -> tuple[Float[Tensor, "*joint_batch_and_event"], Float[Tensor, "*joint_batch"]]:
        """From base to data: x and log|det dx/dz|, in nats."""
        z = self._validate("z", z, context, generator, "base")
        return self.transforms.to_data_and_ladj(z, context, generator=generator)

    def trajectory(
        self,
        x_or_z: Events,
        times: Float[Tensor, " times"],
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> Float[Tensor, "times *joint_batch_and_event"]:
        """States along the path, in the units of the data; the base side must be an ODE.

        Args:
            x_or_z: Where the path starts: data if ``times[0]`` is 1, base points if it is 0.
            times: Strictly increasing or decreasing, within [0, 1]. Several blocks in a row
                share the time between them evenly.
            context: What the density is conditioned on.
            generator: Source of what a transform draws on the way to the ODE.

        Returns:
            The state at each time. What lies between the ODE and the data, such as a
            `Standardize`, is applied to every state, those at t = 0 included.
        """
        times = check_times(times, like=reference_tensor(self))
        where = "base" if times[0] == 0 else ""
        x_or_z = self._validate("x_or_z", x_or_z, context, generator, where)
        return follow(self.transforms, x_or_z, times, context, generator=generator)

    def _shape(
        self, sample_shape: int | Sequence[int], context: Tensor | None, generator: Generator | None
    ) -> torch.Size:
        """Shape of the draws for a context, without that of an event."""
        like = reference_tensor(self)
        check_context(context, self.context_features, like=like)
        check_generator(generator, like=like)
        batch = torch.Size() if context is None else context.shape[:-1]
        shape = check_sample_shape(sample_shape) + batch
        numbers = math.prod(shape) * max(self.base.features, math.prod(self.event_shape))
        remedy = "Draw fewer at once, or with sample_in_chunks into a file."
        check_fits("sample_shape", sample_shape, numbers, like=like, remedy=remedy)
        return shape

    def _log_mean_weight(
        self, x: Tensor, context: Tensor | None, samples: int, generator: Generator | None
    ) -> Tensor:
        """The lower bound by `samples` weights of each row, all of which are in the support."""
        remedy = "Take fewer, or fewer rows at once."
        check_fits("importance_samples", samples, samples * x.numel(), like=x, remedy=remedy)
        x = x.expand(samples, *x.shape)
        with rows_of_caller(lambda row: row[1:]):
            z, ladj = self.transforms.to_base_and_ladj(x, context, generator=generator)
        log_prob = self.base.log_prob(z, context, generator=generator)
        return (log_prob + ladj).logsumexp(0) - math.log(samples)

    def _validate(
        self,
        name: str,
        x: Tensor,
        context: Tensor | None,
        generator: Generator | None,
        where: str = "",
    ) -> Tensor:
        """The public door: check what comes in, and give `x` the joint batch shape.

        Rows must be in the support, unless they are at the "base" or may be "anywhere".
        """
        shape = torch.Size([self.base.features]) if where == "base" else self.event_shape
        check_events(name, x, shape, like=reference_tensor(self))
        check_context(context, self.context_features, like=reference_tensor(self))
        check_generator(generator, like=reference_tensor(self))
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *self.parameters())
        ):
            check_trainable("flow", self)
        if not where:
            check_support(name, x, self.support)
        return x.expand(joint_batch_shape(x, context, len(shape)) + shape)
