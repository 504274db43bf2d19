"""Divergence of a vector field: exact, or estimated with random probes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cnf._checks import check_choice, check_count, check_flag
from cnf._memory import check_fits
from cnf._shapes import Context, Probes, Rows, Times
from cnf.vector_fields import VectorField
from cnf.vector_fields.jacobian.autograd import standard_basis

_NOISES = ("rademacher", "gaussian")


@dataclass(frozen=True)
class FieldEvaluation:
    """Evaluation of a vector field and its divergence at one time."""

    vector_field: VectorField
    """The field."""
    t: Tensor
    """Time, 0-dim or ``(*batch,)``."""
    x: Tensor
    """Points, ``(*batch, features)``."""
    context: Tensor | None
    """Context, ``(*batch, context_features)``, if the field is conditional."""
    velocity: Tensor
    """dx/dt, ``(*batch, features)``."""
    divergence: Tensor
    """Trace of dv/dx or an unbiased estimate of it, ``(*batch,)``."""
    products: Tensor | None = None
    """Jacobian products with the probes, ``(probes, *batch, features)``, if computed."""
    weight: float = 1.0
    """Weight of each product: 1 over a basis, 1 / their number for random probes."""
    estimates: Tensor | None = None
    """Estimate of the divergence by each random probe, ``(probes, *batch)``."""


class Divergence(ABC):
    r"""Divergence of a vector field: the sum of :math:`p^\top J p` over probes.

    Probes are drawn once for each solve and passed to every evaluation, so that the ODE stays
    deterministic.
    """

    is_exact: ClassVar[bool]
    """Whether the divergence is exact up to rounding, rather than an unbiased estimate."""

    @abstractmethod
    def draw_probes(self, x: Rows, *, generator: torch.Generator | None = None) -> Probes | None:
        """Draw probes for one solve that starts at `x`; None if no random ones are needed."""

    @abstractmethod
    def __call__(
        self,
        vector_field: VectorField,
        t: Times,
        x: Rows,
        probes: Probes | None,
        context: Context | None = None,
        *,
        products: bool = False,
    ) -> FieldEvaluation:
        """Evaluate the field and its divergence at `x`, once.

        With `products`, the evaluation includes Jacobian products, even if the divergence has a
        closed form.
        """


@dataclass(frozen=True)
class Exact(Divergence):
    """Exact divergence: in closed form where the field has one, else over the standard basis.

    The latter costs one Jacobian product for each feature.

    Example:
        >>> from cnf.vector_fields import MLPField
        >>> Exact()(MLPField(2), torch.tensor(0.0), torch.zeros(3, 2), None).divergence.shape
        torch.Size([3])
    """

    is_exact = True

    def draw_probes(self, x: Rows, *, generator: torch.Generator | None = None) -> None:
        """Return None: nothing here is random."""

    def __call__(
        self,
        vector_field: VectorField,
        t: Times,
        x: Rows,
        probes: Probes | None = None,
        context: Context | None = None,
        *,
        products: bool = False,
    ) -> FieldEvaluation:
        """Evaluate the field and its divergence at `x`, once."""
        if products:
            basis = standard_basis(x)
            velocity, columns = vector_field.velocity_and_products(t, x, basis, context)
            divergence = (basis * columns).sum(-1).sum(0)
        else:
            velocity, divergence = vector_field.velocity_and_divergence(t, x, context)
            columns = None
        return FieldEvaluation(vector_field, t, x, context, velocity, divergence, columns)


@dataclass(frozen=True, kw_only=True)
class Hutchinson(Divergence):
    r"""Hutchinson's unbiased estimate of the divergence from random probes.

    .. math:: \nabla \cdot v = \mathbb{E}_p \, p^\top (\partial v / \partial x) \, p
        \quad\text{for}\quad \mathbb{E}\, p p^\top = I

    Costs `probes` Jacobian products, for any number of features; the variance falls as
    1 / `probes`. Rademacher probes have entries of exactly ±1 and never a larger variance than
    Gaussian ones.

    A field v = g(h(x)) with a `bottleneck` narrower than x has the divergence
    :math:`\mathrm{tr}(\partial h / \partial x \; \partial g / \partial h)`, a trace of a smaller
    matrix, whose estimate by Rademacher probes mostly varies less: FFJORD's variance reduction.

    Raises:
        TypeError: If `probes` is not an int.
        ValueError: If `noise` is unknown or `probes` less than 1; when called with `bottleneck`, if
            the field has none, or together with Jacobian products.

    References:
        Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.
        Grathwohl et al. (2019), FFJORD, section 3.1. https://arxiv.org/abs/1810.01367

    Example:
        >>> Hutchinson(probes=8).draw_probes(torch.zeros(5, 2)).shape
        torch.Size([8, 5, 2])
    """

    noise: str = "rademacher"
    """Distribution of the probes, "rademacher" or "gaussian"."""
    probes: int = 1
    """Number of probes for each row."""
    bottleneck: bool = False
    """Whether the probes are as wide as the bottleneck of the field, rather than as x."""

    def __post_init__(self) -> None:
        check_choice("noise", self.noise, _NOISES)
        object.__setattr__(self, "probes", check_count("probes", self.probes))
        object.__setattr__(self, "bottleneck", check_flag("bottleneck", self.bottleneck))

    is_exact = False

    def draw_probes(self, x: Rows, *, generator: torch.Generator | None = None) -> Probes:
        """Draw random probes for each row of `x`.

        Raises:
            ValueError: If they exceed the memory.
        """
        remedy = "Take fewer, or fewer rows at once."
        check_fits("probes", self.probes, self.probes * x.numel(), like=x, remedy=remedy)
        shape = (self.probes, *x.shape)
        if self.noise == "gaussian":
            return torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
        signs = torch.randint(0, 2, shape, generator=generator, dtype=x.dtype, device=x.device)
        return 2 * signs - 1

    def __call__(
        self,
        vector_field: VectorField,
        t: Times,
        x: Rows,
        probes: Probes | None,
        context: Context | None = None,
        *,
        products: bool = False,
    ) -> FieldEvaluation:
        """Evaluate the field and the estimate of its divergence at `x`, once."""
        if probes is None:
            raise ValueError("probes must be the result of draw_probes; got None.")
        if self.bottleneck:
            if vector_field.bottleneck is None:
                raise ValueError(
                    f"this {type(vector_field).__name__} has no bottleneck; "
                    "use Hutchinson(bottleneck=False)."
                )
            if products:
                raise ValueError(
                    "a regularizer needs products of the whole Jacobian, unlike a bottleneck; use "
                    "Hutchinson(bottleneck=False)."
                )
            # The first entries of a probe are a probe, because entries are independent.
            probes = probes[..., : vector_field.bottleneck]
            velocity, made = vector_field.velocity_and_bottleneck_products(t, x, probes, context)
        else:
            velocity, made = vector_field.velocity_and_products(t, x, probes, context)
        estimates = (probes * made).sum(-1)
        return FieldEvaluation(
            vector_field,
            t,
            x,
            context,
            velocity,
            divergence=estimates.mean(0),
            products=None if self.bottleneck else made,
            weight=1 / len(probes),
            estimates=estimates,
        )
