"""Probability paths of flow matching, from base to data."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from cnf._checks import check_number, check_type, is_positive
from cnf._shapes import Rows, Times
from cnf.manifolds import Manifold


class ProbabilityPath(ABC):
    """Random path from x0, a base point, at t = 0 to x1, a data point, at t = 1.

    The matched flow has the density of the states at each time.
    """

    @abstractmethod
    def state_and_velocity(
        self, t: Times, x0: Rows, x1: Rows, *, generator: torch.Generator | None = None
    ) -> tuple[Rows, Rows]:
        """Return the state at time `t` and its derivative in time, for fixed random numbers.

        Args:
            t: Times from 0 to 1, of a shape that broadcasts with the rows'.
            x0: Starts of the paths.
            x1: Ends of the paths.
            generator: Source of the noise of a path with noise.
        """


@dataclass(frozen=True)
class LinearPath(ProbabilityPath):
    r"""Straight path at constant speed: :math:`x_t = (1 - (1 - \sigma) t) \, x_0 + t \, x_1`.

    This is the optimal transport path of Lipman et al., and with :math:`\sigma = 0` the path of
    rectified flows. The flow learns the density of the data with added normal noise of standard
    deviation :math:`\sigma`.

    Raises:
        ValueError: If `sigma_min` is not in [0, 1).

    References:
        Lipman et al. (2023), Flow Matching for Generative Modeling.
        https://arxiv.org/abs/2210.02747

    Example:
        >>> t, x0, x1 = torch.tensor([0.25]), torch.zeros(1, 1), torch.ones(1, 1)
        >>> LinearPath().state_and_velocity(t, x0, x1)
        (tensor([[0.2500]]), tensor([[1.]]))
    """

    sigma_min: float = 0.0
    """Fraction of x0 at t = 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min must be in [0, 1); got {self.sigma_min}.")

    def state_and_velocity(
        self, t: Times, x0: Rows, x1: Rows, *, generator: torch.Generator | None = None
    ) -> tuple[Rows, Rows]:
        """Return the state at time `t` and its derivative in time."""
        velocity = x1 - (1 - self.sigma_min) * x0
        return x0 + t.unsqueeze(-1) * velocity, velocity


@dataclass(frozen=True)
class VariancePreservingPath(ProbabilityPath):
    r"""Circular path: :math:`x_t = \cos(\pi t / 2) \, x_0 + \sin(\pi t / 2) \, x_1`.

    If x0 and x1 are independent with the same covariance, every :math:`x_t` has this covariance.

    References:
        Albergo & Vanden-Eijnden (2023), Building Normalizing Flows with Stochastic Interpolants.
        https://arxiv.org/abs/2209.15571

    Example:
        >>> t, x0, x1 = torch.tensor([0.5]), torch.ones(1, 1), torch.ones(1, 1)
        >>> VariancePreservingPath().state_and_velocity(t, x0, x1)[0]
        tensor([[1.4142]])
    """

    def state_and_velocity(
        self, t: Times, x0: Rows, x1: Rows, *, generator: torch.Generator | None = None
    ) -> tuple[Rows, Rows]:
        """Return the state at time `t` and its derivative in time."""
        angle = 0.5 * math.pi * t.unsqueeze(-1)
        cos, sin = angle.cos(), angle.sin()
        return cos * x0 + sin * x1, 0.5 * math.pi * (cos * x1 - sin * x0)


@dataclass(frozen=True)
class SmoothedPath(ProbabilityPath):
    r"""Straight path with normal noise: :math:`x_t = (1 - t) x_0 + t x_1 + \sigma \epsilon`.

    The noise :math:`\epsilon` of a path is the same at every time, and smooths both ends: the best
    field maps the base with noise to the data with noise. The flow starts from the base without
    noise, so it learns the density of the smoothed data with an error, which vanishes with
    :math:`\sigma`; `LinearPath` with a `sigma_min` has no such error.

    Raises:
        ValueError: If `sigma` is not positive and finite.

    References:
        Tong et al. (2024), Improving and Generalizing Flow-Based Generative Models with Minibatch
        Optimal Transport. https://arxiv.org/abs/2302.00482

    Example:
        >>> t, x0, x1 = torch.tensor([0.25]), torch.zeros(1, 1), torch.ones(1, 1)
        >>> SmoothedPath(0.1).state_and_velocity(t, x0, x1)[1]
        tensor([[1.]])
    """

    sigma: float
    """Standard deviation of the noise."""

    def __post_init__(self) -> None:
        remedy = "Without noise, use LinearPath()."
        sigma = check_number("sigma", self.sigma, "positive and finite", is_positive, remedy)
        object.__setattr__(self, "sigma", sigma)

    def state_and_velocity(
        self, t: Times, x0: Rows, x1: Rows, *, generator: torch.Generator | None = None
    ) -> tuple[Rows, Rows]:
        """Return the state at time `t` and its derivative in time, which is free of the noise."""
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        velocity = x1 - x0
        return x0 + t.unsqueeze(-1) * velocity + self.sigma * noise, velocity


@dataclass(frozen=True)
class GeodesicPath(ProbabilityPath):
    """Geodesic on a manifold, at constant speed: Riemannian flow matching.

    `FlowMatching` takes it for a flow on a manifold.

    Raises:
        TypeError: If `manifold` is not a `Manifold`.

    References:
        Chen and Lipman (2024), Flow Matching on General Geometries.
        https://arxiv.org/abs/2302.03660

    Example:
        >>> from cnf.manifolds import Torus
        >>> t, x0, x1 = torch.tensor([0.5]), torch.tensor([[3.0]]), torch.tensor([[-3.0]])
        >>> GeodesicPath(Torus(1)).state_and_velocity(t, x0, x1)[1]
        tensor([[0.2832]])
    """

    manifold: Manifold
    """The manifold."""

    def __post_init__(self) -> None:
        check_type("manifold", self.manifold, Manifold, "use Sphere(3) or Torus(2)")

    def state_and_velocity(
        self, t: Times, x0: Rows, x1: Rows, *, generator: torch.Generator | None = None
    ) -> tuple[Rows, Rows]:
        """Return point and velocity of the geodesic at time `t`."""
        return self.manifold.geodesic(t, x0, x1)
