"""A flow: a base distribution and a chain of transforms."""

from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cnf._checks import (
    check_context,
    check_sample_shape,
    check_vectors,
    joint_batch_shape,
    reference_tensor,
)
from cnf.bases import Base, StandardNormal
from cnf.distribution import FlowDistribution
from cnf.divergence import Divergence
from cnf.ode import ODESolver
from cnf.regularizers import CostRate
from cnf.trajectory import follow
from cnf.transforms import ContinuousTransform, Likelihood, Transform
from cnf.transforms.chain import agreed_context_features, check_one_dtype

_STRONGEST_FIRST: tuple[Likelihood, ...] = ("exact", "estimate", "lower_bound")

AnyFlow = TypeVar("AnyFlow", bound="Flow")


class Flow(nn.Module):
    """A density model: `base`, reached from the data through `transforms`.

    ``log p(x) = log base(z) + ladj`` in nats, where z and ladj are what the transforms make of x.
    A call with a context ``(*batch, context_features)`` broadcasts it against x; sampling gives
    ``sample_shape + batch + (features,)``. Everything random takes a `generator`.

    Args:
        transforms: From data to base.
        base: Distribution at the base; None for a standard normal.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the parts do not fit together.

    References:
        Papamakarios et al. (2021), Normalizing Flows for Probabilistic Modeling and Inference.
        https://arxiv.org/abs/1912.02762
    """

    def __init__(self, transforms: Iterable[Transform], base: Base | None = None) -> None:
        super().__init__()
        if isinstance(transforms, Transform):
            raise TypeError("transforms must be a list; put the single transform in brackets.")
        chain = list(transforms)
        for transform in chain:
            if not isinstance(transform, Transform):
                raise TypeError(
                    f"transforms must be cnf transforms; got {type(transform).__name__}."
                )
        if base is None:
            if not chain:
                raise ValueError("transforms must not be empty when base is None.")
            like = reference_tensor(nn.ModuleList(chain))
            base = StandardNormal(chain[0].features).to(like)
        if not isinstance(base, Base):
            raise TypeError(
                f"base must be a cnf.bases.Base, such as StandardNormal; got {type(base).__name__}."
            )
        self.base = base
        self.transforms = nn.ModuleList(chain)
        self.features = base.features
        self.context_features = agreed_context_features(chain)
        check_one_dtype([*chain, base])
        if any(transform.features != base.features for transform in chain):
            sizes = [transform.features for transform in chain]
            raise ValueError(
                f"transforms and base must have the same features; got {sizes} and {base.features}."
            )

    @property
    def chain(self) -> list[Transform]:
        """The transforms as a list, from data to base."""
        return cast("list[Transform]", list(self.transforms))

    @property
    def likelihood(self) -> Likelihood:
        """The weakest of "exact", "estimate" and "lower_bound" among the parts, for `log_prob`."""
        kinds = [transform.likelihood for transform in self.chain]
        return max(kinds, key=_STRONGEST_FIRST.index, default="exact")

    def using(
        self: AnyFlow, *, solver: ODESolver | None = None, divergence: Divergence | None = None
    ) -> AnyFlow:
        """The same flow, sharing every parameter, with another solver or divergence."""
        transforms = [
            part.using(solver=solver, divergence=divergence)
            if isinstance(part, ContinuousTransform)
            else part
            for part in self.chain
        ]
        return self._with_parts(transforms, self.base)

    @classmethod
    def _with_parts(cls: type[AnyFlow], transforms: Iterable[Transform], base: Base) -> AnyFlow:
        """A flow of this class from its parts; a subclass may only add a constructor."""
        flow = cls.__new__(cls)
        Flow.__init__(flow, transforms, base)
        return flow

    def forward(
        self, context: Float[Tensor, "*batch context_features"] | None = None
    ) -> FlowDistribution:
        """The flow given a context, as a `torch.distributions.Distribution`."""
        check_context(context, self.context_features, like=reference_tensor(self))
        return FlowDistribution(self, context)

    def log_prob(
        self,
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*joint_batch"]:
        """Log-density of `x`, in nats.

        Args:
            x: Points, ``(*batch, features)``.
            context: What the density is conditioned on, if the flow is conditional.
            generator: Source of the probes, if the divergence is an estimate.

        Raises:
            TypeError: If `x` or `context` is not a tensor.
            ValueError: If either has a wrong shape, dtype or device, or holds NaN or inf.
            ODEError: If a solve fails.
        """
        z, ladj = self.to_base_and_ladj(x, context, generator=generator)
        return self.base.log_prob(z) + ladj

    def sample(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Float[Tensor, "*batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*shape features"]:
        """Draw from the flow, without gradient; see `rsample`."""
        with torch.no_grad():
            return self.rsample(sample_shape, context, generator=generator)

    def rsample(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Float[Tensor, "*batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*shape features"]:
        """Draw from the flow, differentiably.

        Args:
            sample_shape: Number or shape of the draws for each context.
            context: What the density is conditioned on, if the flow is conditional.
            generator: Source of the base points.

        Returns:
            Draws, ``(*sample_shape, *batch, features)``.

        Raises:
            TypeError: If `sample_shape` is not a number or shape, or `context` not a tensor.
            ValueError: If a size is negative or the context does not fit.
            ODEError: If a solve fails.
        """
        z = self._draw_base(sample_shape, context, generator)
        for transform in reversed(self.chain):
            z = transform.to_data(z, context)
        return z

    def sample_and_log_prob(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Float[Tensor, "*batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "*shape features"], Float[Tensor, "*shape"]]:
        """Draws and their log-densities in nats from one solve, without gradient."""
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape, context, generator=generator)

    def rsample_and_log_prob(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Float[Tensor, "*batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "*shape features"], Float[Tensor, "*shape"]]:
        """Draws and their log-densities in nats from one solve, differentiably."""
        z = self._draw_base(sample_shape, context, generator)
        x, ladj = self._chain_to_data(z, context, generator)
        return x, self.base.log_prob(z) - ladj

    def to_base(
        self,
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> Float[Tensor, "*joint_batch features"]:
        """From data to base."""
        x = self._admit("x", x, context)
        for transform in self.chain:
            x = transform.to_base(x, context)
        return x

    def to_data(
        self,
        z: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> Float[Tensor, "*joint_batch features"]:
        """From base to data."""
        z = self._admit("z", z, context)
        for transform in reversed(self.chain):
            z = transform.to_data(z, context)
        return z

    def to_base_and_ladj(
        self,
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "*joint_batch features"], Float[Tensor, "*joint_batch"]]:
        """From data to base: z and log|det dz/dx|, in nats."""
        x = self._admit("x", x, context)
        total = x.new_zeros(x.shape[:-1])
        for transform in self.chain:
            x, ladj = transform.to_base_and_ladj(x, context, generator=generator)
            total = total + ladj
        return x, total

    def to_base_with_costs(
        self,
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        regularizers: Sequence[CostRate],
        generator: torch.Generator | None = None,
    ) -> tuple[
        Float[Tensor, "*joint_batch features"],
        Float[Tensor, "*joint_batch"],
        Float[Tensor, "costs *joint_batch"],
    ]:
        """From data to base: z, ladj in nats, and the cost of the path by each regularizer."""
        x = self._admit("x", x, context)
        ladj = x.new_zeros(x.shape[:-1])
        costs = x.new_zeros(len(regularizers), *x.shape[:-1])
        for part in self.chain:
            x, further, spent = part.to_base_with_costs(
                x, context, regularizers=regularizers, generator=generator
            )
            ladj, costs = ladj + further, costs + spent
        return x, ladj, costs

    def to_data_and_ladj(
        self,
        z: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "*joint_batch features"], Float[Tensor, "*joint_batch"]]:
        """From base to data: x and log|det dx/dz|, in nats."""
        return self._chain_to_data(self._admit("z", z, context), context, generator)

    def trajectory(
        self,
        x_or_z: Float[Tensor, "*batch features"],
        times: Float[Tensor, " times"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> Float[Tensor, "times *joint_batch features"]:
        """States along the path, in the units of the data.

        Args:
            x_or_z: Where the path starts: data if ``times[0]`` is 1, base points if it is 0.
            times: Strictly increasing or decreasing, within [0, 1]. Several blocks in a row
                share the time between them evenly.
            context: What the density is conditioned on, if the flow is conditional.

        Returns:
            The state at each time. What lies between the ODE and the data, such as a
            `Standardize`, is applied to every state, those at t = 0 included.

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If an argument does not fit, or the flow has no path because a discrete
                transform stands on the base side of a continuous one.
            ODEError: If a solve fails.
        """
        x_or_z = self._admit("x_or_z", x_or_z, context)
        return follow(self.chain, x_or_z, times, context)

    def _chain_to_data(
        self, z: Tensor, context: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[:-1])
        for transform in reversed(self.chain):
            z, ladj = transform.to_data_and_ladj(z, context, generator=generator)
            total = total + ladj
        return z, total

    def _draw_base(
        self,
        sample_shape: int | Sequence[int],
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        shape = check_sample_shape(sample_shape)
        check_context(context, self.context_features, like=reference_tensor(self))
        batch = torch.Size() if context is None else context.shape[:-1]
        return self.base.rsample(shape + batch, generator=generator)

    def _admit(self, name: str, x: Tensor, context: Tensor | None) -> Tensor:
        """The public door: check both tensors, and give `x` the joint batch shape."""
        like = reference_tensor(self)
        check_vectors(name, x, self.features, like=like)
        check_context(context, self.context_features, like=like)
        return x.expand(*joint_batch_shape(x, context), self.features)
