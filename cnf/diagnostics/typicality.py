"""Typicality test: whether a batch has the mean log-density that batches of the data have."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from cnf._checks import check_count, check_number, refuse_rows

_RESAMPLES_AT_ONCE = 1_000_000
"""Most numbers that are drawn at once."""


@dataclass(frozen=True)
class TypicalityTest:
    r"""Test of batches of rows by their mean log-density, in both directions.

    A high density does not mean that rows are like the data: nearly all points of a distribution
    lie where the density is near its mean, and rows in the middle of it are denser than any of
    them. So the statistic of a batch of M rows is the distance of its mean log-density from that of
    the training rows,

    .. math:: \epsilon = \left| \frac1M \sum_m \log p(x_m) - \mathbb{E}_{train} \log p \right|

    in nats, and the test rejects where it exceeds nearly all of those of batches that are drawn
    with replacement from held-out rows. It needs only log-densities, of any model. Its power grows
    with M, and is small for single rows. Held-out rows must be other rows than the training rows.

    Args:
        training: Log-densities of the training rows, ``(rows,)``, in nats.
        held_out: Log-densities of held-out rows, ``(rows,)``.
        batch_size: Number M of rows of a batch.
        resamples: Number of drawn batches.
        seed: Seed of the draws.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If log-densities are not finite, there are none, or a number is out of range.

    References:
        Nalisnick et al. (2019), Detecting Out-of-Distribution Inputs to Deep Generative Models
        Using Typicality. https://arxiv.org/abs/1906.02994

    Example:
        >>> normal = torch.distributions.Normal(torch.zeros(50), torch.ones(50))
        >>> rows, others = torch.randn(2, 2000, 50, generator=torch.Generator().manual_seed(0))
        >>> test = TypicalityTest(
        ...     normal.log_prob(rows).sum(-1), normal.log_prob(others).sum(-1), batch_size=10
        ... )
        >>> zeros = normal.log_prob(torch.zeros(10, 50)).sum(-1)  # denser than all of them
        >>> test.rejects(zeros)
        tensor(True)
    """

    training: Float[Tensor, " training_rows"]
    """Log-densities of the training rows."""
    held_out: Float[Tensor, " held_out_rows"]
    """Log-densities of held-out rows."""
    batch_size: int = 1
    """Number of rows of a batch."""
    resamples: int = 10_000
    """Number of drawn batches."""
    seed: int = 0
    """Seed of the draws."""
    drawn: Float[Tensor, " resamples"] = field(init=False, repr=False)
    """Statistics of the drawn batches, from the smallest on."""

    def __post_init__(self) -> None:
        for name in ("training", "held_out"):
            log_prob = getattr(self, name)
            if not isinstance(log_prob, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor; got {type(log_prob).__name__}.")
            if log_prob.ndim != 1 or not len(log_prob):
                raise ValueError(
                    f"{name} must have one log-density for each row, and a row; got shape "
                    f"{tuple(log_prob.shape)}."
                )
            refuse_rows(name, ~log_prob.isfinite(), "finite")
        check_count("batch_size", self.batch_size)
        check_count("resamples", self.resamples)
        object.__setattr__(self, "drawn", self._draw())

    def _draw(self) -> Tensor:
        held_out = self.held_out.detach().double().cpu()
        generator = Generator().manual_seed(self.seed)
        at_once = max(1, _RESAMPLES_AT_ONCE // self.batch_size)
        parts = []
        for start in range(0, self.resamples, at_once):
            size = (min(at_once, self.resamples - start), self.batch_size)
            chosen = torch.randint(len(held_out), size, generator=generator)
            parts.append(self.statistic(held_out[chosen]))
        return torch.cat(parts).sort().values

    def statistic(self, log_prob: Float[Tensor, "*batches rows"]) -> Float[Tensor, "*batches"]:
        """Return the statistic of each batch, in nats.

        Raises:
            TypeError: If `log_prob` is no tensor.
            ValueError: If the last axis is not one batch, or a log-density is NaN.
        """
        if not isinstance(log_prob, Tensor):
            raise TypeError(f"log_prob must be a torch.Tensor; got {type(log_prob).__name__}.")
        if log_prob.shape[-1:] != (self.batch_size,):
            raise ValueError(
                f"log_prob must have the {self.batch_size} rows of a batch on its last axis; got "
                f"shape {tuple(log_prob.shape)}."
            )
        if log_prob.isnan().any():
            raise ValueError("log_prob must not be NaN; -inf stands for a density of zero.")
        mean = self.training.detach().double().cpu().mean()
        distance: Tensor = (log_prob.detach().double().cpu().mean(-1) - mean).abs()
        return distance

    def p_value(self, log_prob: Float[Tensor, "*batches rows"]) -> Float[Tensor, "*batches"]:
        """Return the share of drawn batches, and this one, at least as far from the mean.

        Raises:
            TypeError: If `log_prob` is no tensor.
            ValueError: As `statistic` raises it.
        """
        below = torch.searchsorted(self.drawn, self.statistic(log_prob), right=False)
        return (1 + len(self.drawn) - below) / (1 + len(self.drawn))

    def rejects(
        self, log_prob: Float[Tensor, "*batches rows"], *, level: float = 0.01
    ) -> Bool[Tensor, "*batches"]:
        """Return whether each batch is not like the data: whether its p-value is at most `level`.

        Args:
            log_prob: Log-densities of the rows of each batch.
            level: Share of batches of the data that are rejected.

        Raises:
            TypeError: If `log_prob` is no tensor.
            ValueError: If `level` is not between 0 and 1, or as `statistic` raises it.
        """
        check_number("level", level, "between 0 and 1", lambda share: 0 < share < 1)
        return self.p_value(log_prob) <= level
