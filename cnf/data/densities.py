"""Toy densities: the base class, and mixtures of Gaussians."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cnf._checks import check_count, check_events, check_generator, check_vectors
from cnf._shapes import Rows, Values

ROWS_PER_CHUNK = 512
"""Number of points in each chunk of `log_prob`; it bounds the memory of a call."""


@dataclass(frozen=True)
class RandomNumbers:
    """Source of float64 random numbers on the CPU, from one generator."""

    generator: torch.Generator | None
    """None stands for torch's global generator."""

    def uniform(self, *shape: int) -> Float[Tensor, "..."]:
        """Draw uniform numbers from 0 (included) to 1 (excluded)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def normal(self, *shape: int) -> Float[Tensor, "..."]:
        """Draw standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def integers(self, end: int, n: int) -> Int[Tensor, "n"]:
        """Draw uniform integers from 0 (included) to `end` (excluded)."""
        return torch.randint(end, (n,), generator=self.generator, device="cpu")


class ToyDensity(ABC):
    """Distribution with a sampler and an exact log-density.

    The difference of its `log_prob` and a model's, averaged over its samples, is the
    Kullback-Leibler divergence of the model from the truth, in nats.

    Attributes:
        features: Size of the last axis of a point.
        extent: Box for plots, with all but a few millionths of the probability: smallest and
            largest value of each feature in turn, (xmin, xmax, ymin, ymax) in the plane.
    """

    features: int
    extent: tuple[float, ...]

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n features"]:
        """Draw independent points, on the CPU and in torch's default dtype.

        Args:
            n: Number of points.
            generator: Generator on the CPU; torch's global generator if None.

        Raises:
            TypeError: If `n` is not an integer.
            ValueError: If `n` is negative.
        """
        check_count("n", n, least=0)
        check_generator(generator, like=torch.empty(0))
        return self._draw(n, RandomNumbers(generator)).to(torch.get_default_dtype())

    @torch.no_grad()
    def log_prob(self, x: Rows) -> Values:
        """Return the log-density in nats, without gradient; -inf outside the support.

        Computed in float64 on the CPU, returned with the dtype and device of `x`.

        Raises:
            TypeError: If `x` is not a tensor.
            ValueError: If the last axis of `x` is not `features` long, or `x` is not floating or
                not finite.
        """
        check_vectors("x", x, self.features, like=x)
        rows = x.to("cpu", torch.float64).reshape(-1, self.features)
        # One tensor for all results: separate ones would fragment the heap between large
        # temporaries, and grow it by gigabytes.
        log_prob = rows.new_empty(len(rows))
        for start in range(0, len(rows), ROWS_PER_CHUNK):
            chunk = slice(start, start + ROWS_PER_CHUNK)
            log_prob[chunk] = self._log_prob(rows[chunk])
        return log_prob.reshape(x.shape[:-1]).to(x)

    @abstractmethod
    def entropy(self) -> float:
        """Return the differential entropy in nats: the mean of `-log_prob` over samples."""

    @abstractmethod
    def _draw(self, n: int, random: RandomNumbers) -> Float[Tensor, "n features"]:
        """Hook: draw independent points in float64."""

    @abstractmethod
    def _log_prob(self, x: Float[Tensor, "rows features"]) -> Float[Tensor, "rows"]:
        """Hook: return the log-density of a chunk of finite float64 points."""


