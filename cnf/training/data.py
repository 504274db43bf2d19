"""The rows that a flow is trained on, in whatever form they come, and the checks of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, StackDataset, TensorDataset

from cnf._checks import (
    check_context,
    check_events,
    check_support,
    check_vectors,
    reference_tensor,
    refuse_rows,
)
from cnf.flows.flow import Flow

Data = Tensor | tuple[Tensor, Tensor] | Mapping[str, Tensor] | Dataset[Any]
"""Rows ``(rows, *event_shape)``; a pair of rows and contexts ``(rows, context_features)``; both
by name, with weights ``(rows,)`` if wanted, ``{"x": ..., "context": ..., "weight": ...}``; or a
`torch.utils.data.Dataset` whose items are one of these three for a single row."""

_MOST_HELD_OUT = 1000
_MOST_LOOKED_AT = 10_000
_FORMS = "a tensor, a pair (x, context) or a dict with x and perhaps context and weight"


class Batch(NamedTuple):
    """Some of the rows."""

    x: Any = None
    """Rows of data, a tensor; None for an objective that takes no data."""
    context: Tensor | None = None
    """The context of each row, if there are contexts."""
    weight: Tensor | None = None
    """Weight of each row, ``(rows,)``, if there are weights."""


class TrainingData(ABC):
    """Rows that can be asked for by index.

    Args:
        name: Name of the argument that they came as, for messages.
        flow: The flow that they are for.
        contexts: Whether they are contexts alone.
    """

    def __init__(self, name: str, flow: Flow, *, contexts: bool) -> None:
        self.name = name
        self.flow = flow
        self.contexts = contexts

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def take(self, indices: Tensor) -> Batch:
        """The rows at these places, checked."""

    def some(self, most: int) -> Batch:
        """As many rows as there are, but `most` at most, evenly from first to last."""
        count = min(most, len(self))
        some = self.take(torch.arange(count) * len(self) // count)
        if some.weight is not None and not some.weight.sum() > 0:
            raise ValueError(
                f"the weights of {self.name} must not all be 0; got 0 in each of {count} rows, "
                "evenly from first to last."
            )
        return some

    def _batch(self, columns: Mapping[str, Tensor]) -> Batch:
        return Batch(columns.get("x"), columns.get("context"), columns.get("weight"))


class TensorRows(TrainingData):
    """Rows in tensors, checked once, without those of weight 0; weights have a mean of 1."""

    def __init__(self, name: str, data: Any, flow: Flow, *, contexts: bool = False) -> None:
        super().__init__(name, flow, contexts=contexts)
        columns = _by_name(name, data, contexts=contexts)
        self.columns = _checked(name, columns, flow, contexts=contexts)
        if "weight" in columns:
            given = self.columns.pop("weight")
            counted = given > 0
            if not counted.any():
                raise ValueError(f"the weights of {name} must not all be 0.")
            self.columns = {key: column[counted] for key, column in self.columns.items()}
            weight = given[counted]
            self.columns["weight"] = _of_mean(weight, weight).to(next(iter(self.columns.values())))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, indices: Tensor) -> Batch:
        """The rows at these places."""
        return self._batch(
            {key: column[indices.to(column.device)] for key, column in self.columns.items()}
        )


class DatasetRows(TrainingData):
    """Rows of a `Dataset`, read and checked when they are asked for.

    They are moved to the device of the flow. Weights have a mean of 1 over `_MOST_LOOKED_AT` rows.
    """

    def __init__(
        self, name: str, dataset: Dataset[Any], flow: Flow, *, contexts: bool = False
    ) -> None:
        super().__init__(name, flow, contexts=contexts)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"{name} must be a Dataset with a length and an item for each index; "
                f"got {type(dataset).__name__}."
            )
        self.dataset = dataset
        self.rows = len(dataset)
        if self.rows == 0:
            raise ValueError(f"{name} must have at least one row; got an empty Dataset.")
        self.weights: Tensor | None = None
        if self.take(torch.tensor([0])).weight is not None:
            self.weights = self.some(_MOST_LOOKED_AT).weight

    def __len__(self) -> int:
        return self.rows

    def take(self, indices: Tensor) -> Batch:
        """The rows at these places, in one call if the dataset has ``__getitems__``."""
        batch = self._read(indices)
        if batch.weight is None or self.weights is None:
            return batch
        weight = _of_mean(batch.weight, self.weights).to(reference_tensor(self.flow))
        if not weight.isfinite().all():
            raise ValueError(
                f"the weights of {self.name} must be alike in size; got one that "
                f"{weight.dtype} cannot hold in units of the mean of {len(self.weights)} others."
            )
        return batch._replace(weight=weight)

    def _read(self, indices: Tensor) -> Batch:
        places = indices.tolist()
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(places)
        else:
            items = [self.dataset[place] for place in places]
        named = [_by_name(self.name, item, contexts=self.contexts) for item in items]
        columns = _stacked(self.name, named)
        like = reference_tensor(self.flow)
        columns = {key: column.to(like.device) for key, column in columns.items()}
        try:
            return self._batch(_checked(self.name, columns, self.flow, contexts=self.contexts))
        except ValueError:
            for row, place in enumerate(places):
                self._refuse(place, {key: column[row] for key, column in columns.items()})
            raise

    def _refuse(self, place: int, item: Mapping[str, Tensor]) -> None:
        """Refuse a single row under its place in the dataset, if it is at fault by itself."""
        name, like = f"{self.name}[{place}]", reference_tensor(self.flow)
        if "x" in item:
            check_events(name, item["x"], self.flow.event_shape, like=like)
            check_support(name, item["x"], self.flow.support)
        if "context" in item and self.flow.context_features:
            features = self.flow.context_features
            check_vectors(f"the context of {name}", item["context"], features, like=like)


class PartOfRows(TrainingData):
    """Some of other rows.

    Args:
        rows: The rows.
        places: Which of them.
    """

    def __init__(self, rows: TrainingData, places: Tensor) -> None:
        super().__init__(rows.name, rows.flow, contexts=rows.contexts)
        self.rows = rows
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def take(self, indices: Tensor) -> Batch:
        """The rows at these places of the part."""
        return self.rows.take(self.places[indices])


def held_out_of(rows: TrainingData, share: float) -> tuple[TrainingData, TrainingData | None]:
    """Rows to train on, and others to validate on: a share at random, `_MOST_HELD_OUT` at most.

    None if the share is less than one row, or if those drawn weigh nothing.
    """
    count = min(int(share * len(rows)), _MOST_HELD_OUT)
    if count == 0:
        return rows, None
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    validation = PartOfRows(rows, order[:count])
    weight = validation.take(torch.arange(count)).weight
    if weight is not None and not weight.sum() > 0:
        return rows, None
    return PartOfRows(rows, order[count:]), validation


def as_rows(name: str, data: Any, flow: Flow, *, contexts: bool = False) -> TrainingData:
    """Data of any form as rows.

    Raises:
        TypeError: If they have no form that `Data` names.
        ValueError: If they do not fit the flow.
    """
    if isinstance(data, DataLoader):
        raise TypeError(
            f"{name} must be the rows themselves; got a DataLoader, which cuts them into "
            f"minibatches. Try {name}.dataset, and batch_size in TrainingConfig."
        )
    if isinstance(data, Iterator):
        raise TypeError(
            f"{name} must be the rows themselves; got a {type(data).__name__}, which gives each "
            f"once. Try torch.stack(list({name}))."
        )
    tensors = _tensors_of(data, reference_tensor(flow).device)
    if tensors is None and isinstance(data, Dataset):
        return DatasetRows(name, data, flow, contexts=contexts)
    return TensorRows(name, data if tensors is None else tensors, flow, contexts=contexts)


def _tensors_of(data: Any, device: torch.device) -> Any:
    """The tensors of one of torch's datasets of tensors, on a device; None if it is no such."""
    if type(data) not in (TensorDataset, StackDataset):
        return None
    parts: Any = data.tensors if isinstance(data, TensorDataset) else data.datasets
    columns = list(parts.values() if isinstance(parts, dict) else parts)
    if not all(isinstance(column, Tensor) for column in columns):
        return None
    columns = [column.to(device) for column in columns]
    return dict(zip(parts, columns, strict=True)) if isinstance(parts, dict) else tuple(columns)


