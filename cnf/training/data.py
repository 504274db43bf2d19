"""Training data: tensors and Datasets of rows, contexts and weights."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, StackDataset, TensorDataset

from cnf._checks import check_context, check_events, check_support, check_vectors, reference_tensor
from cnf.flows.flow import Flow
from cnf.objectives.base import TARGETS_REMEDY, check_target, check_weight

Data = Tensor | tuple[Tensor, Tensor] | Mapping[str, Tensor] | Dataset[Any]
"""Rows ``(rows, *event_shape)``; a pair of rows and contexts ``(rows, context_features)``; both
by name, with weights ``(rows,)`` if wanted, ``{"x": ..., "context": ..., "weight": ...}``; or a
`torch.utils.data.Dataset` whose items are one of these three for a single row.

For an objective that takes targets, ``(rows, ...)`` of int64 or of the dtype of the flow: a pair of
rows and targets; or by name, with the key "target". Targets never reach the flow."""

_MOST_HELD_OUT = 1000
_MOST_LOOKED_AT = 10_000
_FORMS = "a tensor, a pair (x, context) or a dict with x and perhaps context and weight"
_FORMS_WITH_TARGETS = "a pair (x, target) or a dict with x, target and perhaps context and weight"


class Batch(NamedTuple):
    """Rows, with contexts, weights and targets if there are any; no rows without data."""

    x: Any = None
    context: Tensor | None = None
    weight: Tensor | None = None
    target: Tensor | None = None


class TrainingData(ABC):
    """Rows for a flow, by index; `name` is the argument.

    `contexts` says that x is missing, and `targets` that each row has a target.
    """

    def __init__(self, name: str, flow: Flow, *, contexts: bool, targets: bool) -> None:
        self.name = name
        self.flow = flow
        self.contexts = contexts
        self.targets = targets

    @property
    def forms(self) -> str:
        """Forms of the data in words."""
        return _FORMS_WITH_TARGETS if self.targets else _FORMS

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def take(self, indices: Tensor) -> Batch:
        """Return the checked rows at these indices."""

    def some(self, most: int) -> Batch:
        """Return all rows, or `most` rows evenly from first to last."""
        count = min(most, len(self))
        some = self.take(torch.arange(count) * len(self) // count)
        if some.weight is not None and not some.weight.sum() > 0:
            raise ValueError(
                f"the weights of {self.name} must not all be 0; got 0 in each of {count} rows, "
                "evenly from first to last."
            )
        return some

    def _by_name(self, data: Any) -> dict[str, Any]:
        """Return data, or an item of a Dataset, as columns by name."""
        if isinstance(data, Mapping):
            needed = {"context"} if self.contexts else {"x", "target"} if self.targets else {"x"}
            known = needed if self.contexts else {"context", "weight"} | needed
            found = {key: value for key, value in data.items() if value is not None}
            if not needed <= found.keys() or not data.keys() <= known:
                raise ValueError(
                    f"{self.name} must have the key {' and '.join(sorted(needed, reverse=True))}, "
                    f"and no others than {', '.join(sorted(known))}; got "
                    f"{', '.join(map(str, data))}."
                    + (f" {TARGETS_REMEDY}" if "target" in data.keys() - known else "")
                )
            return found
        if isinstance(data, tuple) and len(data) == 1:
            (data,) = data
        if isinstance(data, tuple) and len(data) > 2:
            raise ValueError(
                f"{self.name} must hold {self.forms}; got a tuple of {len(data)}. Name its parts: "
                "{'x': x, 'context': context, 'weight': weight}."
            )
        if self.contexts:
            return {"context": data}
        pair = isinstance(data, tuple | list) and len(data) == 2
        if self.targets:
            return self._with_target(data, pair)
        if pair:
            return {"x": data[0]} if data[1] is None else {"x": data[0], "context": data[1]}
        return {"x": data}

    def _with_target(self, data: Any, pair: bool) -> dict[str, Any]:
        """Return a pair of rows and targets, for an unconditional flow, by name."""
        if not pair or data[1] is None or self.flow.context_features:
            why = "the flow takes contexts too" if pair else "the objective takes targets"
            raise ValueError(
                f"{self.name} must be {self.forms}, because {why}; got "
                f"{'a pair' if pair else type(data).__name__}. Name the parts: "
                "{'x': x, 'target': target, 'context': context}."
            )
        return {"x": data[0], "target": data[1]}

    def _check(self, columns: Mapping[str, Any]) -> None:
        """Refuse columns that do not fit the flow or each other."""
        name, flow, contexts = self.name, self.flow, self.contexts
        like = reference_tensor(flow)
        context: Any = columns.get("context")
        x = context if contexts else columns["x"]
        shape = torch.Size([flow.context_features]) if contexts else flow.event_shape
        if not contexts:
            check_events(name, x, shape, like=like)
            check_support(name, x, flow.support)
        if context is None and flow.context_features:
            raise ValueError(
                f"{name} must be a pair of rows and contexts, because the flow is conditional; "
                "got rows alone. Pass (x, context), with context of shape "
                f"(rows, {flow.context_features})."
            )
        if isinstance(context, Tensor) and not flow.context_features:
            raise ValueError(
                "context must be None, because the model has context_features=0; got a context of "
                f"shape {tuple(context.shape)}. If it holds targets: {TARGETS_REMEDY}"
            )
        check_context(context, flow.context_features, like=like)
        if x.ndim != 1 + len(shape) or len(x) == 0:
            expected = ", ".join(map(str, ("rows", *shape)))
            raise ValueError(f"{name} must have shape ({expected}); got {tuple(x.shape)}.")
        if context is not None and context.shape[:-1] != x.shape[:1]:
            raise ValueError(
                f"{name} must have one context for each row; got {tuple(x.shape)} rows and "
                f"{tuple(context.shape)} contexts."
            )
        if "weight" in columns:
            weight = columns["weight"]
            floating = isinstance(weight, Tensor) and weight.is_floating_point()
            like = x.new_empty(0, dtype=weight.dtype) if floating else x
            check_weight(f"the weights of {name}", weight, len(x), like=like)
        if "target" in columns:
            like = reference_tensor(flow)
            check_target(f"the targets of {name}", columns["target"], len(x), like=like)


class TensorRows(TrainingData):
    """Rows in tensors, checked once; rows of weight 0 are dropped, and the mean weight is 1."""

    def __init__(
        self, name: str, data: Any, flow: Flow, *, contexts: bool = False, targets: bool = False
    ) -> None:
        super().__init__(name, flow, contexts=contexts, targets=targets)
        self.columns = self._by_name(data)
        self._check(self.columns)
        if "weight" in self.columns:
            counted = self.columns["weight"] > 0
            if not counted.any():
                raise ValueError(f"the weights of {name} must not all be 0.")
            self.columns = {key: column[counted] for key, column in self.columns.items()}
            weight = self.columns["weight"]
            self.columns["weight"] = _over_mean(weight, weight).to(self.columns["x"])

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, indices: Tensor) -> Batch:
        """Return the rows at these indices."""
        columns = self.columns.items()
        return Batch(**{key: column[indices.to(column.device)] for key, column in columns})


class DatasetRows(TrainingData):
    """Rows of a `Dataset`, read, checked and moved to the device of the flow when needed.

    Weights have a mean of 1 over `_MOST_LOOKED_AT` rows.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset[Any],
        flow: Flow,
        *,
        contexts: bool = False,
        targets: bool = False,
    ) -> None:
        super().__init__(name, flow, contexts=contexts, targets=targets)
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
        """Return the rows at these indices, in one call if the dataset has ``__getitems__``."""
        batch = self._read(indices)
        if batch.weight is None or self.weights is None:
            return batch
        weight = _over_mean(batch.weight, self.weights).to(reference_tensor(self.flow))
        if not weight.isfinite().all():
            raise ValueError(
                f"the weights of {self.name} must be alike in size; got one that overflows "
                f"{weight.dtype} when divided by the mean of {len(self.weights)} others."
            )
        return batch._replace(weight=weight)

    def _read(self, indices: Tensor) -> Batch:
        places = indices.tolist()
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(places)
        else:
            items = [self.dataset[place] for place in places]
        device = reference_tensor(self.flow).device
        columns = {key: torch.stack(values).to(device) for key, values in self._columns(items)}
        try:
            self._check(columns)
        except ValueError:
            for row, place in enumerate(places):
                self._refuse(place, {key: column[row] for key, column in columns.items()})
            raise
        return Batch(**columns)

    def _columns(self, items: Sequence[Any]) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield the columns of single rows."""
        named = [self._by_name(item) for item in items]
        for key in dict.fromkeys(itertools.chain(*named)):
            values = [item[key] for item in named if key in item]
            if key == "target":  # a label is often a Python number
                values = [torch.as_tensor(v) if isinstance(v, int) else v for v in values]
            for value in values:
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"{self.name} must hold {self.forms} for each row; got "
                        f"{type(value).__name__} for {key}."
                    )
            if len(values) < len(items) or len({value.shape for value in values}) > 1:
                raise ValueError(f"{self.name} must have {key} of the same shape in each row.")
            yield key, values

    def _refuse(self, place: int, item: Mapping[str, Tensor]) -> None:
        """Refuse a single row, named by its index in the dataset, if it is wrong by itself."""
        name, like = f"{self.name}[{place}]", reference_tensor(self.flow)
        if "x" in item:
            check_events(name, item["x"], self.flow.event_shape, like=like)
            check_support(name, item["x"], self.flow.support)
        if "context" in item and self.flow.context_features:
            features = self.flow.context_features
            check_vectors(f"the context of {name}", item["context"], features, like=like)


class PartOfRows(TrainingData):
    """Subset of other rows, at the indices `places`."""

    def __init__(self, rows: TrainingData, places: Tensor) -> None:
        super().__init__(rows.name, rows.flow, contexts=rows.contexts, targets=rows.targets)
        self.rows = rows
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def take(self, indices: Tensor) -> Batch:
        """Return the rows at these indices of the subset."""
        return self.rows.take(self.places[indices])


def hold_out(rows: TrainingData, fraction: float) -> tuple[TrainingData, TrainingData | None]:
    """Split off validation rows: a random fraction, `_MOST_HELD_OUT` at most.

    There are none if the fraction is less than one row, or if their weights are 0.
    """
    count = min(int(fraction * len(rows)), _MOST_HELD_OUT)
    if count == 0:
        return rows, None
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    validation = PartOfRows(rows, order[:count])
    weight = validation.take(torch.arange(count)).weight
    if weight is not None and not weight.sum() > 0:
        return rows, None
    return PartOfRows(rows, order[count:]), validation


def as_rows(
    name: str, data: Any, flow: Flow, *, contexts: bool = False, targets: bool = False
) -> TrainingData:
    """Convert data of any form of `Data` to rows that fit the flow."""
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
    if type(data) in (TensorDataset, StackDataset):
        parts = data.tensors if isinstance(data, TensorDataset) else data.datasets
        if all(isinstance(part, Tensor) for part in tree_leaves(parts)):
            device = reference_tensor(flow).device
            data = tree_map(lambda part: part.to(device), parts)
    if isinstance(data, Dataset):
        return DatasetRows(name, data, flow, contexts=contexts, targets=targets)
    return TensorRows(name, data, flow, contexts=contexts, targets=targets)


def _over_mean(weight: Tensor, weights: Tensor) -> Tensor:
    """Divide `weight` by the mean of `weights`, without overflow of the sum."""
    weights = weights.to("cpu", torch.float64)
    largest = weights.max()
    return weight.to("cpu", torch.float64) / largest / (weights / largest).mean()
