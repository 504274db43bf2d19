"""The log-determinant of a residual flow: exact, or estimated from a power series."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from cnf._checks import check_count, check_number, is_hidden
from cnf._shapes import Probes, Rows, Values
from cnf.bases import Likelihood
from cnf.divergence import Hutchinson
from cnf.transforms.residual.spectral_layers import Map
from cnf.vector_fields.jacobian.autograd import (
    refuse_transformed_functions,
    standard_basis,
    vector_jacobian_product,
)

_MOST_TERMS = 10_000
"""Largest number of terms. Each is a pass through the network, and a later one adds less than 1e-8
nats for a contraction with Lipschitz constant 0.999."""
_FEWER = "Take fewer, or for few features ExactLogDet()."


class LogDet(ABC):
    r"""Computation of log det(I + J), for the Jacobian J of a contraction g.

    For d features and a Lipschitz constant L < 1 of g,

    .. math:: d \log(1 - L) \le \log\det(I + J) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k}
        \mathrm{tr}(J^k) \le d \log(1 + L)
    """

    likelihood: ClassVar[Likelihood]
    """Kind of likelihood: exact, an estimate or a biased estimate."""

    @abstractmethod
    def __call__(
        self, contraction: Map, x: Rows, *, generator: Generator | None = None
    ) -> tuple[Rows, Values]:
        """Return g(x) and log det(I + J) at `x`, in nats, for each row."""


@dataclass(frozen=True)
class ExactLogDet(LogDet):
    """Exact log-determinant of the whole Jacobian, for few features.

    It costs a vector-Jacobian product for each feature.

    Example:
        >>> change, ladj = ExactLogDet()(lambda x: 0.5 * x, torch.zeros(3, 2))
        >>> ladj
        tensor([0.8109, 0.8109, 0.8109])
    """

    likelihood: ClassVar[Likelihood] = "exact"

    def __call__(
        self, contraction: Map, x: Rows, *, generator: Generator | None = None
    ) -> tuple[Rows, Values]:
        """Return g(x) and log det(I + J) at `x`, in nats, for each row."""
        basis = standard_basis(x)
        point, changes = _at_copies(contraction, x, len(basis))
        rows = vector_jacobian_product(changes, point, basis, torch.is_grad_enabled())
        identity = torch.eye(len(basis), dtype=x.dtype, device=x.device)
        ladj = torch.linalg.slogdet(identity + rows.movedim(0, -2)).logabsdet
        return _first_copy(changes), ladj


@dataclass(frozen=True, kw_only=True)
class TruncatedSeries(LogDet):
    r"""Truncated power series, with random probes for the traces: a biased estimate.

    The bias has an unknown sign: for d features and a Lipschitz constant of at most L it is up to
    :math:`-d \, (\log(1 - L) + \sum_{k \le n} L^k / k)`, with n the `terms`.

    Costs a vector-Jacobian product for each term and probe; gradients cost one more, for all terms.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If a number is less than 1, or `terms` more than 10 000.

    References:
        Behrmann et al. (2019), Invertible Residual Networks. https://arxiv.org/abs/1811.00995

    Example:
        >>> change, ladj = TruncatedSeries(terms=1)(lambda x: 0.5 * x, torch.zeros(3, 2))
        >>> ladj
        tensor([1., 1., 1.])
    """

    terms: int = 10
    """Number of terms."""
    probes: int = 1
    """Number of Rademacher probes for each row."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", _checked_terms("terms", self.terms, least=1))
        object.__setattr__(self, "probes", check_count("probes", self.probes))

    likelihood: ClassVar[Likelihood] = "biased_estimate"

    def __call__(
        self, contraction: Map, x: Rows, *, generator: Generator | None = None
    ) -> tuple[Rows, Values]:
        """Return g(x) and the estimate of log det(I + J) at `x`, in nats, for each row."""
        probes = Hutchinson(probes=self.probes).draw_probes(x, generator=generator)
        return power_series(contraction, x, probes, [1.0] * self.terms)


