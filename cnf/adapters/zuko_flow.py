"""Flows as flows of zuko. This imports zuko; `cnf.adapters.to_zuko` imports it when called."""

from torch import Tensor
from torch.distributions import Distribution, Transform
from zuko.lazy import Flow as TheirFlow
from zuko.lazy import LazyDistribution, LazyTransform

from cnf.bases import Base
from cnf.flows.as_torch.torch_transform import FlowTransform
from cnf.flows.flow import Flow


class ZukoFlow(TheirFlow):
    """Instance of zuko's `Flow` whose distribution has a single-solve `rsample_and_log_prob`."""

    def __init__(self, flow: Flow) -> None:
        super().__init__(_Map(flow), _Base(flow.base))

    def forward(self, c: Tensor | None = None) -> Distribution:
        """Return the flow given a context."""
        distribution: Distribution = self.transform.flow(c)
        return distribution


class _Map(LazyTransform):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, c: Tensor | None = None) -> Transform:
        return FlowTransform(self.flow, c)


class _Base(LazyDistribution):
    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base

    def forward(self, c: Tensor | None = None) -> Distribution:
        batch = () if c is None or not self.base.context_features else c.shape[:-1]
        return self.base.distribution(batch, c)
