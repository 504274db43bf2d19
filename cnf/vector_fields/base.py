"""The vector field v(t, x | context) of a continuous flow, and what one evaluation can yield."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cnf._checks import check_count, is_exporting
from cnf.vector_fields.compiled import Compilation
from cnf.vector_fields.jacobian.autograd import (
    derivative_along,
    functions_are_transformed,
    outside_inference_mode,
    standard_basis,
    usable_by_autograd,
    vector_jacobian_product,
)

_EVALUATIONS = (
    "forward",
    "velocity_and_divergence",
    "velocity_and_products",
    "velocity_and_bottleneck_products",
)


class VectorField(nn.Module, ABC):
    """Velocity dx/dt at (t, x), given a context; t = 0 is the base and t = 1 the data.

    A subclass defines `forward`; everything else then works by reverse-mode differentiation. A
    field that knows a cheaper way overrides the methods below.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If `features` is less than 1 or `context_features` less than 0.
    """

    def __init__(self, features: int, context_features: int = 0) -> None:
        super().__init__()
        self.features = check_count("features", features)
        self.context_features = check_count("context_features", context_features, least=0)

    @abstractmethod
    def forward(
        self,
        t: Float[Tensor, "*t_batch"],
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> Float[Tensor, "*batch features"]:
        """Velocity at `x`.

        Args:
            t: Time, 0-dim or one for each row, ``(*batch,)``.
            x: Points, ``(*batch, features)``.
            context: Its batch axes broadcast to those of `x`.
        """

    @property
    def shares_times(self) -> bool:
        """Whether t may have any shape that broadcasts with ``(*batch,)``: times shared by rows."""
        return False

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether `velocity_and_divergence` costs about one evaluation, however many features."""
        return False

    def velocity_and_products(
        self,
        t: Float[Tensor, "*t_batch"],
        x: Float[Tensor, "*batch features"],
        probes: Float[Tensor, "probes *batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "probes *batch features"]]:
        r"""Velocity, and the product of its Jacobian J = ∂v/∂x with each probe.

        The products are :math:`J^\top p` here, by reverse-mode differentiation; a field that
        carries tangents forward gives :math:`J p`. Either serves: :math:`p^\top J p` is the same
        number, and so is the sum of squares over a basis (or its mean over random probes).
        """
        if is_exporting():
            raise RuntimeError(
                f"torch.export cannot follow the divergence of a {type(self).__name__}, which is "
                "made by backward passes; export to_data, or define velocity_and_products."
            )
        if functions_are_transformed():
            self._announce_evaluation(t, x, context)
            velocity, pull, *_ = torch.func.vjp(
                lambda x: type(self).forward(self, t, x, context), x
            )
            products = [pull(probe)[0] for probe in probes]
            return velocity, torch.stack(products) if products else torch.zeros_like(probes)
        with outside_inference_mode():
            t, x, probes = (usable_by_autograd(tensor) for tensor in (t, x, probes))
            context = None if context is None else usable_by_autograd(context)
            differentiable = torch.is_grad_enabled()
            with torch.enable_grad():
                # A view: x may be one itself that was made without a graph, as torch hands it to
                # the forward pass of an `autograd.Function`, and no gradient reaches such a one.
                tracked = differentiable and x.requires_grad
                point = x.view_as(x) if tracked else x.detach().requires_grad_()
                # Not a compiled forward, which cannot be differentiated twice.
                self._announce_evaluation(t, point, context)
                velocity = type(self).forward(self, t, point, context)
                products = [
                    vector_jacobian_product(velocity, point, probe, differentiable)
                    for probe in probes
                ]
        stacked = torch.stack(products) if products else torch.zeros_like(probes)
        return (velocity if differentiable else velocity.detach()), stacked

    def velocity_and_divergence(
        self,
        t: Float[Tensor, "*t_batch"],
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "*batch"]]:
        """Velocity and its exact divergence: here the trace over the standard basis."""
        probes = standard_basis(x)
        velocity, products = self.velocity_and_products(t, x, probes, context)
        return velocity, (probes * products).sum(-1).sum(0)

    def velocity_derivative(
        self,
        t: Float[Tensor, "*t_batch"],
        x: Float[Tensor, "*batch features"],
        dt: float,
        dx: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> Float[Tensor, "*batch features"]:
        """Derivative of the velocity in the direction (`dt`, `dx`).

        Along a path, where `dt` is 1 and `dx` the velocity, it is the acceleration.
        """
        return derivative_along(
            lambda t, x: self(t, x, context), (t, x), (torch.full_like(t, dt), dx)
        )

    def dependencies(
        self, context: Float[Tensor, "*c_batch context_features"] | None = None
    ) -> list[Tensor]:
        """Every tensor but t and x that the velocity depends on, as `ODESolver.solve` asks.

        Plain attributes of a user's network too, which are neither parameters nor buffers.
        """
        plain = (value for part in self.modules() for value in vars(part).values())
        return [
            *self.parameters(),
            *self.buffers(),
            *(value for value in plain if isinstance(value, Tensor)),
            *(() if context is None else (context,)),
        ]

    @property
    def bottleneck(self) -> int | None:
        """Width of a layer through which x acts, if it is less than `features` and known."""
        return None

    def velocity_and_bottleneck_products(
        self,
        t: Float[Tensor, "*t_batch"],
        x: Float[Tensor, "*batch features"],
        probes: Float[Tensor, "probes *batch bottleneck"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> tuple[Float[Tensor, "*batch features"], Float[Tensor, "probes *batch bottleneck"]]:
        r"""Velocity, and the product with each probe of a smaller matrix of the same trace.

        For v = g(h(x)) with h of the width `bottleneck`, :math:`\mathrm{tr} (\partial g/\partial h)
        (\partial h/\partial x) = \mathrm{tr} (\partial h/\partial x)(\partial g/\partial h)`. The
        latter matrix is smaller, and so may be the variance of an estimate of its trace.

        Raises:
            NotImplementedError: If `bottleneck` is None.

        References:
            Grathwohl et al. (2019), FFJORD. https://arxiv.org/abs/1810.01367
        """
        del t, x, probes, context
        raise NotImplementedError(
            f"this {type(self).__name__} has no bottleneck; use velocity_and_products, or a field "
            f"with a hidden layer narrower than its {self.features} features."
        )

    def compile(
        self, *, backend: str | Callable[..., Any] = "inductor", mode: str | None = None
    ) -> None:
        """Compile the evaluations of this field, in place, each when it is first asked for.

        The velocity is; the divergence and Jacobian products are where the field makes them without
        reverse mode. See `Flow.compile`.
        """
        Compilation(backend=backend, mode=mode).put_into(self)

    @property
    def _compilable(self) -> tuple[str, ...]:
        """Names of the methods that can be compiled: reverse mode in a program cannot."""
        by_reverse_mode = type(self).velocity_and_products is VectorField.velocity_and_products
        return _EVALUATIONS[:1] if by_reverse_mode else _EVALUATIONS

    def __getstate__(self) -> dict[str, Any]:
        """The state without programs, which cannot be copied: a copy is not compiled."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        if state.pop("_compilation", None) is not None:
            for name in _EVALUATIONS:
                state.pop(name, None)
        return state

    @property
    def _is_but_counted(self) -> bool:
        """Whether no hook sees the points and velocities of evaluations."""
        before = self._forward_pre_hooks.values()
        others = (self._forward_hooks, self._backward_hooks, self._backward_pre_hooks)
        return not any(others) and all(
            isinstance(getattr(hook, "__self__", None), EvaluationCount) for hook in before
        )

    def _announce_evaluation(self, t: Tensor, x: Tensor, context: Tensor | None) -> None:
        """Run the forward pre-hooks, in an override that does not go through ``__call__``.

        Not within a compiled program: whoever calls it runs them.
        """
        if torch.compiler.is_compiling():
            return
        for key, hook in list(self._forward_pre_hooks.items()):
            if key in self._forward_pre_hooks_with_kwargs:
                hook(self, (t, x, context), {})
            else:
                hook(self, (t, x, context))


class EvaluationCount:
    """Number of vector-field evaluations (nfe) seen so far, in `value`."""

    def __init__(self) -> None:
        self.value = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value})"

    def _add(self, *_: object) -> None:
        self.value += 1


@contextmanager
def count_evaluations(module: nn.Module) -> Iterator[EvaluationCount]:
    """Count the evaluations of every vector field in `module`, backward passes included.

    Counts those of every thread that uses the module meanwhile.

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
