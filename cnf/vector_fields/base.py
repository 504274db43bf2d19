"""Base class of the vector fields v(t, x | context) of continuous flows, and their evaluations."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from cnf._checks import check_count, functions_are_transformed, is_exporting, refuse_overrides
from cnf._shapes import Context, NarrowProbes, Probes, Rows, Times, Values
from cnf.manifolds import Manifold
from cnf.vector_fields.compiled import Compilation
from cnf.vector_fields.jacobian.autograd import (
    derivative_along,
    outside_inference_mode,
    standard_basis,
    usable_by_autograd,
    vector_jacobian_product,
)

_HOOKS = {
    "forward": "_velocity(t, x, context), which returns the velocity",
    "velocity_and_divergence": "_velocity_and_divergence(t, x, context), which returns both",
    "velocity_and_products": "_velocity_and_products(t, x, probes, context), which returns both",
    "velocity_and_bottleneck_products": (
        "_velocity_and_bottleneck_products(t, x, probes, context), which returns both"
    ),
}
"""Hooks that a subclass writes in place of final methods."""


class VectorField(nn.Module, ABC):
    """Vector field: the velocity dx/dt at (t, x), given a context; t = 0 is the base, t = 1 data.

    The public methods that evaluate are final: they count the evaluation, and run a program where
    the field is compiled. A subclass writes the hook `_velocity`; everything else then works by
    reverse-mode differentiation. A field with a cheaper way writes `_velocity_and_products` and
    `_velocity_and_divergence` too. Hooks take the time, the points, the probes if any, and the
    context or None.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.

    Raises:
        TypeError: If a size is not an int, or a subclass overrides a final method.
        ValueError: If `features` is less than 1 or `context_features` less than 0.

    Example:
        >>> class Spiral(VectorField):
        ...     def _velocity(self, t, x, context):
        ...         return torch.stack([-x[..., 1], x[..., 0]], -1) - 0.5 * x
        >>> Spiral(2).velocity_and_divergence(torch.tensor(0.0), torch.ones(1, 2))[1]
        tensor([-1.])
    """

    compilation: Compilation | None = None
    """Compiled programs of the hooks; None until `compile`."""
    has_programs: bool = False
    """Whether the hooks of divergence and products can be compiled: reverse mode cannot."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that overrides a final method in place of its hook."""
        super().__init_subclass__(**kwargs)
        refuse_overrides(cls, VectorField, _HOOKS)
        cls.has_programs = cls._velocity_and_products is not VectorField._velocity_and_products

    def __init__(self, features: int, context_features: int = 0) -> None:
        super().__init__()
        self.features = check_count("features", features)
        self.context_features = check_count("context_features", context_features, least=0)

    @property
    def manifold(self) -> Manifold | None:
        """Manifold that the field is tangent to; None for Euclidean space."""
        return None

    @property
    def shares_times(self) -> bool:
        """Whether t may have any shape that broadcasts with ``(*batch,)``: times shared by rows."""
        return False

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether `velocity_and_divergence` costs about one evaluation, for any `features`."""
        return False

    @property
    def bottleneck(self) -> int | None:
        """Width of the narrowest layer, if it is known and less than `features`."""
        return None

    @final  # type: ignore[misc]  # to torch, forward is an attribute that may be written
    def forward(self, t: Times, x: Rows, context: Context | None = None) -> Rows:
        """Return the velocity at `x`.

        Args:
            t: Time, 0-dim or one for each row, ``(*batch,)``.
            x: Points, ``(*batch, features)``.
            context: Its batch axes broadcast to the batch axes of `x`.
        """
        if self.compilation is not None:
            return self.compilation.run(self._velocity, t, x, context)
        return self._velocity(t, x, context)

    @final
    def velocity_and_divergence(
        self, t: Times, x: Rows, context: Context | None = None
    ) -> tuple[Rows, Values]:
        """Return the velocity and its exact divergence."""
        if self._forward_pre_hooks:
            self._count_evaluation(t, x, context)
        if self.compilation is not None:
            return self.compilation.run(self._velocity_and_divergence, t, x, context)
        return self._velocity_and_divergence(t, x, context)

    @final
    def velocity_and_products(
        self, t: Times, x: Rows, probes: Probes, context: Context | None = None
    ) -> tuple[Rows, Probes]:
        r"""Return the velocity, and the product of its Jacobian J = ∂v/∂x with each probe.

        By reverse mode the products are :math:`J^\top p`, by forward mode :math:`J p`. Both give
        the same :math:`p^\top J p`, and the same sum of squares over a basis (or mean over random
        probes).
        """
        if self._forward_pre_hooks:
            self._count_evaluation(t, x, context)
        if self.compilation is not None:
            return self.compilation.run(self._velocity_and_products, t, x, probes, context)
        return self._velocity_and_products(t, x, probes, context)

    @final
    def velocity_and_bottleneck_products(
        self, t: Times, x: Rows, probes: NarrowProbes, context: Context | None = None
    ) -> tuple[Rows, NarrowProbes]:
        r"""Return the velocity, and the products of probes with a smaller matrix of the same trace.

        For v = g(h(x)) with h of the width `bottleneck`, :math:`\mathrm{tr} (\partial g/\partial h)
        (\partial h/\partial x) = \mathrm{tr} (\partial h/\partial x)(\partial g/\partial h)`. The
        latter matrix is smaller, and the variance of its trace estimate may be smaller, too.

        Raises:
            NotImplementedError: If `bottleneck` is None.

        References:
            Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367
        """
        if self.bottleneck is None:
            raise NotImplementedError(
                f"this {type(self).__name__} has no bottleneck; use velocity_and_products, or a "
                f"field with a hidden layer narrower than its {self.features} features."
            )
        if self._forward_pre_hooks:
            self._count_evaluation(t, x, context)
        if self.compilation is not None:
            return self.compilation.run(
                self._velocity_and_bottleneck_products, t, x, probes, context
            )
        return self._velocity_and_bottleneck_products(t, x, probes, context)

    @abstractmethod
    def _velocity(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """Hook: the velocity."""

    def _velocity_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hook: the velocity and its divergence. Default: the trace over the standard basis."""
        basis = standard_basis(x)
        velocity, products = self._velocity_and_products(t, x, basis, context)
        return velocity, (basis * products).sum(-1).sum(0)

    def _velocity_and_products(
        self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hook: the velocity and Jacobian products. Default: by reverse mode."""
        if is_exporting():
            raise RuntimeError(
                f"torch.export cannot follow the divergence of a {type(self).__name__}: it takes "
                "backward passes; export to_data, or write _velocity_and_products."
            )
        if functions_are_transformed():
            velocity, pull, *_ = torch.func.vjp(lambda x: self._velocity(t, x, context), x)
            products = [pull(probe)[0] for probe in probes]
            return velocity, torch.stack(products) if products else torch.zeros_like(probes)
        with outside_inference_mode():
            t, x, probes = (usable_by_autograd(tensor) for tensor in (t, x, probes))
            context = None if context is None else usable_by_autograd(context)
            differentiable = torch.is_grad_enabled()
            with torch.enable_grad():
                # A view, because no gradient reaches a view made without a graph, such as torch
                # passes to the forward of an `autograd.Function`.
                tracked = differentiable and x.requires_grad
                point = x.view_as(x) if tracked else x.detach().requires_grad_()
                velocity = self._velocity(t, point, context)
                products = [
                    vector_jacobian_product(velocity, point, probe, differentiable)
                    for probe in probes
                ]
        stacked = torch.stack(products) if products else torch.zeros_like(probes)
        return (velocity if differentiable else velocity.detach()), stacked

    def _velocity_and_bottleneck_products(
        self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hook: the velocity and products at the bottleneck, for a field that has one."""
        raise NotImplementedError

    def velocity_derivative(
        self, t: Times, x: Rows, dt: float, dx: Rows, context: Context | None = None
    ) -> Rows:
        """Return the derivative of the velocity in the direction (`dt`, `dx`).

        With `dt` = 1 and `dx` the velocity it is the acceleration along the path.
        """
        return derivative_along(
            lambda t, x: self(t, x, context), (t, x), (torch.full_like(t, dt), dx)
        )

    def dependencies(self, context: Context | None = None) -> list[Tensor]:
        """Return every tensor but t and x that the velocity depends on, for `ODESolver.solve`.

        It includes plain tensor attributes of a user's network.
        """
        plain = (value for part in self.modules() for value in vars(part).values())
        return [
            *self.parameters(),
            *self.buffers(),
            *(value for value in plain if isinstance(value, Tensor)),
            *(() if context is None else (context,)),
        ]

    def compile(
        self, *, backend: str | Callable[..., Any] = "inductor", mode: str | None = None
    ) -> None:
        """Compile the evaluations of this field in place, each at its first call.

        Divergence and Jacobian products are compiled unless the field computes them by reverse
        mode. See `Flow.compile`.
        """
        self.compilation = Compilation(backend=backend, mode=mode)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without programs, which cannot be copied: a copy is not compiled."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("compilation", None)
        return state

    @property
    def is_only_counted(self) -> bool:
        """Whether evaluation counts are the only torch hooks on this field."""
        before = self._forward_pre_hooks.values()
        others = (self._forward_hooks, self._backward_hooks, self._backward_pre_hooks)
        return not any(others) and all(
            isinstance(getattr(hook, "__self__", None), EvaluationCount) for hook in before
        )

    def _count_evaluation(self, t: Tensor, x: Tensor, context: Tensor | None) -> None:
        """Run the forward pre-hooks, as ``__call__`` does; the caller of a program runs them."""
        if torch.compiler.is_compiling():
            return
        for key, hook in list(self._forward_pre_hooks.items()):
            if key in self._forward_pre_hooks_with_kwargs:
                hook(self, (t, x, context), {})
            else:
                hook(self, (t, x, context))


@dataclass
class EvaluationCount:
    """Number of function evaluations (nfe) so far, in `value`."""

    value: int = 0

    def _add(self, *_: object) -> None:
        self.value += 1


@contextmanager
def count_evaluations(module: nn.Module) -> Iterator[EvaluationCount]:
    """Count the evaluations of every vector field in `module`, backward passes included.

    The count includes all threads.

    Example:
        >>> from cnf import CNF
        >>> flow = CNF(2)
        >>> with count_evaluations(flow) as nfe:
        ...     log_prob = flow.log_prob(torch.zeros(1, 2))
        >>> nfe.value > 0
        True
    """
    count = EvaluationCount()
    fields = [part for part in module.modules() if isinstance(part, VectorField)]
    handles = [field.register_forward_pre_hook(count._add) for field in fields]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
