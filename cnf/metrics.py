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