def _of_mean(weight: Tensor, weights: Tensor) -> Tensor:
    """Weights over the mean of these weights, in a precision in which no sum can overflow."""
    weights = weights.to("cpu", torch.float64)
    largest = weights.max()
    return weight.to("cpu", torch.float64) / largest / (weights / largest).mean()


def _by_name(name: str, data: Any, *, contexts: bool) -> dict[str, Any]:
    """Data, or an item of a Dataset, as columns by name."""
    if isinstance(data, Mapping):
        first = "context" if contexts else "x"
        known = {"context"} if contexts else {"x", "context", "weight"}
        if data.get(first) is None or not data.keys() <= known:
            raise ValueError(
                f"{name} must have the keys {', '.join(sorted(known))}, of which {first} is "
                f"needed; got {', '.join(map(str, data))}."
            )
        return {key: value for key, value in data.items() if value is not None}
    if isinstance(data, tuple) and len(data) == 1:
        (data,) = data
    if isinstance(data, tuple) and len(data) > 2:
        raise ValueError(
            f"{name} must hold {_FORMS}; got a tuple of {len(data)}. Name its parts: "
            "{'x': x, 'context': context, 'weight': weight}."
        )
    if contexts:
        return {"context": data}
    if isinstance(data, tuple | list) and len(data) == 2:
        return {"x": data[0]} if data[1] is None else {"x": data[0], "context": data[1]}
    return {"x": data}


