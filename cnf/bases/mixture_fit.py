r"""Fit of a Gaussian mixture: mixtures of several sizes, weighted by their held-out likelihoods.

Each candidate is a mixture with full covariances, by expectation-maximisation; a single Gaussian
with correlations shrunk by Ledoit and Wolf's rule is one of them. Cross-validation gives the
density of each row by each candidate that was fitted without the row. The weights of the candidates
maximise the likelihood of these densities' mean, by the same expectation-maximisation, as if five
more rows were the single Gaussian's. The mean of mixtures is a mixture again, fitted to all rows.

A covariance has an inverse-Wishart prior: :math:`(S_k + \nu \Lambda) / (n_k + \nu)` for n_k rows
with the scatter matrix S_k, where :math:`\Lambda` is the shrunk covariance of all rows divided by
:math:`K^{2/d}`, for K components in d dimensions.

References:
    Smyth and Wolpert (1999), Linearly combining density estimators via stacking.
    Fraley and Raftery (2007), Bayesian regularization for normal mixture estimation and model-based
    clustering, section 2, for the prior.
    Ledoit and Wolf (2004), A well-conditioned estimator for large-dimensional covariance matrices.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from cnf._moments import column_moments, shrunk_correlation

_ROWS = 5000
_SIZES = (2, 4, 8, 16, 32, 64)
_ROWS_OF_A_COMPONENT = 4
_WORK = 1.5e8
"""Most multiplications of an iteration over all folds."""
_ITERATIONS = 100
_SETTLED = 1e-3
"""Least gain of an iteration, in nats for each row."""
_LEAST_VARIANCE = 1e-6
_ROWS_OF_THE_SINGLE = 5.0
_LEAST_SHARE = 1e-3


class Mixture(NamedTuple):
    """Gaussian mixture."""

    log_weights: Tensor
    """Logarithm of the weight of each component, ``(components,)``."""
    means: Tensor
    """Mean of each component, ``(components, features)``."""
    scale_trils: Tensor
    """Cholesky factor of each covariance, ``(components, features, features)``."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of rows ``(rows, features)``, in nats."""
        return self.log_joint(z).logsumexp(-1)

    def log_joint(self, z: Tensor) -> Tensor:
        """Return the log-density of each row with each component, ``(rows, components)``."""
        distance = (z - self.means.unsqueeze(1)).mT
        scaled = torch.linalg.solve_triangular(self.scale_trils, distance, upper=False)
        volume = self.scale_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * z.shape[-1] * math.log(2 * math.pi)
        log_prob: Tensor = -0.5 * scaled.square().sum(-2).mT - volume - constant
        return log_prob + self.log_weights


class _Candidate(NamedTuple):
    """Kind of mixture."""

    components: int
    prior_rows: float
    """Number of rows that the prior of a covariance counts as."""
    shrunk: bool = False
    """Whether the covariance is Ledoit and Wolf's, for one component."""


