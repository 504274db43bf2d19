"""Divergence of a vector field: exact, or estimated with random probes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

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
    """What one evaluation of a vector field yields; everything along a path is made from these."""

    vector_field: VectorField
    """The field."""
    t: Tensor
    """Time, 0-dim or ``(*batch,)``."""
    x: Tensor
    """Points, ``(*batch, features)``."""
    context: Tensor | None
    """What the field is conditioned on, ``(*batch, context_features)``, if it is."""
    velocity: Tensor
    """dx/dt, ``(*batch, features)``."""
    divergence: Tensor
    """Trace of dv/dx or an unbiased estimate of it, ``(*batch,)``."""
    products: Tensor | None = None
    """Jacobian products with the probes, ``(probes, *batch, features)``, if they were made."""
    weight: float = 1.0
    """What each product counts: 1 over a basis, 1 / their number for random probes."""
    estimates: Tensor | None = None
    """The estimate of the divergence by each random probe, ``(probes, *batch)``."""


class Divergence(ABC):
    r"""How the divergence of a vector field is computed: the sum of :math:`p^\top J p` over probes.

    Probes are drawn once for each solve and passed to every evaluation, so that the ODE stays
    deterministic.
    """

    @property
    @abstractmethod
    def is_exact(self) -> bool:
        """Whether the divergence is exact up to rounding, rather than an unbiased estimate."""

    @abstractmethod
    def draw_probes(self, x: Rows, *, generator: torch.Generator | None = None) -> Probes | None:
        """Probes for one solve that starts at `x`; None if no random ones are needed."""

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

        With `products`, the evaluation holds Jacobian products, even where a closed form of the
        divergence could do without.
        """


@dataclass(frozen=True)
class Exact(Divergence):
    """The exact divergence: in closed form where the field has one, else over the standard basis.

    The latter costs one Jacobian product for each feature.

    Example:
        >>> from cnf.vector_fields import MLPField
        >>> Exact()(MLPField(2), torch.tensor(0.0), torch.zeros(3, 2), None).divergence.shape
        torch.Size([3])
    """

    @property
    def is_exact(self) -> bool:
        """True."""
        return True

    def draw_probes(self, x: Rows, *, generator: torch.Generator | None = None) -> None:
        """None: nothing here is random."""
        del x, generator

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
        del probes
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
    r"""Unbiased estimate of the divergence from random probes.

    .. math:: \nabla \cdot v = \mathbb{E}_p \, p^\top (\partial v / \partial x) \, p
        \quad\text{for}\quad \mathbb{E}\, p p^\top = I

    Costs `probes` Jacobian products, however many features; the variance falls as 1 / `probes`.
    Rademacher probes have entries of exactly ±1 and never a larger variance than Gaussian ones.

    A field v = g(h(x)) with a `bottleneck` narrower than x has the divergence
    :math:`\mathrm{tr}(\partial h / \partial x \; \partial g / \partial h)`, a trace of a smaller
    matrix, whose estimate by Rademacher probes mostly varies less: FFJORD's variance reduction.

    Raises:
        TypeError: If `probes` is not an int.
        ValueError: If `noise` is unknown or `probes` less than 1; when called, if a bottleneck is
            asked of a field without one, or together with Jacobian products.

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

    @property
    def is_exact(self) -> bool:
        """False, for the divergence is an unbiased estimate."""
        return False

    def draw_probes(self, x: Rows, *, generator: torch.Generator | None = None) -> Probes:
        """Random probes for each row of `x`.

        Raises:
            ValueError: If there is no memory for them.
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
            raise ValueError("probes must be what draw_probes returned; got None.")
        if self.bottleneck:
            if vector_field.bottleneck is None:
                raise ValueError(
                    f"this {type(vector_field).__name__} has no bottleneck; "
                    "use Hutchinson(bottleneck=False)."
                )
            if products:
                raise ValueError(
                    "a regularizer needs products of the whole Jacobian, which probes of a "
                    "bottleneck do not make; use Hutchinson(bottleneck=False)."
                )
            # The first entries of a probe are independent of the rest, and so a probe themselves.
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
