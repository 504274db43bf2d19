"""The transform that follows an ordinary differential equation."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cnf.divergence import Divergence, Exact
from cnf.ode import ODESolver, RightHandSide, State
from cnf.regularizers import CostRate, needs_products
from cnf.transforms.base import Likelihood, Transform
from cnf.vector_fields import VectorField

_MANY_FEATURES = 64


class ContinuousTransform(Transform):
    r"""Follows dx/dt = v(t, x | context), from the base at t = 0 to the data at t = `end_time`.

    The ladj is the integral of the divergence of v along the path, from where the call starts to
    where it ends: :math:`-\int_0^T \nabla \cdot v \, dt` towards the base, T being
    `end_time`.

    Args:
        vector_field: The field v.
        divergence: How its divergence is computed; None for `Exact`.
        solver: How the ODE is solved; None for `ODESolver()`.
        end_time: Time of the data. A field that depends on t sees t in [0, `end_time`].
        learn_end_time: Whether the end time, which starts from `end_time`, is a parameter. (It was
            meant to be in FFJORD's published code, where it gets no gradient.)

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `end_time` is not positive and finite.

    References:
        Chen et al. (2018), Neural Ordinary Differential Equations, theorem 1.
        https://arxiv.org/abs/1806.07366

    Example:
        >>> from cnf.vector_fields import LinearField
        >>> transform = ContinuousTransform(LinearField(features=2))
        >>> transform.to_base(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        vector_field: VectorField,
        *,
        divergence: Divergence | None = None,
        solver: ODESolver | None = None,
        end_time: float = 1.0,
        learn_end_time: bool = False,
    ) -> None:
        _check_type("vector_field", vector_field, VectorField, "wrap a network in ModuleField")
        if divergence is not None:
            _check_type("divergence", divergence, Divergence, "use Exact() or Hutchinson()")
        if solver is not None:
            _check_type("solver", solver, ODESolver, "use ODESolver(method=...)")
        super().__init__(vector_field.features, vector_field.context_features)
        self.vector_field = vector_field
        self.divergence = divergence
        self.solver = ODESolver() if solver is None else solver
        if not 0 < end_time < math.inf:
            raise ValueError(f"end_time must be positive and finite; got {end_time}.")
        self.end_time = end_time
        self.learn_end_time = learn_end_time
        if learn_end_time:
            self.log_end_time = nn.Parameter(torch.tensor(math.log(end_time)))

    @property
    def likelihood(self) -> Likelihood:
        """Exact to solver tolerance, or an unbiased estimate."""
        return "exact" if self.divergence is None or self.divergence.is_exact else "estimate"

    def using(
        self, *, solver: ODESolver | None = None, divergence: Divergence | None = None
    ) -> "ContinuousTransform":
        """The same transform, sharing every parameter, with another solver or divergence."""
        other = ContinuousTransform(
            self.vector_field,
            divergence=self.divergence if divergence is None else divergence,
            solver=self.solver if solver is None else solver,
            end_time=self.end_time,
            learn_end_time=self.learn_end_time,
        )
        if self.learn_end_time:
            other.log_end_time = self.log_end_time
        return other

    def rebuilt(
        self, change: Callable[["ContinuousTransform"], "ContinuousTransform"]
    ) -> "ContinuousTransform":
        """What `change` makes of this transform."""
        return change(self)

    def to_base_and_ladj(
        self,
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "*batch"]]:
        """Solve from the end time to 0: z and the ladj, in nats, for each row."""
        z, ladj = self._move(x, context, 1.0, 0.0, generator)
        return z, ladj

    def to_data_and_ladj(
        self,
        z: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "*batch"]]:
        """Solve from 0 to the end time: x and the ladj, in nats, for each row."""
        x, ladj = self._move(z, context, 0.0, 1.0, generator)
        return x, ladj

    def to_base(
        self,
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch features"]:
        """Solve from the end time to 0, without the ladj and its cost."""
        del generator
        return self.trajectory(x, x.new_tensor([1.0, 0.0]), context)[-1]

    def to_data(
        self,
        z: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch features"]:
        """Solve from 0 to the end time, without the ladj and its cost."""
        del generator
        return self.trajectory(z, z.new_tensor([0.0, 1.0]), context)[-1]

    def trajectory(
        self,
        x: Float[Tensor, "*batch features"],
        times: Float[Tensor, " times"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> Float[Tensor, "times *batch features"]:
        """States at `times`, strictly increasing or decreasing, that start at `x`.

        Times are shares of the end time: 0 is the base and 1 the data.
        """

        def rhs(t: Tensor, state: State) -> State:
            return (self.vector_field(t, state[0], context),)

        (states,) = self._solve(rhs, (x,), times, context)
        return states

    def to_base_with_costs(
        self,
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
        *,
        regularizers: Sequence[CostRate],
        generator: torch.Generator | None = None,
    ) -> tuple[
        Float[Tensor, "*batch features"], Float[Tensor, "*batch"], Float[Tensor, "costs *batch"]
    ]:
        """Solve from the end time to 0: z, ladj and the cost of the path by each regularizer.

        The costs are integrals over the length of time; they stand in no error norm, and so leave
        the steps as they are.
        """
        z, ladj, *costs = self._move(x, context, 1.0, 0.0, generator, regularizers)
        return z, ladj, torch.stack(costs) if costs else x.new_zeros(0, *x.shape[:-1])

    def _move(
        self,
        x: Tensor,
        context: Tensor | None,
        start: float,
        end: float,
        generator: torch.Generator | None,
        regularizers: Sequence[CostRate] = (),
    ) -> State:
        """The state at the end: moved points, ladj and costs."""
        divergence = self.divergence
        if divergence is None:
            divergence = Exact()
            self._warn_if_unwise()
        probes = divergence.draw_probes(x, generator=generator)
        products = any(map(needs_products, regularizers))
        forward = 1.0 if start < end else -1.0

        def rhs(t: Tensor, state: State) -> State:
            evaluation = divergence(
                self.vector_field, t, state[0], probes, context, products=products
            )
            costs = (forward * cost_rate(evaluation) for cost_rate in regularizers)
            return evaluation.velocity, evaluation.divergence, *costs

        state = (x, *(x.new_zeros(x.shape[:-1]) for _ in range(1 + len(regularizers))))
        times = x.new_tensor([start, end])
        solved = self._solve(rhs, state, times, context, controlled=2 if regularizers else None)
        return tuple(part[-1] for part in solved)

    def _solve(
        self,
        rhs: RightHandSide,
        state: State,
        times: Tensor,
        context: Tensor | None,
        controlled: int | None = None,
    ) -> State:
        times = times * (self.log_end_time.exp() if self.learn_end_time else self.end_time)
        if state[0].numel() == 0:
            # Nothing to solve, but the graph must reach what it reaches for other batches.
            nothing = sum(tensor.sum() for tensor in (times, *self._dependencies(context))) * 0
            return tuple(part.expand(len(times), *part.shape) + nothing for part in state)
        return self.solver.solve(
            rhs,
            state,
            times,
            dependencies=lambda: self._dependencies(context),
            controlled=controlled,
        )

    def _dependencies(self, context: Tensor | None) -> list[Tensor]:
        """Every tensor that the velocity depends on, plain attributes of a user's network too."""
        field = self.vector_field
        plain = (value for part in field.modules() for value in vars(part).values())
        return [
            *field.parameters(),
            *field.buffers(),
            *(value for value in plain if isinstance(value, Tensor)),
            *(() if context is None else (context,)),
        ]

    def _warn_if_unwise(self) -> None:
        if self.features > _MANY_FEATURES and not self.vector_field.has_closed_form_divergence:
            warnings.warn(
                f"the exact divergence costs {self.features} Jacobian products for each evaluation "
                "of this vector field; choose divergence=Hutchinson() for an unbiased estimate, or "
                "divergence=Exact() to keep it without this warning.",
                stacklevel=2,
            )


def _check_type(name: str, value: object, expected: type, remedy: str) -> None:
    if not isinstance(value, expected):
        raise TypeError(
            f"{name} must be a {expected.__name__}; got {type(value).__name__}. Perhaps {remedy}."
        )
