"""Torch distribution of a flow given a context."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.kl import register_kl

from cnf._checks import (
    check_count,
    check_events,
    check_sample_shape,
    joint_batch_shape,
    reference_tensor,
)
from cnf.flows.as_torch.bound import BoundFlow, Flow
from cnf.flows.as_torch.torch_transform import FlowTransform


class FlowDistribution(Distribution):
    """Torch distribution of a flow given a context; made by ``flow(context)``, as in zuko.

    Draws have shape ``sample_shape + batch_shape + event_shape``. The batch shape is the context's,
    or ``()`` without a context; `expand` enlarges it. A distribution follows the flow through
    training, `to` and `load_state_dict`. Made within `torch.func.functional_call`, it keeps the
    parameters and buffers of that call.

    Moments, entropy and quantiles have no closed form; `estimate_mean`, `estimate_variance` and
    `estimate_entropy` draw. Estimate a KL divergence to a distribution q by the mean of
    ``log_p - q.log_prob(x)`` over draws ``x, log_p = p.rsample_and_log_prob((1000,))``.

    Args:
        flow: The flow.
        context: The context, ``(*batch, context_features)``.
        batch_shape: Batch shape where there is no context.

    Example:
        >>> from cnf import CNF
        >>> distribution = CNF(2)().expand((4,))
        >>> distribution.sample((3,)).shape
        torch.Size([3, 4, 2])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own form

    def __init__(
        self, flow: Flow, context: Tensor | None = None, batch_shape: Sequence[int] = ()
    ) -> None:
        self.flow = flow
        self.context = context
        self._bound = BoundFlow(flow)
        # Draws from some bases have no gradient; the gradient of rounded draws is zero.
        self.has_rsample = flow.base.has_rsample and not flow.support.is_discrete
        super().__init__(
            torch.Size(batch_shape) if context is None else context.shape[:-1],
            flow.event_shape,
            validate_args=False,  # the flow checks what comes in
        )

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"{type(self).__name__}({type(self.flow).__name__}, {shapes})"

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "FlowDistribution":
        """Return the distribution for a larger batch, whose draws are independent."""
        del _instance
        shape = check_sample_shape(batch_shape, "batch_shape")
        if not _broadcasts(self.batch_shape, shape):
            raise ValueError(
                f"batch_shape must be one that {tuple(self.batch_shape)} expands to; "
                f"got {tuple(shape)}."
            )
        context = self.context
        if context is not None:
            context = context.expand(*shape, context.shape[-1])
        expanded = FlowDistribution(self.flow, context, shape)
        expanded._bound = self._bound
        return expanded

    @property
    def support(self) -> constraints.Constraint:
        """Constraint on the values that have a density."""
        support: constraints.Constraint = self.flow.support
        return support

    @property
    def base(self) -> Distribution:
        """The distribution at t = 0, of the same batch shape."""
        base: Distribution = self.flow.base.distribution(self.batch_shape, self.context)
        return base

    @property
    def transform(self) -> FlowTransform:
        """The map from data to base."""
        transform = FlowTransform(self.flow, self.context)
        transform._bound = self._bound
        return transform

    def log_prob(
        self,
        value: Tensor,
        *,
        importance_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the log-density of `value` in nats, as `Flow.log_prob`; batch shapes broadcast."""
        self._bound.replacements()  # a flow that was converted would cause the errors below
        check_events("value", value, self.event_shape, like=reference_tensor(self.flow))
        shape = joint_batch_shape(value, torch.empty(*self.batch_shape, 0), len(self.event_shape))
        log_prob: Tensor = self._bound.call(
            "log_prob",
            value,
            self.context,
            importance_samples=importance_samples,
            generator=generator,
        )
        return log_prob.expand(shape)

    def sample(
        self, sample_shape: int | Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw without gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator=generator)

    def rsample(
        self, sample_shape: int | Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw differentiably."""
        shape = self._shape(sample_shape)
        drawn: Tensor = self._bound.call("rsample", shape, self.context, generator=generator)
        return drawn

    def rsample_and_log_prob(
        self, sample_shape: int | Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw differentiably, with the log-density in nats; see `Flow.rsample_and_log_prob`."""
        shape = self._shape(sample_shape)
        drawn: tuple[Tensor, Tensor] = self._bound.call(
            "rsample_and_log_prob", shape, self.context, generator=generator
        )
        return drawn

    def estimate_mean(
        self, draws: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Estimate the mean of each entry by Monte Carlo, with the standard error.

        Args:
            draws: Number of draws, at least 2.
            generator: Source of the draws.

        Returns:
            Two tensors of shape ``batch_shape + event_shape``.

        Raises:
            TypeError: If `draws` is not an int.
            ValueError: If `draws` is less than 2, or takes more memory than there is.
            ODEError: If the solve fails.
        """
        return _mean_and_error(self._draw(draws, generator))

    def estimate_variance(
        self, draws: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Estimate the variance of each entry, with the standard error, as `estimate_mean`."""
        x = self._draw(draws, generator)
        squares = (x - x.mean(0)).square() * (draws / (draws - 1))
        return _mean_and_error(squares)

    def estimate_entropy(
        self, draws: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Estimate the differential entropy in nats, with the standard error, without bias.

        The estimate is the mean of -log p over draws. Arguments and errors are as for
        `estimate_mean`, and both results have shape ``batch_shape``.

        Raises:
            NotImplementedError: If the likelihood is neither exact nor an unbiased estimate.
        """
        if self.flow.likelihood not in ("exact", "estimate"):
            raise NotImplementedError(
                f"the likelihood of this flow is {self.flow.likelihood!r}, so that -log_prob "
                "averaged over draws is not the entropy; for a lower bound it is an upper bound."
            )
        check_count("draws", draws, least=2)
        with torch.no_grad():
            _, log_prob = self.rsample_and_log_prob(draws, generator=generator)
        return _mean_and_error(-log_prob)

    def _draw(self, draws: int, generator: torch.Generator | None) -> Tensor:
        return self.sample(check_count("draws", draws, least=2), generator=generator)

    @property
    def mean(self) -> NoReturn:
        """Not available in closed form: use `estimate_mean`."""
        raise _lacking("mean", "estimate_mean(draws)")

    @property
    def variance(self) -> NoReturn:
        """Not available in closed form: use `estimate_variance`."""
        raise _lacking("variance", "estimate_variance(draws)")

    @property
    def stddev(self) -> NoReturn:
        """Not available in closed form: use `estimate_variance`."""
        raise _lacking("stddev", "estimate_variance(draws), and the square root of it")

    @property
    def mode(self) -> NoReturn:
        """Not available in closed form: maximise `log_prob`."""
        raise _lacking("mode", "an optimizer of torch on -log_prob(x), from the best of many draws")

    def entropy(self) -> NoReturn:
        """Not available in closed form: use `estimate_entropy`."""
        raise _lacking("entropy", "estimate_entropy(draws)")

    def perplexity(self) -> NoReturn:
        """Not available in closed form: use `estimate_entropy`."""
        raise _lacking("perplexity", "estimate_entropy(draws), and exp of it")

    def cdf(self, value: Tensor) -> NoReturn:
        """Not available in closed form: count draws."""
        del value
        raise _lacking("cdf", "the fraction of draws below, (sample(n) <= value).all(-1).mean()")

    def icdf(self, value: Tensor) -> NoReturn:
        """Not available in closed form: take quantiles of draws."""
        del value
        raise _lacking("icdf", "quantiles of draws, sample((n,)).quantile(q, 0)")

    def enumerate_support(self, expand: bool = True) -> NoReturn:
        """Not available, because there are too many values: draw."""
        del expand
        raise _lacking("enumerate_support", "sample(n): there are too many values")

    def _shape(self, sample_shape: int | Sequence[int]) -> torch.Size:
        shape = check_sample_shape(sample_shape)
        return shape + self.batch_shape if self.context is None else shape


def _broadcasts(smaller: torch.Size, larger: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(smaller, larger) == larger)
    except RuntimeError:
        return False


def _lacking(name: str, remedy: str) -> NotImplementedError:
    return NotImplementedError(f"a flow has no {name} in closed form; use {remedy}.")


def _refuse_divergence(p: Distribution, q: Distribution) -> NoReturn:
    del q
    draws = "x = p.sample((1000,)); (p.log_prob(x)"
    if isinstance(p, FlowDistribution):
        draws = "x, log_p = p.rsample_and_log_prob((1000,)); (log_p"
    remedy = f"the mean over draws: {draws} - q.log_prob(x)).mean(0)"
    raise _lacking("kl_divergence", remedy)


# Torch's registry of divergences; pairs of other distributions are not affected.
register_kl(FlowDistribution, FlowDistribution)(_refuse_divergence)
register_kl(FlowDistribution, Distribution)(_refuse_divergence)
register_kl(Distribution, FlowDistribution)(_refuse_divergence)


def _mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of independent values along the first axis, and its standard error."""
    return values.mean(0), values.std(0) / len(values) ** 0.5
