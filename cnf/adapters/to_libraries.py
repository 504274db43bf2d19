"""Conversion of flows to other libraries; parameters are shared."""

import importlib
from typing import Any

from torch import Tensor, nn

from cnf._checks import check_type
from cnf.flows.flow import Flow

_REMEDY = "wrap the transforms in Flow([...])"


def to_zuko(flow: Flow) -> Any:
    """Convert a flow to an instance of zuko's `Flow`.

    Code that only calls a flow to get a distribution, as lampe and sbi's wrapper of zuko's flows
    do, takes `flow` itself: ``flow(context)`` is a distribution with `rsample_and_log_prob`.

    Args:
        flow: The flow, of vectors.

    Raises:
        TypeError: If `flow` is no `Flow`.
        ImportError: If zuko is not installed.

    Example:
        >>> from cnf import CNF
        >>> x, log_prob = to_zuko(CNF(2))().rsample_and_log_prob((5,))
        >>> x.shape, log_prob.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    check_type("flow", flow, Flow, _REMEDY)
    return _door("zuko_flow", "zuko", "zuko").ZukoFlow(flow)


def to_pyro(flow: Flow, context: Tensor | None = None) -> Any:
    """Convert a flow given a context to a Pyro distribution, for ``pyro.sample``.

    Register the flow by ``pyro.module("flow", flow)`` to train it.

    Args:
        flow: The flow.
        context: The context, ``(*batch, context_features)``.

    Raises:
        TypeError: If `flow` is no `Flow`.
        ValueError: If the context does not fit.
        ImportError: If Pyro is not installed.
    """
    check_type("flow", flow, Flow, _REMEDY)
    return _door("pyro_distribution", "pyro", "pyro-ppl").PyroDistribution(flow(context))


def _door(module: str, library: str, package: str) -> Any:
    """Import the adapter module of an optional library."""
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f"{library} is not installed; try pip install {package}.") from error
    return importlib.import_module(f"cnf.adapters.{module}")


def to_nflows_transform(flow: Flow) -> nn.Module:
    """Convert the map of a flow to a transform of nflows, from data to noise, of batches of rows.

    Args:
        flow: The flow, a bijection; its base is ignored.

    Raises:
        TypeError: If `flow` is no `Flow`.
        ValueError: If a part of it is no bijection.

    Example:
        >>> import torch
        >>> from cnf import CNF
        >>> outputs, logabsdet = to_nflows_transform(CNF(2))(torch.zeros(5, 2))
        >>> outputs.shape, logabsdet.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    _check_bijection(flow)
    return _NflowsTransform(flow)


def to_normflows_flow(flow: Flow) -> nn.Module:
    """Convert the map of a flow to a layer of normflows, from latent to data, of batches of rows.

    Args:
        flow: The flow, a bijection; its base is ignored.

    Raises:
        TypeError: If `flow` is no `Flow`.
        ValueError: If a part of it is no bijection.

    Example:
        >>> import torch
        >>> from cnf import CNF
        >>> x, log_det = to_normflows_flow(CNF(2))(torch.zeros(5, 2))
        >>> x.shape, log_det.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    _check_bijection(flow)
    return _NormflowsFlow(flow)


def _check_bijection(flow: Flow) -> None:
    """Refuse a flow whose ladj is not the log-determinant of a Jacobian."""
    check_type("flow", flow, Flow, _REMEDY)
    for part in flow.transforms:
        if not part.is_bijective:
            raise ValueError(
                f"flow must be a bijection; got one with {type(part).__name__}. Leave that out "
                "and apply it to the data yourself, or use flow.log_prob, which is a lower bound."
            )


class _NflowsTransform(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.to_base_and_ladj(inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.to_data_and_ladj(inputs, context)


class _NormflowsFlow(_NflowsTransform):
    forward = _NflowsTransform.inverse
    inverse = _NflowsTransform.forward
