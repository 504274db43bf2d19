"""Metrics of density models."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal

from cnf._checks import check_count, check_dense, check_type, check_vectors
from cnf._shapes import Values


def bits_per_dim(log_prob: Values, dimensions: int) -> Values:
    """Return the negative log-likelihood in bits for each dimension of an event.

    For discrete data, such as pixels of 256 levels, `log_prob` must be the log-probability of the
    integers, as from a flow with `Dequantize`. With the density of data scaled to [0, 1] the result
    is too low by the log2 of the number of levels.

    Args:
        log_prob: Log-likelihood of each event, in nats.
        dimensions: Number of entries of an event.

    Raises:
        TypeError: If `dimensions` is not an int, or `log_prob` no tensor.
        ValueError: If `dimensions` is less than 1, or `log_prob` is NaN or of no floating dtype.

    Example:
        >>> import torch
        >>> uniform = -64 * torch.tensor(256.0).log()
        >>> bits_per_dim(uniform, 64)
        tensor(8.)
    """
    _check_numbers("log_prob", log_prob)
    if log_prob.isnan().any():
        raise ValueError(f"log_prob must not be NaN; got {int(log_prob.isnan().sum())} of it.")
    return -log_prob / (check_count("dimensions", dimensions) * math.log(2))


def effective_sample_size(log_weights: Float[Tensor, "draws *batch"]) -> Values:
    r"""Return the effective sample size of importance weights.

    .. math:: \Big(\sum_i w_i\Big)^2 \Big/ \sum_i w_i^2

    It is 1 if one weight dominates, and the number of draws if all weights are equal. A constant
    factor of the weights does not matter. Few draws may miss the largest weights, so that the
    result is too large.

    Args:
        log_weights: Logs of the weights, along the first axis; -inf for a weight of zero.

    Raises:
        ValueError: If there are no weights, one is NaN or infinite, or all are zero.

    References:
        Elvira, Martino & Robert, Rethinking the Effective Sample Size.
        https://arxiv.org/abs/1809.04129

    Example:
        >>> import torch
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor(2.)
    """
    # The largest weight becomes 1: logs of large weights have few digits left for differences.
    weights = (log_weights - _largest(log_weights)).exp()
    return weights.sum(0).square() / weights.square().sum(0)


def log_mean_exp(log_weights: Float[Tensor, "draws *batch"]) -> Values:
    """Return the log of the mean weight; for importance weights an estimate of log Z, in nats.

    Z is the integral of an unnormalised density. The mean weight is an unbiased estimate of Z; its
    log is too small on average, with a bias that falls with the number of draws.

    Args:
        log_weights: Logs of the weights, along the first axis; -inf for a weight of zero.

    Raises:
        ValueError: If there are no weights, one is NaN or infinite, or all are zero.

    Example:
        >>> import torch
        >>> log_mean_exp(torch.tensor([1000.0, 1000.0]))
        tensor(1000.)
    """
    largest = _largest(log_weights)
    return largest + (log_weights - largest).exp().mean(0).log()


def _largest(log_weights: Tensor) -> Tensor:
    """Return the largest log-weights along the first axis; refuse columns without a finite one."""
    _check_numbers("log_weights", log_weights)
    if log_weights.ndim == 0 or len(log_weights) == 0:
        raise ValueError(
            f"log_weights must have shape (draws, *batch); got {tuple(log_weights.shape)}."
        )
    largest = log_weights.max(0).values
    if not largest.isfinite().all():
        raise ValueError(
            "log_weights must be finite, or -inf for a weight of zero, and not -inf throughout; "
            f"got {int((~largest.isfinite()).sum())} columns with NaN, inf or no weight but zero."
        )
    return largest


def _check_numbers(name: str, values: Tensor) -> None:
    check_type(name, values, Tensor, f"use torch.as_tensor({name})")
    check_dense(name, values)
    if not values.is_floating_point():
        raise ValueError(f"{name} must have a floating dtype; got {values.dtype}.")


def gaussian_log_prob(
    x: Float[Tensor, "rows features"], training: Float[Tensor, "training_rows features"]
) -> Float[Tensor, " rows"] | None:
    """Return the log-density of rows under a Gaussian fitted to other rows, in nats.

    It is the baseline for a model that learns more than the covariance.

    Args:
        x: Rows to evaluate.
        training: Rows to fit the Gaussian to.

    Returns:
        One number for each row of `x`; None if the covariance is singular, as it is where columns
        are constant or depend on each other, or rows are too few.

    Raises:
        TypeError: If an argument is not a tensor.
        ValueError: If it does not hold finite rows of the same size.

    Example:
        >>> import torch
        >>> corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> gaussian_log_prob(torch.zeros(1, 2), corners)
        tensor([-2.1256])
    """
    check_type("training", training, Tensor, "use torch.as_tensor(training)")
    features = training.shape[-1] if training.ndim else 0
    for name, rows in (("x", x), ("training", training)):
        check_vectors(name, rows, features, like=rows if isinstance(rows, Tensor) else training)
        if rows.ndim != 2:
            raise ValueError(f"{name} must have shape (rows, features); got {tuple(rows.shape)}.")
    if len(training) < 2:
        return None
    training, dtype = training.double(), x.dtype
    x = x.double()
    std, mean = torch.std_mean(training, 0)
    if not (std > 0).all():
        return None
    covariance = torch.atleast_2d(((training - mean) / std).T.cov())
    if torch.linalg.matrix_rank(covariance, hermitian=True) < len(mean):
        return None
    gaussian = MultivariateNormal(torch.zeros_like(mean), covariance)
    if len(x) == 0:  # torch cannot reshape it
        return x.new_zeros(0, dtype=dtype)
    log_prob: Tensor = gaussian.log_prob((x - mean) / std) - std.log().sum()
    return log_prob.to(dtype)
