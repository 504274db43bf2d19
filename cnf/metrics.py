"""Numbers that judge a density model."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal

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


def gaussian_log_prob(
    x: Float[Tensor, "rows features"], training: Float[Tensor, "training_rows features"]
) -> Float[Tensor, " rows"] | None:
    """Log-density of rows by the Gaussian with mean and covariance of other rows, in nats.

    What a model must beat to have learnt anything beyond the covariance.

    Args:
        x: Rows to evaluate.
        training: Rows that the Gaussian is fitted to.

    Returns:
        One number for each row of `x`; None if the covariance is singular, as it is where columns
        are constant or depend on each other, or rows are too few.

    Example:
        >>> import torch
        >>> corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> gaussian_log_prob(torch.zeros(1, 2), corners)
        tensor([-2.1256])
    """
    if len(training) < 2:
        return None
    std, mean = torch.std_mean(training, 0)
    if not (std > 0).all():
        return None
    covariance = torch.atleast_2d(((training - mean) / std).T.cov())
    if torch.linalg.matrix_rank(covariance, hermitian=True) < len(mean):
        return None
    gaussian = MultivariateNormal(torch.zeros_like(mean), covariance)
    log_prob: Tensor = gaussian.log_prob((x - mean) / std) - std.log().sum()
    return log_prob
