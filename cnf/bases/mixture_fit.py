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
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from cnf._moments import column_moments, shrunk_correlation

_ROWS = 5000
_SIZES = (2, 4, 8, 16, 32, 64)
_ROWS_OF_A_COMPONENT = 4
_WORK = 6e7
"""Most multiplications of an iteration over all folds."""
_ITERATIONS = 50
_SETTLED = 1e-3
"""Least gain of an iteration, in nats for each row."""
_LEAST_VARIANCE = 1e-6
_ROWS_OF_THE_SINGLE = 5.0
_LEAST_SHARE = 1e-3
_NUMBERS_AT_ONCE = 4_000_000


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
        if torch.compiler.is_compiling():
            return self.log_joint(z).logsumexp(-1)
        rows = max(1, _NUMBERS_AT_ONCE // self.means.numel())
        return torch.cat([self.log_joint(part).logsumexp(-1) for part in z.split(rows)])

    def log_joint(self, z: Tensor) -> Tensor:
        """Return the log-density of each row with each component, ``(rows, components)``.

        Several mixtures at a time have a leading axis in each tensor, and in the result.
        """
        distance = (z - self.means.unsqueeze(-2)).mT
        scaled = torch.linalg.solve_triangular(self.scale_trils, distance, upper=False)
        volume = self.scale_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * z.shape[-1] * math.log(2 * math.pi)
        weight = self.log_weights - volume - constant
        log_prob: Tensor = -0.5 * scaled.square().sum(-2).mT + weight.unsqueeze(-2)
        return log_prob


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
    fold = _folds(len(rows), generator)
    training = share * (fold != torch.arange(int(fold.max()) + 1).unsqueeze(-1))
    scored = fold >= 0
    candidates = _candidates(rows, share, len(training))
    scores = []
    for candidate in candidates:
        fitted, is_regular = _fitted(candidate, rows, training, generator)
        of_folds = fitted.log_joint(rows).logsumexp(-1).where(is_regular.unsqueeze(-1), -math.inf)
        scores.append(of_folds.T[scored].gather(-1, fold[scored].unsqueeze(-1)).squeeze(-1))
    parts = []
    for weight, candidate in zip(
        _weights(torch.stack(scores, -1), share[scored]), candidates, strict=True
    ):
        if weight >= _LEAST_SHARE:
            fitted, is_regular = _fitted(candidate, rows, share.unsqueeze(0), generator)
            if is_regular:
                log_weights, means, scale_trils = (part[0] for part in fitted)
                parts.append((log_weights + weight.log(), means, scale_trils))
    log_weights, means, scale_trils = map(torch.cat, zip(*parts, strict=True))
    return Mixture(log_weights.log_softmax(0), means, scale_trils)


def _folds(rows: int, generator: Generator) -> Tensor:
    """Return the fold of each row, the fewer the more rows; -1 for rows that are never held out."""
    count = min(10, rows) if rows <= 200 else 5
    fold = torch.randperm(rows, generator=generator) % count
    return fold if rows <= 1000 else fold.where(fold == 0, -1)


def _candidates(rows: Tensor, share: Tensor, folds: int) -> list[_Candidate]:
    count, features = rows.shape
    most = min(
        float(_effective_rows(share)) / _ROWS_OF_A_COMPONENT, _WORK / (count * features**2 * folds)
    )
    return [_Candidate(1, 0.0, shrunk=True), _Candidate(1, 0.0)] + [
        _Candidate(size, prior_rows)
        for size in _SIZES
        if size <= most
        for prior_rows in (0.0, 0.1, features + 2.0)
    ]


def _fitted(
    candidate: _Candidate, rows: Tensor, share: Tensor, generator: Generator
) -> tuple[Mixture, Tensor]:
    """Fit a mixture for each row of shares ``(mixtures, rows)`` by expectation-maximisation.

    Returns:
        The mixtures, and which of them have no singular covariance.
    """
    share = share / share.sum(-1, keepdim=True)
    mean = share @ rows
    centred = rows - mean.unsqueeze(-2)
    weighted = share.unsqueeze(-1) * centred
    covariance = weighted.mT @ centred
    if candidate.components == 1 and not candidate.shrunk:
        return _mixture(rows.new_zeros(len(share), 1), mean.unsqueeze(1), covariance.unsqueeze(1))
    std = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().unsqueeze(-2)
    scaled = centred / std.clamp(min=_LEAST_VARIANCE)
    correlation = torch.stack(
        [
            shrunk_correlation(each, weight, least=1 / float(_effective_rows(weight)))
            for each, weight in zip(scaled, share, strict=True)
        ]
    )
    shrunk = (std.mT * correlation * std).unsqueeze(1)
    if candidate.shrunk:
        return _mixture(rows.new_zeros(len(share), 1), mean.unsqueeze(1), shrunk)
    prior = shrunk / candidate.components ** (2 / rows.shape[-1])
    squares = (rows.unsqueeze(-1) * rows.unsqueeze(-2)).flatten(-2)
    chances = _clusters(rows, share, candidate.components, generator)
    before = torch.full_like(mean[:, 0], -math.inf)
    for _ in range(_ITERATIONS):
        mixture, is_regular = _maximised(rows, squares, share, chances, prior, candidate.prior_rows)
        joint = _log_joint(mixture, rows, squares)
        now = (share * joint.logsumexp(-1)).sum(-1)
        if not (now - before >= _SETTLED)[is_regular].any():
            break
        chances, before = joint.softmax(-1), now
    return mixture, is_regular


def _log_joint(mixture: Mixture, rows: Tensor, squares: Tensor) -> Tensor:
    """Return `Mixture.log_joint` by matrix products: faster, and precise enough to iterate."""
    log_weights, means, scale_trils = mixture
    precision = torch.cholesky_inverse(scale_trils)
    linear = (precision @ means.unsqueeze(-1)).squeeze(-1)
    constant = log_weights - 0.5 * (linear * means).sum(-1)
    constant = constant - scale_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    joint: Tensor = rows @ linear.mT - 0.5 * (squares @ precision.flatten(-2).mT)
    return joint + constant.unsqueeze(-2)


def _maximised(
    rows: Tensor, squares: Tensor, share: Tensor, chances: Tensor, prior: Tensor, prior_rows: float
) -> tuple[Mixture, Tensor]:
    """Return the mixtures for the chances of the components given each row, the M step."""
    counts = ((_effective_rows(share).unsqueeze(-1) * share).unsqueeze(-1) * chances).mT
    count = counts.sum(-1)
    log_weights = (count + 1).log()  # a uniform Dirichlet prior of one row each
    means = counts @ rows / count.clamp(min=_LEAST_VARIANCE).unsqueeze(-1)
    count = count[..., None, None]
    moments = (counts @ squares).unflatten(-1, prior.shape[-2:])
    scatter = moments - count * means.unsqueeze(-1) * means.unsqueeze(-2)
    covariances = (scatter + prior_rows * prior) / (count + prior_rows).clamp(min=_LEAST_VARIANCE)
    return _mixture(log_weights.log_softmax(-1), means, covariances)


def _mixture(log_weights: Tensor, means: Tensor, covariances: Tensor) -> tuple[Mixture, Tensor]:
    """Return mixtures, and which of them have no singular covariance."""
    identity = torch.eye(means.shape[-1], dtype=means.dtype)
    symmetric = 0.5 * (covariances + covariances.mT) + _LEAST_VARIANCE * identity
    scale_trils, failures = torch.linalg.cholesky_ex(symmetric)
    regular = failures == 0
    # The singular ones go on as something finite.
    scale_trils = scale_trils.where(regular[..., None, None], identity)
    return Mixture(log_weights, means, scale_trils), regular.all(-1)


def _clusters(rows: Tensor, share: Tensor, size: int, generator: Generator) -> Tensor:
    """Return the clusters of the rows by k-means, as chances of 0 and 1."""
    centres = rows[torch.multinomial(share, 1, generator=generator)]
    copies = rows.expand(len(share), *rows.shape)
    for _ in range(size - 1):
        chance = share * torch.cdist(copies, centres).amin(-1).square()
        chance = chance.where(chance.sum(-1, keepdim=True) > 0, share)
        place = torch.multinomial(chance, 1, generator=generator)
        centres = torch.cat([centres, rows[place]], -2)
    for _ in range(10):
        nearest = torch.cdist(copies, centres).argmin(-1)
        chances = torch.nn.functional.one_hot(nearest, size).to(rows)
        shares = (share.unsqueeze(-1) * chances).mT
        total = shares.sum(-1, keepdim=True)
        means = shares @ rows / total.clamp(min=torch.finfo(rows.dtype).tiny)
        centres = means.where(total > 0, centres)
    return chances


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


def _effective_rows(share: Tensor) -> Tensor:
    return share.sum(-1).square() / share.square().sum(-1)
