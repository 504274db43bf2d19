"""Wrappers of transforms of torch, zuko, nflows and normflows; they import no library."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Transform as TorchTransform
from torch.distributions import constraints

from cnf._checks import check_type
from cnf._warnings import warn
from cnf.adapters.bounded_solve import bounded
from cnf.adapters.library_modes import check_has_likelihood, is_a
from cnf.adapters.wrapped_transform import WrappedTransform
from cnf.transforms.base import WithLadj


class TorchTransformWrapper(WrappedTransform):
    """Wrapper of a torch transform from data to base, perhaps one for each context."""

    @abstractmethod
    def _given(self, context: Tensor | None) -> TorchTransform:
        """Hook: return the transform from data to base."""

    def _rows_to_base(self, x: Tensor, context: Tensor | None) -> WithLadj:
        return _call_and_ladj(self._given(context), x)

    def _rows_to_data(self, z: Tensor, context: Tensor | None) -> WithLadj:
        return _call_and_ladj(self._given(context).inv, z)

    def _to_base_value(
        self, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        def call(rows: Tensor, context: Tensor | None) -> WithLadj:
            return _call_alone(self._given(context), rows)

        return self._checked("x", call, x, context, generator)[0]

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        def call(rows: Tensor, context: Tensor | None) -> WithLadj:
            return _call_alone(self._given(context).inv, rows)

        return self._checked("z", call, z, context, generator)[0]


class FromTorch(TorchTransformWrapper):
    """Wrapper of a `torch.distributions.Transform` from base to data.

    For one that maps data to base, give its ``.inv``. Its tensors are not parameters: they are not
    trained, and keep their device. Its codomain is the support of the data.

    Args:
        transform: The transform, of vectors or of each number.
        features: Number of entries of x.

    Raises:
        TypeError: If `transform` is no torch transform.
        ValueError: If it is not bijective, or not a map between vectors of this size.

    Example:
        >>> from torch.distributions import ExpTransform
        >>> FromTorch(ExpTransform(), features=2).to_base(torch.ones(2)).tolist()
        [0.0, 0.0]
    """

    def __init__(self, transform: TorchTransform, features: int) -> None:
        check_type("transform", transform, TorchTransform, "of torch.distributions.transforms")
        super().__init__(features)
        size = torch.Size([self.features])
        vectors = max(transform.domain.event_dim, transform.codomain.event_dim) <= 1
        if not transform.bijective or not vectors or transform.forward_shape(size) != size:
            raise ValueError(
                f"transform must be a bijection between vectors of {features} entries; "
                f"got {transform}."
            )
        self.transform = transform

    @property
    def support(self) -> constraints.Constraint:
        """Codomain of the torch transform, for whole rows."""
        return _for_rows(self.transform.codomain)

    @property
    def codomain(self) -> constraints.Constraint:
        """Domain of the torch transform, for whole rows."""
        return _for_rows(self.transform.domain)

    def _given(self, context: Tensor | None) -> TorchTransform:
        return self.transform.inv


def _for_rows(constraint: constraints.Constraint) -> constraints.Constraint:
    return constraint if constraint.event_dim == 1 else constraints.independent(constraint, 1)


class FromZuko(TorchTransformWrapper):
    """Wrapper of a lazy transform of zuko from data to base, perhaps conditional.

    Transforms of zuko whose gradients lack parameters in evaluation mode run in training mode. The
    ladj of zuko's CNF, which zuko solves a hundred times more loosely than the path, is as precise
    as the path here. Its step size holds for a whole batch, so that the value of a row changes with
    the batch by about the tolerance (arguments `atol` and `rtol` of zuko's CNF). A solve of more
    than 10 000 evaluations raises an `ODEError`.

    Args:
        transform: The lazy transform; the ``.inv`` of one that maps base to data.
        features: Number of entries of x.
        context_features: Size of the context that it is called with; 0 for none.

    Raises:
        TypeError: If `transform` is no module.
    """

    def __init__(self, transform: nn.Module, features: int, context_features: int = 0) -> None:
        check_type("transform", transform, nn.Module, "a zuko.lazy.LazyTransform")
        super().__init__(features, context_features)
        self.transform = transform

    def _given(self, context: Tensor | None) -> TorchTransform:
        transform: TorchTransform = self.transform(context)
        return transform


class FromNflows(WrappedTransform):
    """Wrapper of a transform of nflows from data to base.

    Args:
        transform: The transform.
        shape: Number of features, or shape of the event, flattened in C order to a vector.
        context_features: Size of the context; 0 for none.
        latent_shape: Shape of the event at the base, if it differs.
        embedding: Embedding network of the context, as in a flow of nflows; None for none.

    Raises:
        TypeError: If `transform` is no module.
        ValueError: If a part is a SqueezeTransform with an odd factor, which it cannot invert.
    """

    def __init__(
        self,
        transform: nn.Module,
        shape: int | Sequence[int],
        context_features: int = 0,
        *,
        latent_shape: Sequence[int] | None = None,
        embedding: nn.Module | None = None,
    ) -> None:
        check_type("transform", transform, nn.Module, "a nflows.transforms.Transform")
        super().__init__(shape, context_features, latent_shape=latent_shape)
        for part in transform.modules():
            factor: Any = getattr(part, "factor", 2)
            if is_a(part, "nflows", "SqueezeTransform") and factor % 2:
                raise ValueError(
                    f"SqueezeTransform of nflows must have an even factor; got {factor}, which it "
                    "cannot invert. Use cnf.transforms.Squeeze."
                )
        self.transform = transform
        self.embedding = embedding

    def _embedded(self, context: Tensor | None) -> Any:
        return context if context is None or self.embedding is None else self.embedding(context)

    def _rows_to_base(self, x: Tensor, context: Tensor | None) -> WithLadj:
        z, ladj = self.transform(x, self._embedded(context))
        return z, ladj

    def _rows_to_data(self, z: Tensor, context: Tensor | None) -> WithLadj:
        inverse: Any = self.transform.inverse
        x, ladj = inverse(z, self._embedded(context))
        return x, ladj


class FromNormflows(WrappedTransform):
    """Wrapper of flow layers of normflows, which map base to data.

    A residual layer has the ladj of its evaluation mode, always with a gradient: exact for vectors
    of two entries, else an unbiased estimate with at least 20 terms. So a training step costs more
    than in normflows, and no series is truncated. The way to the data has normflows' accuracy, some
    thousandths, because its iteration stops early.

    Args:
        flows: One layer, or several in the order of normflows, from base to data.
        shape: Number of features, or shape of the event, flattened in C order to a vector.
        context_features: Size of the context; 0 for none.
        latent_shape: Shape of the event at the base, if it differs.

    Raises:
        TypeError: If a layer is no module, or no bijection of single rows.

    Warns:
        UserWarning: If a layer is a "MaskedAffineAutoregressive", which is an inverse
            autoregressive flow.
    """

    def __init__(
        self,
        flows: nn.Module | Sequence[nn.Module],
        shape: int | Sequence[int],
        context_features: int = 0,
        *,
        latent_shape: Sequence[int] | None = None,
    ) -> None:
        layers = list(flows) if isinstance(flows, nn.ModuleList | Sequence) else [flows]
        for layer in layers:
            check_type("each of flows", layer, nn.Module, "a normflows.flows.Flow")
            check_has_likelihood(layer)
            if is_a(layer, "normflows", "MaskedAffineAutoregressive"):
                warn(
                    "MaskedAffineAutoregressive of normflows is an inverse autoregressive flow: "
                    "log_prob of data calls its network once for each feature; for a masked one "
                    "wrap it in normflows.flows.Reverse."
                )
        super().__init__(shape, context_features, latent_shape=latent_shape)
        self.flows = nn.ModuleList(layers)

    def _rows_to_base(self, x: Tensor, context: Tensor | None) -> WithLadj:
        inverses = [(layer, layer.inverse) for layer in list(self.flows)[::-1]]
        return _through(inverses, x, context)

    def _rows_to_data(self, z: Tensor, context: Tensor | None) -> WithLadj:
        return _through([(layer, layer) for layer in self.flows], z, context)


def _through(calls: Sequence[tuple[nn.Module, Any]], x: Tensor, context: Tensor | None) -> WithLadj:
    """Apply layers of normflows in order; a ladj is 0, 0-dim or one number for each row."""
    total = x.new_zeros(len(x))
    given = {} if context is None else {"context": context}
    for layer, call in calls:
        try:
            x, ladj = call(x, **given)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{type(layer).__name__} of normflows has one direction only ({error}); its flow "
                "can be sampled and trained by ReverseKL, but has no log_prob of given data."
            ) from error
        total = total + torch.as_tensor(ladj).to(total).reshape(-1)
    return x, total


def _call_alone(transform: TorchTransform, x: Tensor) -> WithLadj:
    """Return the map of `x`, and zeros in place of its ladj, which is not computed."""
    with bounded(transform, x.dtype):
        return transform(x), x.new_zeros(len(x))


def _call_and_ladj(transform: TorchTransform, x: Tensor) -> WithLadj:
    """Return the map of `x` and its ladj, in one call where zuko offers one."""
    with bounded(transform, x.dtype):
        if hasattr(transform, "call_and_ladj"):
            y, ladj = transform.call_and_ladj(x)
        else:
            y = transform(x)
            ladj = transform.log_abs_det_jacobian(x, y)
    return y, ladj.sum(-1) if transform.domain.event_dim == 0 else ladj
