"""Mixture of von Mises-Fisher distributions, on the sphere, the circle and the torus."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.distributions import Distribution, constraints

from cnf._checks import check_count, check_type, check_vectors
from cnf._shapes import BaseRows
from cnf.bases.base import Base
from cnf.bases.directional import (
    circle_constant,
    concentration_of,
    draw_angles,
    draw_directions,
    sphere_constant,
)
from cnf.bases.distribution import BaseDistribution
from cnf.manifolds import Manifold, Sphere, Torus

_NUMBERS_AT_ONCE = 8_000_000
_ITERATIONS = 200
_SETTLED = 1e-5
"""Least gain of an iteration, in nats for each row."""
_PRIOR_ROWS = 0.01
"""Part of a row of the uniform distribution that each component counts beside its own: of n rows,
no concentration is larger than about n / 0.01."""

AnyMixture = TypeVar("AnyMixture", bound="VonMisesFisherMixture")


class VonMisesFisherMixture(Base):
    r"""Mixture of von Mises-Fisher distributions, not trained.

    A component has a mean direction :math:`\mu` and a concentration :math:`\kappa`: its density is
    in proportion to :math:`e^{\kappa \cos \alpha}` for an angle of :math:`\alpha` from the mean, so
    for a large one nearly normal with a variance of :math:`1 / \kappa`. On the torus, angles of a
    component are independent von Mises variables, each with its concentration.

    `from_data` fits one by expectation-maximisation. Until it has components, the density is
    uniform.

    Args:
        manifold: ``Sphere(3)`` or a `Torus`.
        components: Number of components; their parameters are set by `set_components`, or loaded.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the manifold is another one.

    References:
        Banerjee et al. (2005), Clustering on the Unit Hypersphere using von Mises-Fisher
        Distributions. https://www.jmlr.org/papers/v6/banerjee05a.html

    Example:
        >>> pole = torch.tensor([[0.0, 0.0, 1.0]])
        >>> base = VonMisesFisherMixture(Sphere(3), 1)
        >>> base.set_components(torch.zeros(1), pole, torch.tensor([[100.0]]))
        >>> base.log_prob(pole)
        tensor([2.7673])
    """

    def __init__(self, manifold: Manifold, components: int = 0) -> None:
        check_type("manifold", manifold, Manifold, "use Sphere(3) or Torus(2)")
        if manifold != Sphere(3) and not isinstance(manifold, Torus):
            raise ValueError(f"manifold must be Sphere(3) or a Torus; got {manifold}.")
        super().__init__(manifold.features)
        self.manifold = manifold
        self.angles = manifold.features if isinstance(manifold, Torus) else 1
        count = check_count("components", components, least=0)
        self.register_buffer("log_weights", torch.zeros(count).log_softmax(0))
        self.register_buffer("means", manifold.project(torch.ones(count, manifold.features)))
        self.register_buffer("concentrations", torch.zeros(count, self.angles))
        self.log_weights: Tensor
        """Logarithm of the weight of each component, ``(components,)``."""
        self.means: Tensor
        """Mean of each component, ``(components, features)``."""
        self.concentrations: Tensor
        """Concentrations of each component, ``(components, angles)``; one on the sphere."""

    @classmethod
    def from_data(
        cls: type[AnyMixture],
        z: BaseRows,
        manifold: Manifold,
        components: int,
        *,
        generator: Generator | None = None,
    ) -> AnyMixture:
        """Return a mixture fitted by expectation-maximisation.

        A component counts a hundredth of a row of the uniform distribution beside its own, so that
        it cannot collapse to a point.

        Args:
            z: Rows on the manifold, ``(rows, features)``.
            manifold: ``Sphere(3)`` or a `Torus`.
            components: Number of components.
            generator: Source of the rows that the means start from, on the CPU; None for a fixed
                seed.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If rows are not on the manifold, or fewer than the components.
        """
        check_type("z", z, Tensor, "use torch.as_tensor(z)")
        check_vectors("z", z, manifold.features, like=z)
        mixture = cls(manifold, check_count("components", components)).to(z)
        if z.ndim != 2:
            raise ValueError(
                f"z must have shape (rows, {manifold.features}); got {tuple(z.shape)}."
            )
        if not manifold.contains(z).all():
            raise ValueError(f"z must be rows on {manifold}; got some that are not. Project them.")
        if len(z) < components:
            raise ValueError(f"z must have at least {components} rows; got {len(z)}.")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        mixture.set_components(*_fitted(mixture, z.double(), generator))
        return mixture

    def set_components(
        self,
        log_weights: Float[Tensor, " components"],
        means: Float[Tensor, "components features"],
        concentrations: Float[Tensor, "components angles"],
    ) -> None:
        """Set the components; weights are on any scale.

        Raises:
            ValueError: If the shapes do not fit, a mean is not on the manifold, a concentration is
                negative or not finite, or a weight is not finite, or all are zero.
        """
        shapes = (len(means),), (len(means), self.features), (len(means), self.angles)
        found = tuple(log_weights.shape), tuple(means.shape), tuple(concentrations.shape)
        if found != shapes:
            raise ValueError(f"components must have parameters of shapes {shapes}; got {found}.")
        if not self.manifold.contains(means).all():
            raise ValueError(f"means must be on {self.manifold}; got some that are not.")
        if not ((concentrations >= 0) & concentrations.isfinite()).all():
            raise ValueError(
                "concentrations must be finite and at least 0; they go from "
                f"{float(concentrations.min()):.3g} to {float(concentrations.max()):.3g}."
            )
        if not (log_weights < math.inf).all() or (len(means) and log_weights.max() == -math.inf):
            raise ValueError(
                "log_weights must be finite or -inf, and not all -inf; got "
                f"{log_weights.tolist()[:8]}."
            )
        like = self.means
        self.log_weights = log_weights.log_softmax(0).to(like)
        self.means, self.concentrations = means.to(like), concentrations.to(like)

    @property
    def components(self) -> int:
        """Number of components; 0 for a uniform density."""
        return len(self.log_weights)

    def extra_repr(self) -> str:
        """Manifold and number of components."""
        return f"{self.manifold}, components={self.components}"

    @property
    def support(self) -> constraints.Constraint:
        """The manifold."""
        return self.manifold.support

    def log_joint(self, z: BaseRows) -> Float[Tensor, "*batch components"]:
        """Return the log-density of each point with each component, in float64.

        In single precision, the cosine of an angle of a degree would be too coarse for a narrow
        component.
        """
        means, concentrations = self.means.double(), self.concentrations.double()
        log_weights = self.log_weights.double()
        y = self.manifold.embed(z.double())
        centres = self.manifold.embed(means)
        if not isinstance(self.manifold, Torus):
            constant = log_weights + sphere_constant(concentrations[:, 0])
            return y @ (concentrations * centres).T + (constant - concentrations[:, 0])
        constant = log_weights + (circle_constant(concentrations) - concentrations).sum(-1)
        return y @ (concentrations.repeat(1, 2) * centres).T + constant

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        inside = self.manifold.contains(z)
        if self.components == 0:
            density = z.new_full(z.shape[:-1], -self.manifold.log_volume)
            return density.where(inside, -math.inf)
        flat = z.reshape(-1, self.features)
        rows = max(1, _NUMBERS_AT_ONCE // self.components)
        log_prob = torch.cat([self.log_joint(part).logsumexp(-1) for part in flat.split(rows)])
        return log_prob.to(z.dtype).reshape(z.shape[:-1]).where(inside, -math.inf)

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        if self.components == 0 or shape.numel() == 0:
            return self.manifold.rand(shape, like=self.means, generator=generator)
        chosen = torch.multinomial(
            self.log_weights.exp(), shape.numel(), replacement=True, generator=generator
        )
        means, concentrations = self.means[chosen], self.concentrations[chosen]
        draw = draw_angles if isinstance(self.manifold, Torus) else draw_directions
        drawn = self.manifold.project(draw(means, concentrations, generator))
        return drawn.reshape(*shape, self.features)

    def distribution(
        self, batch_shape: Sequence[int] = (), context: Tensor | None = None
    ) -> Distribution:
        """Return this base as a `torch.distributions.Distribution`."""
        return BaseDistribution(self, batch_shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}log_weights")
        if found is not None and found.ndim == 1 and len(found) != self.components:
            empty = VonMisesFisherMixture(self.manifold, len(found)).to(self.means)
            for name, buffer in empty.named_buffers():
                setattr(self, name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _fitted(
    mixture: VonMisesFisherMixture, z: Tensor, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, means and concentrations by expectation-maximisation."""
    fitted = VonMisesFisherMixture(mixture.manifold, mixture.components).double()
    y = mixture.manifold.embed(z)
    chances = _nearest_of_random_rows(y, mixture.components, generator)
    before = -math.inf
    for _ in range(_ITERATIONS):
        fitted.set_components(*_maximised(fitted, y, chances))
        joint = fitted.log_joint(z)
        now = float(joint.logsumexp(-1).mean())
        if now - before < _SETTLED:
            break
        chances, before = joint.softmax(-1), now
    return fitted.log_weights, fitted.means, fitted.concentrations