class GaussianMixture(ToyDensity):
    """Gaussian mixture in any dimension.

    Args:
        means: Mean of each component.
        covariances: Covariance matrix of each component.
        weights: Probability of each component up to a common factor; equal if None.

    Raises:
        TypeError: If an argument is not a tensor.
        ValueError: If a dtype is not floating, the shapes do not fit, a number is not finite, a
            covariance matrix is not symmetric and positive definite, or the weights are negative or
            all zero.

    Example:
        >>> standard = GaussianMixture(torch.zeros(1, 2), torch.eye(2).expand(1, 2, 2))
        >>> round(standard.entropy(), 4)
        2.8379
    """

    def __init__(
        self,
        means: Float[Tensor, "components features"],
        covariances: Float[Tensor, "components features features"],
        weights: Float[Tensor, "components"] | None = None,
    ) -> None:
        _check_floats("means", means, ("components", "features"))
        components, features = means.shape
        _check_floats("covariances", covariances, (components, features, features))
        if weights is None:
            weights = means.new_ones(components)
        _check_floats("weights", weights, (components,))
        if bool((weights < 0).any()) or not bool((weights > 0).any()):
            raise ValueError(f"weights must be at least 0 and not all 0; got {weights.tolist()}.")
        self.features = features
        self._means = means.detach().to("cpu", torch.float64)
        self._factors = _cholesky(covariances.detach().to("cpu", torch.float64))
        weights = weights.detach().to("cpu", torch.float64)
        self._weights = weights / weights.sum()
        spread = 5 * self._factors.norm(dim=-1)
        low = (self._means - spread).amin(dim=0)
        high = (self._means + spread).amax(dim=0)
        self.extent = tuple(torch.stack((low, high), dim=-1).flatten().tolist())

    def entropy(self, *, draws: int = 2**16) -> float:
        r"""Return the entropy in nats: closed form for one component, else partly Monte Carlo.

        .. math:: H = \sum_k w_k H(N_k) + \mathbb{E}_{k, x} \log \frac{N_k(x)}{p(x)}

        The expectation, the mutual information of point and component, is the mean over `draws`
        from a generator with a fixed seed. Its standard error is the standard deviation of the
        logarithm divided by the square root of `draws`: below 0.004 nats where that deviation is
        below 1, and nearly 0 for components far apart.
        """
        log_scales = self._factors.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        each = self.features / 2 * math.log(2 * math.pi * math.e) + log_scales
        within = float(self._weights @ each)
        if len(self._weights) == 1:
            return within
        random = RandomNumbers(torch.Generator("cpu").manual_seed(0))
        labels = self._draw_labels(draws, random)
        x = self._draw_given(labels, random)
        information = 0.0
        for rows in torch.split(torch.arange(draws), ROWS_PER_CHUNK):
            joint = self._log_prob_of_components(x[rows])
            own = joint.gather(-1, labels[rows, None]).squeeze(-1)
            given = own - self._weights[labels[rows]].log()
            information += float((given - joint.logsumexp(dim=-1)).sum()) / draws
        return within + information

    def _draw(self, n: int, random: RandomNumbers) -> Float[Tensor, "n features"]:
        return self._draw_given(self._draw_labels(n, random), random)

    def _draw_labels(self, n: int, random: RandomNumbers) -> Int[Tensor, "n"]:
        # torch.multinomial refuses n = 0.
        labels = torch.searchsorted(self._weights.cumsum(0), random.uniform(n), right=True)
        return labels.clamp(max=len(self._weights) - 1)

    def _draw_given(
        self, labels: Int[Tensor, "n"], random: RandomNumbers
    ) -> Float[Tensor, "n features"]:
        noise = random.normal(len(labels), self.features, 1)
        return self._means[labels] + (self._factors[labels] @ noise).squeeze(-1)

    def _log_prob(self, x: Float[Tensor, "rows features"]) -> Float[Tensor, "rows"]:
        return self._log_prob_of_components(x).logsumexp(dim=-1)

    def _log_prob_of_components(
        self, x: Float[Tensor, "rows features"]
    ) -> Float[Tensor, "rows components"]:
        """Return the logarithm of weight times density, for each component."""
        offsets = (x - self._means[:, None]).mT
        whitened = torch.linalg.solve_triangular(self._factors, offsets, upper=False)
        log_scales = self._factors.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        log_peaks = self._weights.log() - log_scales - self.features / 2 * math.log(2 * math.pi)
        squares: Tensor = whitened.square().sum(dim=-2).mT
        return log_peaks - squares / 2


def _check_floats(name: str, value: Tensor, shape: tuple[int | str, ...]) -> None:
    """Refuse anything but a finite floating tensor of this shape; a name stands for any size."""
    check_events(name, value, (), like=value)
    fits = len(value.shape) == len(shape) and all(
        size > 0 if isinstance(expected, str) else size == expected
        for size, expected in zip(value.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape ({expected}); got {tuple(value.shape)}.")


def _cholesky(
    covariances: Float[Tensor, "components features features"],
) -> Float[Tensor, "components features features"]:
    factors: Tensor
    factors, failed = torch.linalg.cholesky_ex(covariances)
    # Relative to the variances, to allow for float32 rounding at any scale.
    asymmetry = (covariances - covariances.mT).abs().amax(dim=(-2, -1))
    scale = covariances.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
    bad = ((failed != 0) | (asymmetry > 1e-6 * scale)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"covariances must be symmetric and positive definite; component {bad[0]} is "
            f"{covariances[bad[0]].tolist()}."
        )
    return factors