def fit_mixture(
    z: Tensor, weight: Tensor | None = None, generator: Generator | None = None
) -> Mixture:
    """Return the mixture for rows ``(rows, features)``, in float64 on the CPU.

    Raises:
        ValueError: If there are less than two rows of positive weight, or a feature is constant.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    mean, std = column_moments("z", z, weight)
    if not (std > 0).all():
        constant = (std <= 0).nonzero().flatten().tolist()
        raise ValueError(f"z must vary in every feature; it is constant in {constant}.")
    rows = z.detach().to("cpu", torch.float64)
    share = rows.new_ones(len(rows)) if weight is None else weight.detach().to(rows)
    rows, share = rows[share > 0], share[share > 0]
    some = torch.arange(min(_ROWS, len(rows))) * len(rows) // min(_ROWS, len(rows))
    rows, share = (rows[some] - mean) / std, share[some]
    mixture = _stacked(rows, share / share.max(), generator)
    scale_trils = std.unsqueeze(-1) * mixture.scale_trils
    return Mixture(mixture.log_weights, mean + std * mixture.means, scale_trils)


def _stacked(rows: Tensor, share: Tensor, generator: Generator) -> Mixture:
    """Return the mean of the candidates, with weights by cross-validation."""
    folds = list(_folds(len(rows), generator))
    candidates = _candidates(rows, share, len(folds))
    scores = torch.full((len(rows), len(candidates)), -math.inf, dtype=rows.dtype)
    for training, held_out in folds:
        for number, candidate in enumerate(candidates):
            fitted = _fitted(candidate, rows[training], share[training], generator)
            if fitted is not None:
                scores[held_out, number] = fitted.log_prob(rows[held_out])
    scored = torch.cat([held_out for _, held_out in folds])
    weights = _weights(scores[scored], share[scored])
    parts = []
    for weight, candidate in zip(weights, candidates, strict=True):
        fitted = None
        if weight >= _LEAST_SHARE:
            fitted = _fitted(candidate, rows, share, generator)
        if fitted is not None:
            parts.append(fitted._replace(log_weights=fitted.log_weights + weight.log()))
    log_weights, means, scale_trils = map(torch.cat, zip(*parts, strict=True))
    return Mixture(log_weights.log_softmax(0), means, scale_trils)


def _folds(rows: int, generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield training and held-out rows; the more rows, the fewer folds."""
    count, used = (min(10, rows), 10) if rows <= 200 else (5, 5) if rows <= 1000 else (5, 1)
    order = torch.randperm(rows, generator=generator)
    for fold in range(min(count, used)):
        held_out = torch.zeros(rows, dtype=torch.bool)
        held_out[order[fold::count]] = True
        yield (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def _candidates(rows: Tensor, share: Tensor, folds: int) -> list[_Candidate]:
    count, features = rows.shape
    most = min(_effective_rows(share) / _ROWS_OF_A_COMPONENT, _WORK / (count * features**2 * folds))
    return [_Candidate(1, 0.0, shrunk=True), _Candidate(1, 0.0)] + [
        _Candidate(size, prior_rows)
        for size in _SIZES
        if size <= most
        for prior_rows in (0.0, 0.1, features + 2.0)
    ]


def _fitted(
    candidate: _Candidate, rows: Tensor, share: Tensor, generator: Generator
) -> Mixture | None:
    """Fit a mixture by expectation-maximisation; None if a covariance is singular."""
    share = share / share.sum()
    mean = share @ rows
    std = (share @ (rows - mean).square()).sqrt()
    correlation = shrunk_correlation((rows - mean) / std.clamp(min=_LEAST_VARIANCE), share)
    covariance = std.unsqueeze(-1) * correlation * std
    if candidate.shrunk:
        return _mixture(rows.new_zeros(1), mean.unsqueeze(0), covariance.unsqueeze(0))
    size = candidate.components
    prior = covariance / size ** (2 / rows.shape[-1])
    chances = rows.new_ones(len(rows), 1)
    if size > 1:
        chances = _clusters(rows, share, size, generator)
    before = -math.inf
    for _ in range(_ITERATIONS):
        mixture = _maximised(rows, share, chances, prior, candidate.prior_rows)
        if mixture is None or size == 1:
            break
        joint = mixture.log_joint(rows)
        now = float(share @ joint.logsumexp(-1))
        if now - before < _SETTLED:
            break
        chances, before = joint.softmax(-1), now
    return mixture


def _maximised(
    rows: Tensor, share: Tensor, chances: Tensor, prior: Tensor, prior_rows: float
) -> Mixture | None:
    """Return the mixture for the chances of the components given each row, the M step."""
    counts = _effective_rows(share) * share.unsqueeze(-1) * chances
    count = counts.sum(0)
    log_weights = (count + 1).log()  # a uniform Dirichlet prior of one row each
    means = counts.T @ rows / count.clamp(min=_LEAST_VARIANCE).unsqueeze(-1)
    count = count[:, None, None]
    weighted = counts.T.unsqueeze(-1) * rows
    scatter = weighted.mT @ rows - count * means.unsqueeze(-1) * means.unsqueeze(-2)
    covariances = (scatter + prior_rows * prior) / (count + prior_rows).clamp(min=_LEAST_VARIANCE)
    return _mixture(log_weights.log_softmax(0), means, covariances)


def _mixture(log_weights: Tensor, means: Tensor, covariances: Tensor) -> Mixture | None:
    floor = _LEAST_VARIANCE * torch.eye(means.shape[-1], dtype=means.dtype)
    symmetric = 0.5 * (covariances + covariances.mT) + floor
    scale_trils, failures = torch.linalg.cholesky_ex(symmetric)
    return None if failures.any() else Mixture(log_weights, means, scale_trils)


def _clusters(rows: Tensor, share: Tensor, size: int, generator: Generator) -> Tensor:
    """Return the clusters of the rows by k-means, as chances of 0 and 1."""
    centres = rows[_one_of(share, generator)]
    for _ in range(size - 1):
        nearest = torch.cdist(rows, centres).amin(-1).square()
        chance = share * nearest
        place = _one_of(chance if chance.sum() > 0 else share, generator)
        centres = torch.cat([centres, rows[place]])
    for _ in range(10):
        chances = torch.nn.functional.one_hot(torch.cdist(rows, centres).argmin(-1), size).to(rows)
        shares = share.unsqueeze(-1) * chances
        size_of_each = shares.sum(0).unsqueeze(-1)
        means = shares.T @ rows / size_of_each.clamp(min=torch.finfo(rows.dtype).tiny)
        centres = torch.where(size_of_each > 0, means, centres)
    return chances


def _one_of(chances: Tensor, generator: Generator) -> Tensor:
    return torch.multinomial(chances, 1, generator=generator)


def _weights(scores: Tensor, share: Tensor) -> Tensor:
    """Return the weights of the candidates that maximise the likelihood of the mean."""
    counts = _effective_rows(share) * share / share.sum()
    prior = scores.new_zeros(scores.shape[-1])
    prior[0] = _ROWS_OF_THE_SINGLE
    weights = torch.full_like(prior, 1 / len(prior))
    for _ in range(300):
        weights = counts @ (scores + weights.log()).softmax(-1) + prior
        weights = weights / weights.sum()
    return weights


def _effective_rows(share: Tensor) -> float:
    return float(share.sum().square() / share.square().sum())