def _maximised(
    mixture: VonMisesFisherMixture, y: Tensor, chances: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, means and concentrations for the chances of the components: the M step."""
    counts = chances.sum(0)
    sums = chances.T @ y
    total = (counts + _PRIOR_ROWS).unsqueeze(-1)
    if not isinstance(mixture.manifold, Torus):
        size = sums.norm(dim=-1, keepdim=True)
        concentrations = concentration_of(size / total, 3, lambda k: 1 / torch.tanh(k) - 1 / k)
        return total[:, 0].log(), mixture.manifold.project(sums), concentrations
    across, up = sums.chunk(2, -1)
    size = torch.hypot(across, up)
    concentrations = concentration_of(
        size / total, 2, lambda k: torch.special.i1e(k) / torch.special.i0e(k)
    )
    return total[:, 0].log(), torch.atan2(up, across), concentrations


def _nearest_of_random_rows(y: Tensor, components: int, generator: Generator) -> Tensor:
    """Return chances of 0 and 1, by the nearest of rows that are drawn far from each other."""
    chosen = torch.randint(len(y), (1,), generator=generator)
    distance = torch.cdist(y, y[chosen])[:, 0].square()
    centres = [y[chosen]]
    for _ in range(components - 1):
        chance = distance if distance.sum() > 0 else torch.ones_like(distance)
        chosen = torch.multinomial(chance, 1, generator=generator)
        centres.append(y[chosen])
        distance = torch.minimum(distance, torch.cdist(y, y[chosen])[:, 0].square())
    nearest = torch.cdist(y, torch.cat(centres)).argmin(-1)
    return torch.nn.functional.one_hot(nearest, components).to(y)