@dataclass(frozen=True, kw_only=True)
class RussianRoulette(LogDet):
    r"""Russian-roulette estimate: an unbiased, randomly truncated power series.

    After the exact terms come N more, with :math:`P(N \ge m) = (1 - p)^{m - 1}`; the weight of each
    is the inverse of its probability. N is drawn once for each call, and probes for the traces once
    for each row. Costs as `TruncatedSeries` with 1 / p further terms on average.

    Where powers of the Jacobian fall as slowly as :math:`\lambda^k`, the variance is finite if
    :math:`\lambda^2 < 1 - p`; many exact terms make it small. With the defaults it is finite up to
    :math:`\lambda = 0.974`, and so for every contraction of the default coefficient, 0.97.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If a number is too small, `exact_terms` more than 10 000, or `probability` less
            than 1e-4 (10 000 further terms on average) or not less than 1.

    References:
        Chen et al. (2019), Residual Flows for Invertible Generative Modeling.
        https://arxiv.org/abs/1906.02735

    Example:
        >>> change, ladj = RussianRoulette()(lambda x: 0.0 * x, torch.zeros(3, 2))
        >>> ladj
        tensor([0., 0., 0.])
    """

    exact_terms: int = 8
    """Number of terms that are always computed."""
    probability: float = 0.05
    """Probability p that a further term is the last, less than 1."""
    probes: int = 1
    """Number of Rademacher probes for each row."""

    def __post_init__(self) -> None:
        terms = _checked_terms("exact_terms", self.exact_terms, least=0)
        object.__setattr__(self, "exact_terms", terms)
        object.__setattr__(self, "probes", check_count("probes", self.probes))
        probability = check_number(
            "probability",
            self.probability,
            f"between 0 and 1, and at least {1 / _MOST_TERMS:g}",
            lambda number: 1 / _MOST_TERMS <= number < 1,
            remedy=f"A call takes exact_terms + 1 / probability terms on average. {_FEWER}",
        )
        object.__setattr__(self, "probability", probability)

    likelihood: ClassVar[Likelihood] = "estimate"

    def __call__(
        self, contraction: Map, x: Rows, *, generator: Generator | None = None
    ) -> tuple[Rows, Values]:
        """Return g(x) and the estimate of log det(I + J) at `x`, in nats, for each row."""
        further = self.draw_terms(generator=generator)
        weights = [(1 - self.probability) ** -m for m in range(further)]
        probes = Hutchinson(probes=self.probes).draw_probes(x, generator=generator)
        return power_series(contraction, x, probes, [1.0] * self.exact_terms + weights)

    def has_finite_variance(self, coefficient: float) -> bool:
        """Whether the variance is finite for any contraction with this Lipschitz constant.

        Example:
            >>> RussianRoulette().has_finite_variance(0.97)
            True
        """
        return coefficient**2 < 1 - self.probability

    def draw_terms(self, *, generator: Generator | None = None) -> int:
        """Draw the number N of further terms, at least 1."""
        device = "cpu" if generator is None else generator.device
        draw = torch.rand((), generator=generator, dtype=torch.float64, device=device)
        if is_hidden(draw):
            refuse_transformed_functions("the number of terms of a RussianRoulette")
        return 1 + int(math.log1p(-draw.item()) / math.log1p(-self.probability))


def _checked_terms(name: str, value: int, *, least: int) -> int:
    terms = check_count(name, value, least=least)
    if terms > _MOST_TERMS:
        raise ValueError(
            f"{name} must be at most {_MOST_TERMS}, because each costs a pass through the network; "
            f"got {terms}. {_FEWER}"
        )
    return terms


def power_series(
    contraction: Map, x: Rows, probes: Probes, weights: Sequence[float]
) -> tuple[Rows, Values]:
    r"""Return g(x), and a weighted power series of log det(I + J) at `x`.

    .. math:: \sum_{k \ge 1} w_k \frac{(-1)^{k+1}}{k} \, p^\top J^k p \quad\text{has in the mean
        over probes p the gradient of}\quad \sum_{k \ge 1} w_k (-1)^{k+1} \, \bar p^\top
        \bar J^{k-1} J p

    where barred factors are held fixed: one differentiable product, in place of one for each term.
    The result is the left sum, with the gradient of the right one.

    Args:
        contraction: The map g.
        x: Points.
        probes: Random vectors with :math:`\mathbb{E}\, p p^\top = I`; the result is their mean.
        weights: The weight of each term, from the first.

    References:
        Chen et al. (2019), Residual Flows. https://arxiv.org/abs/1906.02735
    """
    point, changes = _at_copies(contraction, x, len(probes))
    ladj = x.new_zeros(probes.shape[:-1])
    product, fixed = probes, torch.zeros_like(probes)
    for order, weight in enumerate(weights, start=1):
        signed = weight if order % 2 else -weight
        fixed = fixed + signed * product
        product = vector_jacobian_product(changes, point, product, differentiable=False)
        ladj = ladj + signed / order * (product * probes).sum(-1)
    if torch.is_grad_enabled():
        slope = vector_jacobian_product(changes, point, fixed, differentiable=True)
        surrogate = (slope * probes).sum(-1)
        ladj = ladj + (surrogate - surrogate.detach())
    return _first_copy(changes), ladj.mean(0)


def _at_copies(contraction: Map, x: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """Return copies of `x`, one for each product, and g of the copies, always with a graph."""
    with torch.enable_grad():
        point = x.expand(copies, *x.shape)
        if not point.requires_grad:
            refuse_transformed_functions("the ladj of a ResidualFlow")
        point = point if point.requires_grad else point.detach().requires_grad_()
        return point, contraction(point)


def _first_copy(changes: Tensor) -> Tensor:
    """Return g(x) from its copies, without a graph where gradients are off."""
    return changes[0] if torch.is_grad_enabled() else changes[0].detach()
