"""Conversion of flows of other libraries; parameters are shared, and densities stay the same."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributions import ComposeTransform, Distribution, TransformedDistribution

from cnf._checks import check_type
from cnf.adapters.bases import NormflowsBase, TorchBase
from cnf.adapters.library_modes import is_a
from cnf.adapters.transforms import FromNflows, FromNormflows, FromTorch, FromZuko
from cnf.flows.flow import Flow
from cnf.transforms import Flatten, Transform


def from_torch(distribution: Distribution) -> Flow:
    """Convert a torch distribution of vectors to a flow; `FromTorch` wraps a transform alone.

    Args:
        distribution: One with one event axis and no batch, perhaps a `TransformedDistribution`.

    Raises:
        TypeError: If `distribution` is no torch distribution.
        ValueError: If it has another shape, or a transform does not map vectors of this size.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, LogNormal
        >>> flow = from_torch(Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1))
        >>> flow.log_prob(torch.ones(2))
        tensor(-1.8379)
    """
    check_type("distribution", distribution, Distribution, "one of torch.distributions")
    if not isinstance(distribution, TransformedDistribution):
        return Flow([], TorchBase(distribution))
    base = TorchBase(distribution.base_dist)
    return Flow([FromTorch(ComposeTransform(distribution.transforms), base.features)], base)


def from_zuko(flow: nn.Module, context_features: int = 0) -> Flow:
    """Convert a flow, or another lazy distribution, of zuko; `FromZuko` wraps a transform alone.

    Args:
        flow: The flow.
        context_features: Size of the context that it is called with; 0 for none.

    Raises:
        TypeError: If `flow` is no module, or it or its base returns no distribution when called.
        ValueError: If its events are not vectors.

    Example:
        >>> import torch
        >>> import zuko
        >>> theirs = zuko.flows.MAF(2, context=3)
        >>> flow = from_zuko(theirs, context_features=3)
        >>> x, context = torch.randn(5, 2), torch.randn(5, 3)
        >>> torch.allclose(flow.log_prob(x, context), theirs(context).log_prob(x))
        True
    """
    check_type("flow", flow, nn.Module, "a zuko.flows.Flow")
    if not (hasattr(flow, "transform") and hasattr(flow, "base")):
        return Flow([], TorchBase(flow))
    base = TorchBase(flow.get_submodule("base"))
    transform = FromZuko(flow.get_submodule("transform"), base.features, context_features)
    return Flow([transform], base)


def from_nflows(
    flow: nn.Module, context_features: int = 0, *, shape: Sequence[int] | None = None
) -> Flow:
    """Convert a flow of nflows with a standard normal base; `FromNflows` wraps a transform alone.

    Events of several axes, such as images, keep their shape.

    Args:
        flow: The flow.
        context_features: Size of the context, before the flow's own embedding; 0 for none.
        shape: Shape of an event, if the base has another, as in a multi-scale flow.

    Raises:
        TypeError: If `flow` is no flow of nflows, or its base is no StandardNormal.

    Example:
        >>> from nflows.distributions import StandardNormal
        >>> from nflows.flows import Flow
        >>> from nflows.transforms import LULinear
        >>> from_nflows(Flow(LULinear(2), StandardNormal([2]))).features
        2
    """
    if not is_a(flow, "nflows", "Flow"):
        raise TypeError(f"flow must be a flow of nflows; got {type(flow).__name__}.")
    base = flow.get_submodule("_distribution")
    if not is_a(base, "nflows", "StandardNormal"):
        raise TypeError(
            f"the base must be a StandardNormal of nflows; got {type(base).__name__}. Wrap the "
            "transform alone in FromNflows, and give cnf.Flow a base."
        )
    latent: Any = base._shape
    sizes = tuple(latent if shape is None else shape)
    transform = FromNflows(
        flow.get_submodule("_transform"),
        sizes,
        context_features,
        latent_shape=latent,
        embedding=flow.get_submodule("_embedding_net"),
    )
    return Flow(_with_flatten(transform, sizes))


def from_normflows(
    flow: nn.Module, context_features: int = 0, *, shape: Sequence[int] | None = None
) -> Flow:
    """Convert a `NormalizingFlow` of normflows; `FromNormflows` wraps layers alone.

    The flow may be conditional. Events of several axes, such as images, keep their shape.

    Args:
        flow: The flow.
        context_features: Size of the context; 0 for none.
        shape: Shape of an event, if the base has another, as where layers squeeze.

    Raises:
        TypeError: If `flow` is no such flow, a part is no bijection of single rows, or the base
            depends on a context or a class.
        ValueError: If parts have more than one dtype.

    Example:
        >>> import torch
        >>> import normflows
        >>> theirs = normflows.NormalizingFlow(
        ...     normflows.distributions.DiagGaussian(2), [normflows.flows.LULinearPermute(2)]
        ... )
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(from_normflows(theirs).log_prob(x), theirs.log_prob(x))
        True
    """
    if not is_a(flow, "normflows", "NormalizingFlow"):
        raise TypeError(
            f"flow must be a NormalizingFlow of normflows; got {type(flow).__name__}. Wrap its "
            "layers in FromNormflows."
        )
    base = NormflowsBase(flow.get_submodule("q0"))
    sizes = base.shape if shape is None else tuple(shape)
    layers = list(flow.get_submodule("flows").children())
    transform = FromNormflows(layers, sizes, context_features, latent_shape=base.shape)
    return Flow(_with_flatten(transform, sizes), base)


def _with_flatten(transform: Transform, shape: Sequence[int]) -> list[Transform]:
    return [transform] if len(shape) == 1 else [Flatten(shape), transform]
