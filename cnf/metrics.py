"""Numbers that judge a density model."""

import math

from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_count


def bits_per_dim(log_prob: Float[Tensor, "*batch"], dimensions: int) -> Float[Tensor, "*batch"]:
    """Negative log-likelihood in bits for each dimension of an event.

    For discrete data, such as pixels of 256 levels, `log_prob` must be that of the integers, as a
    flow with `Dequantize` gives it. Densities of data scaled to [0, 1] would come out too low, by
    the log2 of the number of levels.

    Args:
        log_prob: Log-likelihood of each event, in nats.
        dimensions: Number of entries of an event.

    Raises:
        TypeError: If `dimensions` is not an int.
        ValueError: If `dimensions` is less than 1.

    Example:
        >>> import torch
        >>> uniform = -64 * torch.tensor(256.0).log()
        >>> bits_per_dim(uniform, 64)
        tensor(8.)
    """
    return -log_prob / (check_count("dimensions", dimensions) * math.log(2))


def effective_sample_size(log_weights: Float[Tensor, "draws *batch"]) -> Float[Tensor, "*batch"]:
    r"""How many independent draws from a target the weighted draws are worth, roughly.

    .. math:: \Big(\sum_i w_i\Big)^2 \Big/ \sum_i w_i^2

    a number from 1, where one weight outdoes the rest, to the number of draws, where all are equal.
    A constant factor of the weights does not matter. Few draws may miss the largest weights, and
    then look better than they are.

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
    # The largest weight is made 1: logs of large weights have few digits left for differences.
    weights = (log_weights - _largest(log_weights)).exp()
    return weights.sum(0).square() / weights.square().sum(0)


def log_mean_exp(log_weights: Float[Tensor, "draws *batch"]) -> Float[Tensor, "*batch"]:
    """Log of the mean of weights; of importance weights, it estimates log Z, in nats.

    Z is the integral of an unnormalised density. The mean of the weights is an unbiased estimate of
    it, and so the log of the mean is too small on average, the less so the more draws.

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
    """The largest along the first axis, which must be a finite number."""
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
