"""Mixture of flows, each a chart of the data."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Shaped
from torch import Generator, Tensor, nn
from torch.distributions import constraints

from cnf._checks import check_type, is_hidden, reference_tensor
from cnf._shapes import BaseRows, Context
from cnf.bases import Base, Likelihood, weakest
from cnf.flows.flow import Flow
from cnf.transforms import Transform
from cnf.transforms.chain import agreed_context_features
from cnf.vector_fields.conditioning import ContextScaling, scaled_context


class MixtureOfFlows(Base):
    r"""Mixture of flows, as a base: ``Flow([], base=MixtureOfFlows(flows))`` is a density model.

    .. math:: p(z) = \sum_k \pi_k \, p_k(z)

    summed exactly. A continuous flow is a deformation of its base, so that it connects what is
    apart; a mixture of one flow for each connected part, or for each chart of a surface, does not.
    Charts of weight 0 take no part.

    The log of a sum of estimates is too large on average, so with several charts it is a biased
    estimate.

    Args:
        flows: The charts, densities of vectors of the same size, with the same context or none.
        gate: Module that maps the standardised context to unnormalised log-weights, ``(*batch,
            charts)``, such as an `MLPConditioner`; None for one trained log-weight a chart,
            `log_weights`.
        context_features: Size of the context of the gate, where no flow has one.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no flow, the flows do not fit together, one has its density on a
            surface alone or none, or there is a gate but no context; when called, if the gate
            returns another number of charts.

    References:
        Sidheekh et al. (2022), VQ-Flows: Vector Quantized Local Normalizing Flows.
        https://arxiv.org/abs/2203.11556

    Example:
        >>> from cnf.transforms import Affine
        >>> charts = [Flow([Affine(2)]), Flow([Affine(2)])]
        >>> mixture = MixtureOfFlows(charts)
        >>> mixture.set_weights(torch.tensor([3, 1]))
        >>> mixture.responsibilities(torch.zeros(2))
        tensor([0.7500, 0.2500], grad_fn=<SoftmaxBackward0>)
    """

    def __init__(
        self, flows: Iterable[Flow], gate: nn.Module | None = None, context_features: int = 0
    ) -> None:
        parts = _checked(flows)
        ends = [part for flow in parts for part in (flow.transforms, flow.base)]
        super().__init__(parts[0].features, agreed_context_features(ends) or context_features)
        self.flows = nn.ModuleList(parts)
        like = reference_tensor(parts[0]).detach()
        if gate is not None:
            check_type("gate", gate, nn.Module, "wrap a function of the context in a module")
            if not self.context_features:
                raise ValueError(
                    "gate must be None without a context, because it is a function of it; got "
                    f"{type(gate).__name__}. Give context_features, if no flow has a context."
                )
            self.context_scaling = ContextScaling(self.context_features).to(like)
        else:
            self.log_weights = nn.Parameter(like.new_zeros(len(parts)))
        self.gate = gate

    def extra_repr(self) -> str:
        """Number of features and charts."""
        return f"{self.features}, charts={len(self.flows)}"

    @property
    def support(self) -> constraints.Constraint:
        """The support of the charts, which is the same for all."""
        return self._charts[0].support

    @property
    def likelihood(self) -> Likelihood:
        """Weakest kind of the charts; a biased estimate where several are summed, one estimated."""
        kinds = {flow.likelihood for flow in self._charts}
        inner = {part.likelihood for part in self.flows.modules() if isinstance(part, Transform)}
        if len(self.flows) > 1 and "estimate" in kinds | inner:
            kinds.add("biased_estimate")
        return weakest(kinds)

    @property
    def has_rsample(self) -> bool:
        """Whether draws have gradients: not of weights, nor of charts without them."""
        weights = [self.log_weights] if self.gate is None else list(self.gate.parameters())
        is_fixed = not any(weight.requires_grad for weight in weights)
        return is_fixed and all(flow.base.has_rsample for flow in self._charts)

    @property
    def needs_initialization(self) -> bool:
        """Whether a chart or the gate has yet to set something from data."""
        if self.gate is not None and self.context_scaling.needs_initialization:
            return True
        return any(
            flow.transforms.needs_initialization or flow.base.needs_initialization
            for flow in self._charts
        )

    def _initialize(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        if self.gate is not None:
            self.context_scaling.initialize(context)
        for flow in self._charts:
            flow.initialize(z, context if flow.context_features else None, generator=generator)

    @torch.no_grad()
    def set_weights(self, weights: Shaped[Tensor, " charts"]) -> None:
        """Set the weight of each chart, on any scale, such as the number of its rows.

        Raises:
            ValueError: If there is a gate, or the weights are not a number of at least 0 for each
                chart, one of them positive.
        """
        if self.gate is not None:
            raise ValueError("weights must be left to the gate of this mixture.")
        check_type("weights", weights, Tensor, "use torch.as_tensor(weights)")
        given = weights.to(self.log_weights.device, torch.float64)
        is_weight = given.isfinite() & (given >= 0)
        if given.shape != self.log_weights.shape or not is_weight.all() or not given.any():
            raise ValueError(
                f"weights must be {len(self.flows)} finite numbers of at least 0, one for each "
                f"chart, and not all 0; got {given.tolist()}."
            )
        self.log_weights.copy_((given / given.sum()).log())

    def responsibilities(
        self, z: BaseRows, context: Context | None = None, *, generator: Generator | None = None
    ) -> Float[Tensor, "*batch charts"]:
        """Return the probability of each chart given z: NaN outside of all charts."""
        return self._log_joint(z, context, generator).softmax(-1)

    @property
    def _charts(self) -> list[Flow]:
        return list(self.flows)  # type: ignore[arg-type]

    def _log_joint(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        """Return the log of weight times density of each chart; -inf for one of weight 0."""
        log_weights = self._log_weights(context)
        is_used = [True] * len(self.flows)
        if not is_hidden(log_weights):
            is_used = (log_weights > -torch.inf).reshape(-1, len(self.flows)).any(0).tolist()
        batch = z.shape[:-1]
        found = [
            flow.log_prob(z, context if flow.context_features else None, generator=generator)
            if used
            else z.new_zeros(batch)
            for flow, used in zip(self._charts, is_used, strict=True)
        ]
        return log_weights + torch.stack(found, -1)

    def _log_weights(self, context: Tensor | None) -> Tensor:
        if self.gate is None:
            return self.log_weights.log_softmax(0)
        values: Tensor = self.gate(scaled_context(self, context))
        if values.ndim == 0 or values.shape[-1] != len(self.flows):
            raise ValueError(
                f"gate must return {len(self.flows)} numbers, one for each chart; got shape "
                f"{tuple(values.shape)}."
            )
        return values.log_softmax(-1)

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        return self._log_joint(z, context, generator).logsumexp(-1)

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        if torch.is_grad_enabled() and not self.has_rsample:
            raise NotImplementedError(
                "draws of a mixture have no gradients of its weights: call under torch.no_grad(), "
                "or hold the weights, with mixture.log_weights.requires_grad_(False)."
            )
        weights = self._log_weights(context).exp().expand(*shape, -1)
        chosen = torch.multinomial(
            weights.reshape(-1, len(self.flows)), 1, replacement=True, generator=generator
        ).flatten()
        if context is not None:
            context = context.expand(*shape, -1).reshape(-1, self.context_features)
        order, parts = [], []
        for chart, flow in enumerate(self._charts):
            rows = (chosen == chart).nonzero().flatten()
            if len(rows) == 0:
                continue
            given = context[rows] if context is not None and flow.context_features else None
            count = () if given is not None else len(rows)
            parts.append(flow.rsample(count, given, generator=generator))
            order.append(rows)
        if not parts:
            return weights.new_zeros(*shape, self.features)
        return torch.cat(parts)[torch.cat(order).argsort()].reshape(*shape, self.features)


def _checked(flows: Iterable[Flow]) -> list[Flow]:
    if isinstance(flows, Flow) or not isinstance(flows, Iterable):
        raise TypeError(f"flows must be a list of flows; got {type(flows).__name__}.")
    parts = list(flows)
    if not parts:
        raise ValueError("flows must hold at least one flow; got none.")
    for part in parts:
        check_type("each of flows", part, Flow, "wrap transforms in Flow([...])")
    shapes = {tuple(part.event_shape) for part in parts}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"flows must take vectors of the same size; got {sorted(shapes)}.")
    for part in parts:
        if part.likelihood in ("on_manifold", "not_a_likelihood"):
            raise ValueError(
                "flows must have densities in all of space, whose sum is one; got one whose "
                f"likelihood is {part.likelihood!r}. Leave out transforms such as a "
                "ConformalEmbedding."
            )
    supports = {repr(part.support) for part in parts}
    if len(supports) > 1:
        raise ValueError(f"flows must have the same support; got {', '.join(sorted(supports))}.")
    return parts