def _stacked(name: str, items: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The columns of single rows, which must have the same."""
    columns: dict[str, list[Tensor]] = {}
    items = list(items)
    for item in items:
        for key, value in item.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name} must hold {_FORMS} for each row; got {type(value).__name__} for {key}."
                )
            columns.setdefault(key, []).append(value)
    for key, values in columns.items():
        if len(values) < len(items) or len({value.shape for value in values}) > 1:
            raise ValueError(f"{name} must have {key} of the same shape in each row.")
    return {key: torch.stack(values) for key, values in columns.items()}


def _checked(
    name: str, columns: Mapping[str, Any], flow: Flow, *, contexts: bool
) -> dict[str, Tensor]:
    """The columns, if they fit the flow and each other."""
    like = reference_tensor(flow)
    context: Any = columns.get("context")
    x = context if contexts else columns["x"]
    shape = torch.Size([flow.context_features]) if contexts else flow.event_shape
    if not contexts:
        check_events(name, x, shape, like=like)
    if context is None and flow.context_features:
        raise ValueError(
            f"{name} must be a pair of rows and contexts, because the flow is conditional; got "
            f"rows alone. Pass (x, context), with context of shape (rows, {flow.context_features})."
        )
    check_context(context, flow.context_features, like=like)
    if x.ndim != 1 + len(shape) or len(x) == 0:
        expected = ", ".join(map(str, ("rows", *shape)))
        raise ValueError(f"{name} must have shape ({expected}); got {tuple(x.shape)}.")
    if not contexts:
        check_support(name, x, flow.support)
    if context is not None and context.shape[:-1] != x.shape[:1]:
        raise ValueError(
            f"{name} must have one context for each row; got {tuple(x.shape)} rows and "
            f"{tuple(context.shape)} contexts."
        )
    if "weight" in columns:
        _check_weight(name, columns["weight"], x)
    return dict(columns)


def _check_weight(name: str, weight: Tensor, x: Tensor) -> None:
    what = f"the weights of {name}"
    floating = isinstance(weight, Tensor) and weight.is_floating_point()
    like = torch.empty(0, dtype=weight.dtype, device=x.device) if floating else x
    check_events(what, weight, (), like=like)
    if weight.shape != x.shape[:1]:
        raise ValueError(f"{what} must have shape ({len(x)},); got {tuple(weight.shape)}.")
    refuse_rows(what, weight < 0, "at least 0")
