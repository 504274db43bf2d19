"""Continuous transform: the solution of an ordinary differential equation."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import TypeVar, cast

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.distributions import constraints

from cnf._checks import check_flag, check_number, check_type, is_hidden, is_positive
from cnf._row_names import rows_of_caller, unflattened
from cnf._shapes import Context, Rows
from cnf._warnings import warn
from cnf.bases import Likelihood
from cnf.divergence import Divergence, Exact, Hutchinson
from cnf.ode import ODEError, ODESolver, State
from cnf.ode.compiled_steps import FieldSteps
from cnf.ode.levels import Goal, solve_by_levels
from cnf.regularizers import CostRate, needs_products
from cnf.transforms.base import Transform, WithLadj
from cnf.vector_fields import VectorField

_MANY_FEATURES = 64

Part = TypeVar("Part", bound=nn.Module)


class ContinuousTransform(Transform):
    r"""Solution of dx/dt = v(t, x | context), from the base at t = 0 to the data at t = `end_time`.

    The ladj is the integral of the divergence of v along the path, from its start to its end:
    :math:`-\int_0^1 \nabla \cdot v \, dt` towards the base, with the default times.

    Args:
        vector_field: The field v.
        divergence: Divergence of v; None for `Exact`.
        solver: Solver of the ODE; None for `ODESolver()`.
        start_time: Time of the base, as a fraction of the end time, less than 1.
        end_time: Time of the data. The field sees times between the two.
        learn_end_time: Whether the end time is a parameter, with initial value `end_time`. (In
            FFJORD's published code this parameter gets no gradient.)

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `end_time` is not positive and finite, or `start_time` not less than 1.

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
        start_time: float = 0.0,
        end_time: float = 1.0,
        learn_end_time: bool = False,
    ) -> None:
        check_type("vector_field", vector_field, VectorField, "wrap a network in ModuleField")
        if divergence is not None:
            check_type("divergence", divergence, Divergence, "use Exact() or Hutchinson()")
        if solver is not None:
            check_type("solver", solver, ODESolver, "use ODESolver(method=...)")
        super().__init__(vector_field.features, vector_field.context_features)
        self.vector_field = vector_field
        self.divergence = divergence
        self.solver = ODESolver() if solver is None else solver
        self.start_time = check_number(
            "start_time",
            start_time,
            "finite and less than 1, as a fraction of the end time",
            lambda share: -math.inf < share < 1,
        )
        self.end_time = check_number("end_time", end_time, "positive and finite", is_positive)
        self.learn_end_time = check_flag("learn_end_time", learn_end_time)
        if learn_end_time:
            self.log_end_time = nn.Parameter(torch.tensor(math.log(end_time)))

    @property
    def support(self) -> constraints.Constraint:
        """Real vectors, or the manifold that the field is tangent to."""
        manifold = self.vector_field.manifold
        return constraints.real_vector if manifold is None else manifold.support

    @property
    def codomain(self) -> constraints.Constraint:
        """The same as `support`."""
        return self.support

    @property
    def likelihood(self) -> Likelihood:
        """Exact to solver tolerance, or an unbiased estimate."""
        return "exact" if self.divergence is None or self.divergence.is_exact else "estimate"

    def using(
        self,
        *,
        solver: ODESolver | None = None,
        divergence: Divergence | None = None,
        start_time: float | None = None,
    ) -> "ContinuousTransform":
        """Return the transform with another solver, divergence or start; it shares every parameter.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If `start_time` is not less than 1.
        """
        other = ContinuousTransform(
            self.vector_field,
            divergence=self.divergence if divergence is None else divergence,
            solver=self.solver if solver is None else solver,
            start_time=self.start_time if start_time is None else start_time,
            end_time=self.end_time,
            learn_end_time=self.learn_end_time,
        )
        if self.learn_end_time:
            other.log_end_time = self.log_end_time
        return other

    def field_times(self, times: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """Return the times that the field sees, for times from 0 (base) to 1 (data)."""
        end_time = self.log_end_time.exp() if self.learn_end_time else self.end_time
        return end_time * (self.start_time + times * (1 - self.start_time))

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._move(x, context, (1.0, 0.0), *self._draw(x, generator))

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._move(z, context, (0.0, 1.0), *self._draw(z, generator))

    def _to_base_value(
        self, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        return self._move(x, context, (1.0, 0.0), None, None)[0]

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        return self._move(z, context, (0.0, 1.0), None, None)[0]

    def _move(
        self,
        x: Tensor,
        context: Tensor | None,
        way: tuple[float, float],
        divergence: Divergence | None,
        probes: Tensor | None,
    ) -> WithLadj:
        """Return the moved points and the ladj, which is 0 without a divergence."""
        moved, ladj = self._solve_rows(x, context, way, divergence, probes)
        return self._restore(moved, x), ladj

    def _restore(self, moved: Tensor, start: Tensor) -> Tensor:
        """Return the moved points on their manifold, without the drift of the solver."""
        manifold = self.vector_field.manifold
        return moved if manifold is None else manifold.restore(moved, start)

    def _solve_rows(
        self,
        x: Tensor,
        context: Tensor | None,
        way: tuple[float, float],
        divergence: Divergence | None,
        probes: Tensor | None,
    ) -> WithLadj:
        """Solve all rows alike, or each to the accuracy of the solver."""
        if self.solver.accuracy is None or is_hidden(x):
            return self._to_end(self.solver, x, context, way, divergence, probes)
        batch = x.shape[:-1]
        if context is not None:
            context = context.expand(*batch, -1).reshape(-1, context.shape[-1])
        if probes is not None:
            if probes.shape[1:-1] != batch:
                raise ValueError(
                    f"{type(self.divergence).__name__}.draw_probes must draw probes for each row, "
                    f"of shape {('probes', *batch, 'features')}, for a solver with accuracy; got "
                    f"{tuple(probes.shape)}."
                )
            probes = probes.reshape(len(probes), -1, probes.shape[-1])
        x = x.reshape(-1, self.features)

        def solve(solver: ODESolver, rows: Tensor | None) -> State:
            if rows is None:
                return self._to_end(solver, x, context, way, divergence, probes)
            some = x[rows], None if context is None else context[rows]
            few = None if probes is None else probes[:, rows]
            with rows_of_caller(lambda row: (int(rows[row[0]]),)):
                return self._to_end(solver, *some, way, divergence, few)

        goal: Goal = "x"
        if way[0] > way[1]:
            goal = "z" if divergence is None else "density"
        with rows_of_caller(lambda row: unflattened(row[0], batch)):
            moved, ladj = solve_by_levels(solve, self.solver, goal)
        return moved.view(*batch, self.features), ladj.view(batch)

    def _to_end(
        self,
        solver: ODESolver,
        x: Tensor,
        context: Tensor | None,
        way: tuple[float, float],
        divergence: Divergence | None,
        probes: Tensor | None,
    ) -> WithLadj:
        if divergence is None:
            moved = self._follow(x, way, torch.tensor(way).to(x), context, solver=solver)[-1]
            return moved, x.new_zeros(x.shape[:-1])
        moved, ladj = self._solve(x, context, way, divergence, probes, solver=solver)
        return moved, ladj

    def trajectory(
        self, x: Rows, times: Float[Tensor, " times"], context: Context | None = None
    ) -> Float[Tensor, "times *batch features"]:
        """Return the states at `times` of the solution that starts at `x`.

        `times` are strictly increasing or decreasing, from 0 (base) to 1 (data).
        """
        way = (0.0, 1.0)
        if self.solver.times is not None:
            if is_hidden(times):
                raise ODEError(
                    "a trajectory at times that torch.vmap or torch.export hide has no uneven "
                    "grid; use ODESolver(steps=...)."
                )
            way = float(times[0]), float(times[-1])
        states = self._follow(x, way, times, context, solver=self.solver)
        return self._restore(states, x.expand_as(states))

    def _follow(
        self,
        x: Tensor,
        way: tuple[float, float],
        times: Tensor,
        context: Tensor | None,
        *,
        solver: ODESolver,
    ) -> Tensor:
        """Return the states at `times`, whose first and last are `way`."""

        def rhs(t: Tensor, state: State) -> State:
            return (self.vector_field(t, state[0], context),)

        programs = None
        if self.vector_field.compilation is not None:
            programs = FieldSteps(self.vector_field, _velocity, (context,))
        dependencies = partial(self.vector_field.dependencies, context)
        (states,) = solver.solve(
            rhs,
            (x,),
            self.field_times(times),
            way=way,
            dependencies=dependencies,
            programs=programs,
        )
        return states

    def _to_base_with_costs(
        self,
        x: Tensor,
        context: Tensor | None,
        generator: Generator | None,
        regularizers: Sequence[CostRate],
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The error norm leaves costs out, so they do not change the steps.
        drawn = self._draw(x, generator)
        z, ladj, *costs = self._solve(
            x, context, (1.0, 0.0), *drawn, solver=self.solver, regularizers=regularizers
        )
        z = self._restore(z, x)
        return z, ladj, torch.stack(costs) if costs else x.new_zeros(0, *x.shape[:-1])

    def _draw(self, x: Tensor, generator: Generator | None) -> tuple[Divergence, Tensor | None]:
        """Return the divergence, and its probes for a solve that starts at x."""
        divergence = self.divergence
        if divergence is None:
            divergence = Exact()
            if self.features > _MANY_FEATURES:
                self._warn_if_unwise()
        return divergence, divergence.draw_probes(x, generator=generator)

    def _solve(
        self,
        x: Tensor,
        context: Tensor | None,
        way: tuple[float, float],
        divergence: Divergence,
        probes: Tensor | None,
        *,
        solver: ODESolver,
        regularizers: Sequence[CostRate] = (),
    ) -> State:
        """Return the final state: moved points, ladj and costs."""
        products = any(map(needs_products, regularizers))
        forward = way[1] - way[0]

        def rhs(t: Tensor, state: State) -> State:
            evaluation = divergence(
                self.vector_field, t, state[0], probes, context, products=products
            )
            costs = (forward * cost_rate(evaluation) for cost_rate in regularizers)
            return evaluation.velocity, evaluation.divergence, *costs

        state = (x, *(x.new_zeros(x.shape[:-1]) for _ in range(1 + len(regularizers))))
        times = torch.tensor(way).to(x)
        programs = None
        is_compiled = self.vector_field.compilation is not None
        if is_compiled and not regularizers and isinstance(divergence, Exact | Hutchinson):
            inputs = (divergence, probes, context)
            programs = FieldSteps(self.vector_field, _velocity_and_divergence, inputs)
        solved = solver.solve(
            rhs,
            state,
            self.field_times(times),
            way=way,
            dependencies=partial(self.vector_field.dependencies, context),
            controlled=2 if regularizers else None,
            programs=programs,
        )
        return tuple(part[-1] for part in solved)

    def _warn_if_unwise(self) -> None:
        if not self.vector_field.has_closed_form_divergence:
            warn(
                f"the exact divergence costs {self.features} Jacobian products for each evaluation "
                "of this vector field; choose divergence=Hutchinson() for an unbiased estimate, or "
                "divergence=Exact() to keep it without this warning."
            )


def map_continuous(
    module: Part, change: Callable[[ContinuousTransform], ContinuousTransform]
) -> Part:
    """Return the module with `change` applied to each continuous transform inside.

    It shares every parameter. Modules without continuous transforms are not copied.

    Raises:
        ValueError: If `change` returns a transform of another size.
    """
    if isinstance(module, ContinuousTransform):
        changed = change(module)
        check_type("change", changed, ContinuousTransform, "return one, as part.using(...) does")
        if changed.features != module.features:
            raise ValueError(
                f"change must keep the {module.features} features of a transform; got "
                f"{changed.features}."
            )
        return cast(Part, changed)
    parts = {
        name: None if part is None else map_continuous(part, change)
        for name, part in module._modules.items()
    }
    if all(part is module._modules[name] for name, part in parts.items()):
        return module
    copied = copy(module)
    copied._modules = parts
    return copied


def without_costs(module: nn.Module) -> list[tuple[str, ContinuousTransform]]:
    """Return the ODEs inside of transforms that pass no costs of paths on, with their names."""
    return [
        (type(part).__name__, inner)
        for part in module.modules()
        if isinstance(part, Transform)
        and type(part)._to_base_with_costs is Transform._to_base_with_costs
        for inner in part.modules()
        if isinstance(inner, ContinuousTransform)
    ]


def _velocity(field: VectorField, t: Tensor, x: Tensor, context: Tensor | None) -> State:
    # Not through ``__call__``, whose hooks cannot be compiled.
    return (field._velocity(t, x, context),)


def _velocity_and_divergence(
    field: VectorField,
    t: Tensor,
    x: Tensor,
    divergence: Divergence,
    probes: Tensor | None,
    context: Tensor | None,
) -> State:
    evaluation = divergence(field, t, x, probes, context)
    return evaluation.velocity, evaluation.divergence
