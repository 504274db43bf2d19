"""Surrogate of an autoencoder within a flow: the joint density of the data and of a core."""

import math

import torch
from torch import Generator, Tensor, nn

from cnf._checks import (
    check_count,
    check_generator,
    check_number,
    check_vectors,
    is_positive,
    reference_tensor,
)
from cnf._memory import check_fits
from cnf._shapes import Rows, Values
from cnf.bases import StandardNormal
from cnf.flows.flow import Flow
from cnf.objectives.base import Objective, weighted_mean
from cnf.transforms import Augment


class ExtendedAutoencoder(Objective):
    r"""Extended form of the autoencoder within a flow (AEF): a joint density at a learned core.

    An augmented flow is a density :math:`p(x, w)` of the data and of a core w. Here the core is a
    learned linear function of the data, and the loss of a row is

    .. math:: -\log p(x, w = V x)

    It is *neither* a likelihood of x nor a bound of one, and may lie above or below it: it leaves
    out the integral over w. `estimate` takes that integral.

    Args:
        flow: Exact flow behind an `Augment`, its first transform, whose draws have no part in the
            loss; such as an `AutoencoderCoupling` of the core and of all of x.

    Raises:
        TypeError: If `flow` is not a `Flow`.
        ValueError: If `flow` does not begin with an `Augment`, is conditional, or is not exact
            behind it.

    References:
        Silvestri, Roos & Ambrogioni (2022), Deterministic training of generative autoencoders
        using invertible layers. https://arxiv.org/abs/2205.09546

    Example:
        >>> from cnf.transforms import AutoencoderCoupling, Permute
        >>> core_first = Permute([3, 4, 0, 1, 2])
        >>> coupling = AutoencoderCoupling(5, core_features=2)
        >>> objective = ExtendedAutoencoder(Flow([Augment(3, 2), core_first, coupling]))
        >>> objective(torch.zeros(4, 3))  # the identity: five normal numbers, all zero
        tensor(4.5947, grad_fn=<NegBackward0>)
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow)
        first, *others = flow.transforms
        exact = flow.base.likelihood == "exact" and all(
            part.likelihood == "exact" for part in others
        )
        if not isinstance(first, Augment) or not exact or flow.context_features:
            raise ValueError(
                "flow must be an Augment, then exact transforms and an exact base, all without a "
                f"context; got {[type(part).__name__ for part in flow.transforms]} with "
                f"context_features={flow.context_features}."
            )
        self.projection = nn.Linear(flow.features, first.augment, bias=False)
        self.projection.to(reference_tensor(flow))

    def core(self, x: Rows) -> Tensor:
        """Return the core of each row, ``(*batch, augment)``."""
        check_vectors("x", x, self.flow.features, like=reference_tensor(self.flow))
        core: Tensor = self.projection(x)
        return core

    def estimate(
        self, x: Rows, samples: int = 100, *, std: float = 1.0, generator: Generator | None = None
    ) -> Values:
        r"""Estimate the log-density of each row under the augmented flow, in nats.

        .. math:: \log \frac1K \sum_k \frac{p(x, w_k)}{\mathcal N(w_k; V x, \sigma^2 I)},
            \qquad w_k \sim \mathcal N(V x, \sigma^2 I)

        Its mean is below the log-density, and rises to it with the number of draws.

        Args:
            x: Rows ``(*batch, features)``.
            samples: Number K of draws for each row.
            std: Standard deviation of the draws, best near that of the core given the row.
            generator: Source of random numbers.

        Raises:
            ValueError: If an argument is out of range or does not fit.
        """
        check_count("samples", samples)
        std = check_number("std", std, "positive and finite", is_positive)
        mean = self.core(x)
        check_generator(generator, like=mean)
        wide = samples * mean[..., :1].numel() * (x.shape[-1] + mean.shape[-1])
        check_fits("samples", samples, wide, like=x, remedy="Take fewer, or fewer rows at once.")
        noise = StandardNormal(mean.shape[-1]).to(mean)
        draws = noise.rsample(torch.Size([samples, *mean.shape[:-1]]), generator=generator)
        log_q = noise.log_prob(draws) - mean.shape[-1] * math.log(std)
        joint = self._joint(x.expand(samples, *x.shape), mean + std * draws)
        return (joint - log_q).logsumexp(0) - math.log(samples)

    def _loss(
        self,
        x: Tensor,
        context: Tensor | None,
        weight: Tensor | None,
        draws: int | None,
        generator: Generator | None,
    ) -> Tensor:
        return -weighted_mean(self._joint(x, self.core(x)), weight)

    def _joint(self, x: Tensor, core: Tensor) -> Tensor:
        z, ladj = self.flow.transforms[1:].to_base_and_ladj(torch.cat([x, core], -1))
        return self.flow.base.log_prob(z) + ladj
