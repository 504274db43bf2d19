"""JSON description of a flow: the class and the constructor's arguments of each part."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from cnf.bases import Base
from cnf.divergence import Divergence
from cnf.flows import Flow
from cnf.manifolds import Manifold
from cnf.ode import ODESolver
from cnf.transforms import (
    AnnealedDensity,
    Chain,
    ConformalEmbedding,
    ContractiveNetwork,
    FactorOut,
    Transform,
)
from cnf.transforms.conditioners import Conditioner
from cnf.transforms.residual.log_det import LogDet
from cnf.vector_fields import VectorField

FAMILIES: tuple[type, ...] = (
    *(Flow, Base, Transform, VectorField, Divergence),
    *(LogDet, ContractiveNetwork, Conditioner, ODESolver, AnnealedDensity, Manifold),
)
"""Base classes of the parts of a flow. Subclasses of these in cnf are saved and loaded by name."""

_NEW_NAMES: dict[str, dict[str, str]] = {
    "AdditiveCoupling": {"kept": "mask"},
    "AffineCoupling": {"kept": "mask"},
    "ODESolver": {"control": "error_norm"},
}
"""Settings renamed since older files, for each class: old name and new name."""

_OLD_DEFAULTS: dict[str, dict[str, Any]] = {"ODESolver": {"error_norm": "points_and_ladj"}}
"""Settings that older files leave out, for each class, with the values that they had then."""

_REMEDY = "Save flow.state_dict() instead, and rebuild the flow in your own code."


@functools.cache
def own_classes() -> dict[str, type]:
    """Return the classes of this package that a flow may have as parts, by name."""
    return {
        cls.__name__: cls
        for family in FAMILIES
        for cls in _with_subclasses(family)
        if cls.__module__.startswith("cnf.")
        and not (inspect.isabstract(cls) or cls.__name__.startswith("_"))
    }


def _with_subclasses(cls: Any) -> Iterator[type]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def describe(value: Any) -> Any:
    """Describe a setting or part as JSON: a part is its class and its constructor's arguments."""
    is_array = isinstance(value, np.ndarray | np.generic | Tensor)
    if is_array and value.ndim == 0 and not isinstance(value, nn.Parameter):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | nn.ModuleList):
        return [describe(item) for item in value]
    cls = type(value)
    _check_class(cls)
    settings = {}
    for name in _settings(cls):
        if not hasattr(value, name):
            raise TypeError(
                f"{cls.__qualname__} has no attribute {name!r}, so that this setting of its "
                f"constructor cannot be saved. Set self.{name} = {name} there. {_REMEDY}"
            )
        setting = getattr(value, name)
        if isinstance(value, Flow | FactorOut | ConformalEmbedding) and isinstance(setting, Chain):
            setting = setting.transforms
        try:
            settings[name] = describe(setting)
        except _NoDescriptionError as error:
            raise TypeError(
                f"the setting {name!r} of {cls.__qualname__} cannot be saved: {error}"
            ) from error
    return {"class": cls.__name__, **settings}


def rebuild(description: Any, classes: Mapping[str, type], count_part: Callable[[], object]) -> Any:
    """Build the setting or part that `describe` described; constructors may raise any exception.

    `count_part` is called once for each part, to stop if there are too many.
    """
    if isinstance(description, list):
        return [rebuild(item, classes, count_part) for item in description]
    if not isinstance(description, dict):
        return description
    count_part()
    name = description["class"]
    cls = own_classes().get(name) or classes.get(name)
    if cls is None:
        raise MissingClassError(
            f"it names the class {name!r}, which cnf does not have; if it is yours, pass it: "
            f"load(path, classes=[{name}])"
        )
    new_names: Mapping[Any, Any] = _NEW_NAMES.get(name, {})
    settings = _OLD_DEFAULTS.get(name, {}) | {
        new_names.get(key, key): rebuild(value, classes, count_part)
        for key, value in description.items()
        if key != "class"
    }
    if issubclass(cls, Flow):
        return cls._with_parts(settings["transforms"], settings["base"])
    return cls(**settings)


def by_name(classes: Iterable[type]) -> dict[str, type]:
    """Return the user's classes, by name; refuse classes that cannot be saved or told apart."""
    if isinstance(classes, type) or not isinstance(classes, Iterable):
        raise TypeError(f"classes must be a list of classes, such as [Mine]; got {classes!r}.")
    named: dict[str, type] = {}
    for cls in classes:
        if not isinstance(cls, type):
            raise TypeError(f"classes must hold classes; got {cls!r}.")
        _check_class(cls)
        if named.setdefault(cls.__name__, cls) is not cls:
            raise ValueError(f"classes must differ in name; got {cls.__name__} twice.")
    return named


class MissingClassError(ValueError):
    """A description names an unknown class."""


class _NoDescriptionError(TypeError):
    """A value is neither a plain setting nor a part."""


def _check_class(cls: type) -> None:
    """Refuse classes that no file may name."""
    own = own_classes().get(cls.__name__)
    if own is cls:
        return
    if not issubclass(cls, nn.Module | Divergence) or issubclass(cls, Flow):
        raise _NoDescriptionError(
            "settings must be numbers, texts, lists of them, or parts: vector fields, transforms, "
            f"bases, divergences and other modules; got {cls.__qualname__}. {_REMEDY}"
        )
    if own is not None:
        raise ValueError(
            f"your class must have a unique name; got {cls.__qualname__}, and cnf has a class "
            f"{cls.__name__}. Rename yours."
        )


def _settings(cls: type) -> list[str]:
    """Return the names of the settings of a class, each also an attribute."""
    if issubclass(cls, Flow):
        return ["transforms", "base"]
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    parameters = inspect.signature(cls).parameters.values()
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(
                f"{cls.__qualname__} takes settings without a name ({parameter}), which cannot be "
                "saved. Wrap it in a class whose constructor names each of its settings. "
                f"{_REMEDY}"
            )
    return [parameter.name for parameter in parameters]
