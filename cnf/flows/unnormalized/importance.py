"""Normalisers of unnormalised densities, by importance sampling from a flow."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from cnf._checks import check_count, check_type
from cnf._shapes import Context, Values
from cnf._warnings import warn
from cnf.flows.flow import Flow
from cnf.metrics import effective_sample_size, log_mean_exp

_HEAVY = 0.7
"""Tail index of the weights from which means of them cannot be trusted (Vehtari et al.)."""
_LEAST_DRAWS = 100


class LogNormalizer(NamedTuple):
    """Result of `log_normalizer`."""

    log_z: Values
    """Log of the integral, in nats."""
    standard_error: Values
    """Standard error of `log_z`, in nats."""
    effective_sample_size: Values
    """Between 1 and the number of draws."""


@torch.no_grad()
def log_normalizer(
    log_density: Callable[..., Tensor],
    proposal: Flow,
    draws: int,
    context: Context | None = None,
    *,
    generator: Generator | None = None,
) -> LogNormalizer:
    r"""Estimate the log of the integral Z of an unnormalised density, from draws of a flow.

    :math:`\hat Z` is the mean of the weights of `Flow.rsample_and_log_weight`, and unbiased where
    these are; its log is too small on average. The standard error of the log is the standard error
    of the mean weight, divided by the mean weight. Where the flow has lighter tails than the
    density, or misses a part of it, the largest weights are missing too: a warning says so if the
    weights of the draws have a heavy tail.

    Args:
        log_density: Unnormalised log-density, as for `ReverseKL`; it may be -inf.
        proposal: The flow.
        draws: Number of draws, for each context.
        context: Contexts of a conditional flow, ``(*batch, context_features)``.
        generator: Source of the draws.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `draws` is less than 2, the density is zero at all draws, or as
            `Flow.rsample_and_log_weight`.

    References:
        Vehtari et al. (2024), Pareto Smoothed Importance Sampling, for the tail index.
        https://arxiv.org/abs/1507.02646

    Example:
        >>> from cnf.transforms import Affine
        >>> found = log_normalizer(lambda x: -0.5 * x.square().sum(-1), Flow([Affine(2)]), 100)
        >>> round(float(found.log_z), 3)  # log(2 pi)
        1.838
    """
    check_type("proposal", proposal, Flow, "wrap transforms in Flow([...])")
    check_count("draws", draws, least=2)
    _, log_weight = proposal.rsample_and_log_weight(
        log_density, draws, context, generator=generator
    )
    empty = log_weight.isneginf().all(0)
    if empty.any():
        raise ValueError(
            f"log_density must be finite at some of the {draws} draws of proposal; it is -inf at "
            f"all of them{_some(empty)}. Draw more, or move the proposal to the density."
        )
    log_z = log_mean_exp(log_weight)
    shares = (log_weight - log_z).exp()
    heavy = _tail_index(log_weight) > _HEAVY
    if heavy.any():
        warn(
            f"the weights of the draws have a heavy tail{_some(heavy)}, so that log_z may be off "
            "by more than its standard error: proposal has lighter tails than log_density, or "
            "misses a part of it. Widen its base, or train it further."
        )
    return LogNormalizer(log_z, shares.std(0) / math.sqrt(draws), effective_sample_size(log_weight))


def _tail_index(log_weight: Tensor) -> Tensor:
    """Return the index of the tail of the weights along the first axis (Hill 1975).

    It is the mean excess of the logs of the largest weights; for few draws 0.
    """
    draws = len(log_weight)
    if draws < _LEAST_DRAWS:
        return log_weight.new_zeros(log_weight.shape[1:])
    largest = log_weight.topk(int(min(draws / 5, 3 * math.sqrt(draws))) + 1, dim=0).values
    excess = largest[:-1] - largest[-1]
    return excess.nan_to_num(0.0, posinf=math.inf).mean(0)


def _some(mask: Tensor) -> str:
    return "" if mask.ndim == 0 else f" for {int(mask.sum())} of {mask.numel()} contexts"
