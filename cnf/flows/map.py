"""Map of a flow between data and base, with checks of its arguments."""

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
    check_number,
    check_support,
    check_trainable,
    is_positive,
    joint_batch_shape,
    reference_tensor,
    tensors_of,
)
from cnf._shapes import BaseRows, Context, Events
from cnf.bases import Base
from cnf.divergence import Divergence
from cnf.flows.calibration import calibrate, obstacle_to_calibration
from cnf.flows.trajectory import check_times, follow
from cnf.manifolds import OnManifold
from cnf.ode import ODESolver
from cnf.regularizers import CostRate
from cnf.transforms import Chain, ContinuousTransform, Transform
from cnf.transforms.chain import agreed_context_features, as_list, base_for
from cnf.transforms.continuous import map_continuous
from cnf.vector_fields import VectorField
from cnf.vector_fields.compiled import Compilation

_ROWS = 512
"""Most rows for a calibration."""

AnyMap = TypeVar("AnyMap", bound="FlowMap")


class FlowMap(nn.Module):
    """Map of a flow between data and base; `Flow` adds the density, and documents arguments."""

    transforms: Chain
    """Transforms, from data to base."""

    def __init__(
        self, transforms: Iterable[Transform], base: "Base | FlowMap | None" = None
    ) -> None:
        super().__init__()
        parts = as_list(transforms)
        if isinstance(base, FlowMap):
            parts = [*parts, *base.transforms]
        self.base: Base = base_for(parts, base.base if isinstance(base, FlowMap) else base)
        self.transforms = Chain(parts, None if parts else self.base.features)
        self.features = self.transforms.features
        self.event_shape = self.transforms.event_shape
        self.context_features = agreed_context_features([self.transforms, self.base])

    @classmethod
    def _with_parts(cls: type[AnyMap], transforms: Iterable[Transform], base: Base) -> AnyMap:
        """Build a flow of this class from its parts; a subclass may only add a constructor."""
        flow = cls.__new__(cls)
        FlowMap.__init__(flow, transforms, base)
        return flow

    @property
    def chain(self) -> Chain:
        """Chain of the transforms from data to base: the same as `transforms`."""
        return self.transforms

    @property
    def support(self) -> constraints.Constraint:
        """Constraint on x: real numbers, or the support of the first transforms."""
        support = self.transforms.support
        if support is None:
            support = self.base.support
        more_axes = len(self.event_shape) - 1
        return constraints.independent(support, more_axes) if more_axes else support

    @property
    def only_ode(self) -> ContinuousTransform | None:
        """The `ContinuousTransform` of a flow with exactly one, or None.

        None also if it is inside of another transform or of the base.
        """
        own = [part for part in self.transforms if isinstance(part, ContinuousTransform)]
        every = [part for part in self.modules() if isinstance(part, ContinuousTransform)]
        return own[0] if len(own) == len(every) == 1 else None

    @torch.no_grad()
    def initialize(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> None:
        """Initialise `Standardize`, `ActNorm`, scalings of contexts and the like from rows.

        `fit` calls it. Parts that have been initialised or loaded do not change.

        Raises:
            ValueError: If the rows do not fit, or a column is constant up to rounding.
        """
        check_trainable("flow", self)
        x = self._validate("x", x, context, generator)
        self.transforms.initialize(x, context, generator=generator)
        if self.base.needs_initialization:
            z = self.transforms.to_base(x, context, generator=generator)
            self.base.initialize(z, context, generator=generator)

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the solves of `log_prob`, in nats, summed over the continuous transforms.

        None if one of them has none, as before `calibrate`.
        """
        parts = [part for part in self.modules() if isinstance(part, ContinuousTransform)]
        known = [part.solver.accuracy for part in parts if part.solver.accuracy is not None]
        return sum(known) if parts and len(known) == len(parts) else None

    def calibrate(
        self,
        x: Events,
        context: Context | None = None,
        *,
        accuracy: float = 1e-3,
        generator: Generator | None = None,
    ) -> None:
        """Choose the steps of the solves once, from rows, for a stated accuracy of `log_prob`.

        Each continuous transform gets a fixed-step solver with uneven `times`, in place: other
        flows that share the transform get it too. Every row is then solved on two grids and, where
        these differ, on finer ones, until the estimated error of the row is at most `accuracy`: the
        result of a row does not depend on the others, except within `accuracy` if one of them
        overflows on the first two grids. The estimate is from the change between two grids, and
        how much smaller errors were for `x`; of 1000 rows a few have an error a few times as large.
        `to_base`, `to_data` and `sample` refine a row until its point changes by at most half of
        `accuracy`: at the base twice in a row, at the data not if it changed 32 times as much
        before. Calibrate again when parameters have changed.

        Args:
            x: Rows such as the training rows; 512 of them are used, evenly from first to last.
            context: Context of a conditional flow.
            accuracy: Largest estimated error of a log-density, in nats, for each ODE; for rows that
                end far out at the base, the error may be in proportion to the log-density.
            generator: Source of random numbers of transforms and estimates.

        Raises:
            ValueError: If the rows do not fit; the flow follows no ODE; its base is neither a
                `StandardNormal` nor uniform on a manifold; or a transform behind an ODE changes
                what an error is worth.
            ODEError: If the accuracy is out of reach.
        """
        accuracy = check_number("accuracy", accuracy, "positive and finite", is_positive)
        if obstacle := obstacle_to_calibration(self.transforms, self.base):
            raise ValueError(obstacle)
        x = self._validate("x", x, context, generator)
        if x.numel() == 0:
            raise ValueError(f"x must have at least one row; got shape {tuple(x.shape)}.")
        shape = x.shape[: x.ndim - len(self.event_shape)]
        every = -(-math.prod(shape) // _ROWS)
        if context is not None:
            context = context.expand(*shape, -1).reshape(-1, self.context_features)[::every]
        rows = x.reshape(-1, *self.event_shape)[::every]
        calibrate(self.transforms, rows, context, accuracy, generator)

    def using(
        self: AnyMap, *, solver: ODESolver | None = None, divergence: Divergence | None = None
    ) -> AnyMap:
        """Return the flow with another solver or divergence; it shares every parameter."""
        change = methodcaller("using", solver=solver, divergence=divergence)
        return self.map_continuous(change)

    def map_continuous(
        self: AnyMap, change: Callable[[ContinuousTransform], ContinuousTransform]
    ) -> AnyMap:
        """Return the flow with `change` applied to each continuous transform, nested ones too.

        It shares every parameter. `change` returns a transform of the same size, such as
        ``part.using(start_time=0.1)``.
        """
        return map_continuous(self, change)

    def compile(
        self, *, backend: str | Callable[..., Any] = "inductor", mode: str | None = None
    ) -> None:
        """Compile the evaluations of the vector fields, in place, for speed.

        Each program is compiled at first use, in seconds to a minute: for the velocity, the
        divergence, Jacobian products and whole steps of fixed size, with and without gradients.
        All batch sizes and times share it, as do `using` and the objectives. Saved, copied and
        pickled flows are not compiled. Where torch.compile cannot work, a warning says what to
        install, and the flow runs uncompiled, as it does within `torch.func`. Gradients of
        gradients, which torch.compile does not support, raise an error.

        Args:
            backend: Backend of `torch.compile`.
            mode: Mode of `torch.compile`.

        Raises:
            ValueError: If the flow has no vector field.
            RuntimeError: If torch knows no such backend or mode.
        """
        fields = [part for part in self.modules() if isinstance(part, VectorField)]
        if not fields:
            raise ValueError(
                "flow must have a vector field to compile; got only discrete transforms. "
                "Try torch.compile(flow.log_prob)."
            )
        compilation = Compilation(backend=backend, mode=mode)
        for field in fields:
            field.compilation = compilation

    def to_base(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> Float[Tensor, "*joint_batch base_features"]:
        """Map data to base."""
        x = self._validate("x", x, context, generator)
        return self.transforms.to_base(x, context, generator=generator)

    def to_data(
        self, z: BaseRows, context: Context | None = None, *, generator: Generator | None = None
    ) -> Float[Tensor, "*joint_batch_and_event"]:
        """Map base to data."""
        z = self._validate("z", z, context, generator, "base")
        return self.transforms.to_data(z, context, generator=generator)

    def to_base_and_ladj(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> tuple[Float[Tensor, "*joint_batch base_features"], Float[Tensor, "*joint_batch"]]:
        """Map data to base: z and log|det dz/dx|, in nats."""
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
        """Map data to base: z, ladj in nats, and the cost of the path by each regularizer."""
        x = self._validate("x", x, context, generator)
        return self.transforms.to_base_with_costs(
            x, context, regularizers=regularizers, generator=generator
        )

    def to_data_and_ladj(
        self, z: BaseRows, context: Context | None = None, *, generator: Generator | None = None
    ) -> tuple[Float[Tensor, "*joint_batch_and_event"], Float[Tensor, "*joint_batch"]]:
        """Map base to data: x and log|det dx/dz|, in nats."""
        z = self._validate("z", z, context, generator, "base")
        return self.transforms.to_data_and_ladj(z, context, generator=generator)

    def distance(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> Float[Tensor, "*joint_batch"]:
        """Return how far each row is from the surface of the flow, where the flow projects it.

        It is the Euclidean norm of x - x', with x' = ``to_data(to_base(x))``; on a manifold, the
        length of the geodesic. A flow that covers all of space, or the manifold, has distance 0, up
        to rounding, unless it draws.
        """
        x = self._validate("x", x, context, generator)
        return self._distance(x, context, generator)

    def trajectory(
        self,
        x_or_z: Events,
        times: Float[Tensor, " times"],
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> Float[Tensor, "times *joint_batch_and_event"]:
        """Return the states along the trajectory, in the units of the data.

        The last transforms, on the base side, must be an ODE.

        Args:
            x_or_z: Start of the trajectory: data if ``times[0]`` is 1, base points if it is 0.
            times: Strictly increasing or decreasing, within [0, 1]. Several blocks in a row
                take equal parts of the time.
            context: Context of a conditional flow.
            generator: Source of random numbers of the transforms between data and ODE.

        Returns:
            The state at each time. Transforms between the ODE and the data, such as a
            `Standardize`, are applied to every state, also at t = 0.
        """
        times = check_times(times, like=reference_tensor(self))
        where = "base" if times[0] == 0 else ""
        x_or_z = self._validate("x_or_z", x_or_z, context, generator, where)
        return follow(self.transforms, x_or_z, times, context, generator=generator)

    def _distance(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        """Return the distance of checked rows."""
        # The transforms behind are bijections, whose two directions cancel.
        chain = self.transforms.onto_surface
        given = context if chain.context_features else None
        z = chain.to_base(x, given, generator=generator)
        back = chain.to_data(z, given, generator=generator)
        if isinstance(self.support, OnManifold):
            return self.support.manifold.distance(x, back)
        moved = x - back
        flat = moved.flatten(x.ndim - len(self.event_shape))
        distance: Tensor = torch.linalg.vector_norm(flat, dim=-1)
        return distance

    def _validate(
        self,
        name: str,
        x: Tensor,
        context: Tensor | None,
        generator: Generator | None,
        where: str = "",
    ) -> Tensor:
        """Check the arguments, and return `x` in the joint batch shape.

        Rows must be in the support, unless `where` is "base" or "anywhere".
        """
        shape = torch.Size([self.base.features]) if where == "base" else self.event_shape
        like = reference_tensor(self)
        check_events(name, x, shape, like=like)
        check_context(context, self.context_features, like=like)
        check_generator(generator, like=like)
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *tensors_of(self))
        ):
            check_trainable("flow", self)
        if not where:
            check_support(name, x, self.support)
        return x.expand(joint_batch_shape(x, context, len(shape)) + shape)
