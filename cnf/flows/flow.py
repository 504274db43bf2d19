"""Flow: a density model made of a base distribution and a chain of transforms."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from cnf._checks import (
    check_context,
    check_count,
    check_generator,
    check_sample_shape,
    holds,
    is_hidden,
    reference_tensor,
    refuse_overflow,
    rows_inside,
)
from cnf._memory import check_fits
from cnf._row_names import name_rows, rows_of_caller
from cnf._shapes import Context, Events
from cnf.bases import Likelihood, weakest
from cnf.flows.as_torch.distribution import FlowDistribution
from cnf.flows.map import FlowMap
from cnf.flows.standard_error import to_base_with_error
from cnf.flows.unnormalized.target import log_density_of_target
from cnf.transforms.chain import check_importance_samples
from cnf.transforms.support.constraints import row_before, select, spread

_OFF_SURFACE = 1e-3
"""Largest distance of a row from a surface, in 1 + its norm, at which it has a density."""


class Flow(FlowMap):
    """Density model made of a base distribution and a chain of transforms.

    ``log p(x) = log base(z) + ladj`` in nats, where the transforms map x to z with ladj. Points
    have shape ``(*batch, *event_shape)``: vectors, unless the first transform takes images. A
    context ``(*batch, context_features)`` broadcasts; a conditional flow needs one. Methods that
    draw random numbers take a `generator`. Errors of all methods are as in `log_prob`.

    Args:
        transforms: Transforms from data to base.
        base: Base distribution; None for a standard normal, or where the transforms end on a
            manifold for `base_on` it. If it is a flow, its transforms are
            appended to `transforms`, and its base is used.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the parts do not fit together, or the transforms do not reach the whole
            support of the base.

    References:
        Papamakarios et al. (2021), https://arxiv.org/abs/1912.02762; for the mean of importance
        weights Burda et al. (2016), https://arxiv.org/abs/1509.00519
    """

    @property
    def likelihood(self) -> Likelihood:
        """Kind of `log_prob`: the weakest among the parts, in the order of `Likelihood`."""
        return weakest([self.transforms.likelihood, self.base.likelihood])

    def forward(self, context: Context | None = None) -> FlowDistribution:
        """Return the flow given a context, as a `torch.distributions.Distribution`."""
        check_context(context, self.context_features, like=reference_tensor(self))
        return FlowDistribution(self, context)

    def log_prob(
        self,
        x: Events,
        context: Context | None = None,
        *,
        importance_samples: int = 1,
        generator: Generator | None = None,
    ) -> Float[Tensor, "*joint_batch"]:
        """Return the log-density of `x` in nats, of the kind that `likelihood` names.

        It is -inf outside of `support`, where the other methods raise an error. A lower bound is
        the log of the mean of `importance_samples` importance weights, computed at once; more
        weights give a tighter bound on average. A density "on_manifold" is one on the surface of
        the flow, in nats of its area, and rows off the surface are refused; see `distance`.

        Args:
            x: Points, ``(*batch, *event_shape)``.
            context: Context of a conditional flow.
            importance_samples: Number of weights; 1 unless the likelihood is a lower bound.
            generator: Source of the probes of an estimate, and of the draws of a bound.

        Raises:
            TypeError: If `x` or `context` is not a tensor.
            ValueError: If an argument has a wrong shape, dtype, device or value.
            ODEError: If a solve fails.
        """
        if check_count("importance_samples", importance_samples) != 1:
            kinds = self.transforms.likelihoods | {self.base.likelihood}
            check_importance_samples(kinds, importance_samples)
        x = self._validate("x", x, context, generator, "anywhere")
        inside = rows_inside(x, self.support)
        if holds(~inside.all()):
            with rows_of_caller(row_before(inside)):
                log_prob = self.log_prob(
                    *select(inside, x, context),
                    importance_samples=importance_samples,
                    generator=generator,
                )
            return spread(inside, log_prob, elsewhere=-math.inf)
        if importance_samples > 1:
            log_prob = self._log_mean_weight(x, context, importance_samples, generator)
        else:
            z, ladj = self.transforms.to_base_and_ladj(x, context, generator=generator)
            of_base = self.base.log_prob(z, context, generator=generator)
            if of_base.shape != ladj.shape:
                raise ValueError(
                    f"{type(self.base).__name__} must return a log-density for each row, of shape "
                    f"{tuple(ladj.shape)}; got {tuple(of_base.shape)}."
                )
            log_prob = of_base + ladj
        refuse_overflow("x", log_prob.detach().isnan(), "its log-density", x.dtype)
        if self.likelihood == "on_manifold":
            self._refuse_off_surface(x, context, generator)
        if not is_hidden(inside):
            return log_prob
        # NaN is outside of every support; torch.vmap and torch.export allow no check of it.
        nan = x.detach().isnan().flatten(x.ndim - len(self.event_shape)).any(-1)
        return torch.where(inside, log_prob, torch.where(nan, math.nan, -math.inf))

    def log_prob_and_error(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> tuple[Float[Tensor, "*joint_batch"], Float[Tensor, "*joint_batch"]]:
        """Return the log-density in nats, and its standard error; 0 if it is exact.

        Raises:
            ValueError: If the likelihood is a lower bound or biased, or not estimated by
                `Hutchinson` with at least 2 probes, or the base is not exact.
        """
        if self.base.likelihood == "estimate":
            raise ValueError(
                "base must be exact for a standard error, which comes from the probes of the "
                f"transforms; its likelihood is {self.base.likelihood!r}. Put the transforms of "
                "the base into the flow, as Flow(transforms, base=flow) does."
            )
        x = self._validate("x", x, context, generator, "anywhere")
        inside = rows_inside(x, self.support)
        if holds(~inside.all()):
            rows = select(inside, x, context)
            with rows_of_caller(row_before(inside)):
                log_prob, error = self.log_prob_and_error(*rows, generator=generator)
            error = spread(inside, error, elsewhere=0.0)
            return spread(inside, log_prob, elsewhere=-math.inf), error
        z, ladj, error = to_base_with_error(
            self.transforms, x, context, kind=self.likelihood, generator=generator
        )
        return self.base.log_prob(z, context) + ladj, error

    def sample(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> Float[Tensor, "*shape_and_event"]:
        """Draw from the flow, without gradient; see `rsample`."""
        with torch.no_grad():
            return self.rsample(sample_shape, context, generator=generator)

    def rsample(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> Float[Tensor, "*shape_and_event"]:
        """Draw from the flow, with gradients: ``(*sample_shape, *batch, *event_shape)``.

        Args:
            sample_shape: Number or shape of the draws for each context.
            context: Context of a conditional flow.
            generator: Source of the draws.
        """
        shape = self._shape(sample_shape, context, generator)
        z = self.base.rsample(shape, context, generator=generator)
        return self.transforms.to_data(z, context, generator=generator)

    def sample_and_log_prob(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> tuple[Float[Tensor, "*shape_and_event"], Float[Tensor, "*shape"]]:
        """Draw, with log-densities, without gradient; see `rsample_and_log_prob`."""
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape, context, generator=generator)

    def rsample_and_log_prob(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> tuple[Float[Tensor, "*shape_and_event"], Float[Tensor, "*shape"]]:
        """Draw, with log-densities in nats from the same solve, with gradients.

        A lower bound takes a second solve, by `log_prob`: the importance weight of the random
        numbers that made the draw is too large on average to be a bound.
        """
        if "lower_bound" in self.transforms.likelihoods:
            x = self.rsample(sample_shape, context, generator=generator)
            return x, self.log_prob(x, context, generator=generator)
        shape = self._shape(sample_shape, context, generator)
        z = self.base.rsample(shape, context, generator=generator)
        x, ladj = self.transforms.to_data_and_ladj(z, context, generator=generator)
        return x, self.base.log_prob(z, context, generator=generator) - ladj

    def rsample_and_log_weight(
        self,
        log_density: Callable[..., Tensor],
        sample_shape: int | Sequence[int] = (),
        context: Context | None = None,
        *,
        generator: Generator | None = None,
    ) -> tuple[Float[Tensor, "*shape_and_event"], Float[Tensor, "*shape"]]:
        r"""Draw, with log importance weights for a target, along the same path; with gradients.

        :math:`\log w = \log \tilde p(x) - \log \mathrm{base}(z)` plus the contributions of the
        transforms on the way from z to x. The mean of w is the integral of the target, also where
        transforms draw and the density of x is not known; but not where the divergence is an
        estimate, as the exponential of an unbiased estimate is biased.

        Args:
            log_density: Unnormalised log-density of the target, in nats: ``log_density(x)``, or
                ``log_density(x, context)`` for a conditional flow; it may be -inf.
            sample_shape: Number or shape of the draws for each context.
            context: Context of a conditional flow.
            generator: Source of the draws.

        Raises:
            TypeError: If `log_density` returns no tensor.
            ValueError: If it returns another shape, NaN or inf; or if the draws have no weights,
                because the likelihood of the base is a bound, or that of the flow is of a surface
                alone or is none.

        References:
            Wu, Koehler & Noe (2020), Stochastic Normalizing Flows, equation 8.
            https://arxiv.org/abs/2002.06707
        """
        if not callable(log_density):
            raise TypeError(f"log_density must be callable; got {type(log_density).__name__}.")
        if self.base.likelihood not in ("exact", "estimate"):
            raise ValueError(
                "base must have a log-density of its draws to weigh them; its likelihood is "
                f"{self.base.likelihood!r}."
            )
        if self.transforms.likelihood in ("on_manifold", "not_a_likelihood"):
            raise ValueError(
                "flow must have a density in all of space, so that draws have weights; its "
                f"likelihood is {self.likelihood!r}. Leave out a ConformalEmbedding, and draw what "
                "the data lack, as with Inverse(Slice(...))."
            )
        shape = self._shape(sample_shape, context, generator)
        z = self.base.rsample(shape, context, generator=generator)
        x, ladj = self.transforms.to_data_and_ladj(z, context, generator=generator)
        target = log_density_of_target(log_density, x, context, shape)
        return x, target - self.base.log_prob(z, context, generator=generator) + ladj

    @torch.no_grad()
    def _refuse_off_surface(
        self, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> None:
        """Refuse rows that are not on the surface of the flow, and have no density there."""
        distance = self._distance(x, context, generator)
        size = x.flatten(x.ndim - len(self.event_shape)).norm(dim=-1)
        off = distance > _OFF_SURFACE * (1 + size)
        if holds(off.any()):
            raise ValueError(
                "x must lie on the surface that the flow covers, the only place with a density; "
                f"the distance is up to {float(distance.max()):.3g} in {name_rows(off)}. Ask for "
                "the density of the projections, flow.to_data(flow.to_base(x)), and for "
                "flow.distance(x)."
            )

    def _shape(
        self, sample_shape: int | Sequence[int], context: Tensor | None, generator: Generator | None
    ) -> torch.Size:
        """Return the shape of the draws for a context, without the event shape."""
        like = reference_tensor(self)
        check_context(context, self.context_features, like=like)
        check_generator(generator, like=like)
        batch = torch.Size() if context is None else context.shape[:-1]
        shape = check_sample_shape(sample_shape) + batch
        numbers = math.prod(shape) * max(self.base.features, math.prod(self.event_shape))
        remedy = "Draw fewer at once, or with sample_in_chunks into a file."
        check_fits("sample_shape", sample_shape, numbers, like=like, remedy=remedy)
        return shape

    def _log_mean_weight(
        self, x: Tensor, context: Tensor | None, samples: int, generator: Generator | None
    ) -> Tensor:
        """Return the lower bound from `samples` weights of each row, for rows in the support."""
        remedy = "Take fewer, or fewer rows at once."
        check_fits("importance_samples", samples, samples * x.numel(), like=x, remedy=remedy)
        x = x.expand(samples, *x.shape)
        with rows_of_caller(lambda row: row[1:]):
            z, ladj = self.transforms.to_base_and_ladj(x, context, generator=generator)
        log_prob = self.base.log_prob(z, context, generator=generator)
        return (log_prob + ladj).logsumexp(0) - math.log(samples)
