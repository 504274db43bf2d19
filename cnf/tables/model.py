"""Density of named columns of a table, saved in a folder."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf import saving
from cnf._files import (
    BLANK_DIGEST,
    as_path,
    digest_of,
    is_intact,
    left_over,
    new_folder,
    seal,
    write_atomically,
)
from cnf._warnings import warn
from cnf.data.cells import Table, refuse_unless_numbers
from cnf.data.names import quoted
from cnf.data.table_files import read_table
from cnf.flows.flow import Flow
from cnf.tables.fit import TableRows
from cnf.training import History
from cnf.vector_fields.conditioning import context_scalings

FORMAT_VERSION = 2

_FLOW, _DESCRIPTION, _HISTORY = _FILES = ("model.safetensors", "model.json", "history.csv")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of a density and of its context.

    Raises:
        ValueError: If names repeat, or there is no column but contexts.
    """

    names: tuple[str, ...]
    """Columns of the density."""
    context_names: tuple[str, ...] = ()
    """Columns of the context."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("the density must be of at least one column; all are contexts.")
        if len(set(self.all)) < len(self.all):
            raise ValueError(f"columns must differ; got {quoted(self.all)}.")

    @classmethod
    def of(cls, table: Table, context_names: Sequence[str] = ()) -> "Columns":
        """Return all columns of a table, some of them as context.

        Raises:
            ValueError: If the table lacks one of `context_names`.
        """
        for name in context_names:
            _refuse_missing(table, name)
        names = tuple(name for name in table.columns if name not in context_names)
        return cls(names=names, context_names=tuple(context_names))

    @property
    def all(self) -> tuple[str, ...]:
        """Names of all columns."""
        return (*self.names, *self.context_names)

    def read(self, path: str | os.PathLike[str], *, header: bool | None = None) -> TableRows:
        """Read the rows of a file, which may have other columns too.

        Args:
            path: The file.
            header: Whether the first line of text holds names; see `read_table`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it lacks a column, or is no table of finite numbers.
        """
        return self.rows(read_table(path, self.all, header=header))

    def rows(self, table: Table) -> TableRows:
        """Return the rows of a table.

        Raises:
            ValueError: If it lacks a column.
        """
        context = _select(table, self.context_names) if self.context_names else None
        return TableRows(_select(table, self.names), context)

    def context(self, values: Mapping[str, float]) -> Tensor | None:
        """Return a context from a number for each context column; None without context columns.

        Raises:
            ValueError: If a number is missing or superfluous.
        """
        if values and not self.context_names:
            raise ValueError(
                "context must be left out, because the model has no context columns; got "
                f"{quoted(list(values))}."
            )
        if set(values) != set(self.context_names):
            raise ValueError(
                f"context must have a number for each of {quoted(self.context_names)}; "
                f"got {quoted(list(values))}."
            )
        numbers = [values[name] for name in self.context_names]
        return torch.tensor(numbers, dtype=torch.float64) if numbers else None


@dataclass(frozen=True, kw_only=True)
class TableModel:
    """Flow with the names of its columns.

    Raises:
        ValueError: If the numbers of features and columns differ.
    """

    flow: Flow
    """Density."""
    columns: Columns
    """Names of the features and of the context features."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Notes about the fit: numbers, texts, lists and mappings."""

    def __post_init__(self) -> None:
        expected = (len(self.columns.names), len(self.columns.context_names))
        if expected != (self.flow.features, self.flow.context_features):
            raise ValueError(
                f"the flow must have {expected[0]} features and {expected[1]} context features, "
                f"as the columns; got {self.flow.features} and {self.flow.context_features}."
            )

    def save(
        self, folder: str | os.PathLike[str], history: History, *, replace: bool = False
    ) -> None:
        """Write a folder with the flow, its columns and the history of its training, atomically.

        An existing model is replaced if `replace` is True; anything else is never replaced.

        Raises:
            OSError: If it cannot be written.
            ValueError: If `check_destination` refuses the place, or a note is NaN or infinite.
        """
        check_destination(folder, replace=replace)
        check_old = partial(_check_replaceable, name=str(folder), replace=replace)
        with new_folder(folder, check_old=check_old) as temporary:
            saving.save(self.flow, temporary / _FLOW)
            description = {
                "sha256": BLANK_DIGEST,
                "format": FORMAT_VERSION,
                "version": version("cnf-flows"),
                "flow_sha256": digest_of(temporary / _FLOW),
                "columns": asdict(self.columns),
                "notes": self.notes,
            }
            text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            write_atomically(temporary / _DESCRIPTION, seal(text.encode()))
            history.save(temporary / _HISTORY)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "TableModel":
        """Read the folder that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such folder, or it lacks a file.
            ValueError: If a file is damaged, belongs to another model, or has a newer format.

        Warns:
            UserWarning: If the model was saved without a digest, by an old version.
        """
        folder = as_path("folder", folder)
        for name in (_DESCRIPTION, _FLOW):
            if not (folder / name).is_file():
                left = left_over(folder)
                if left is not None and not folder.exists():
                    raise FileNotFoundError(
                        f"there is no model in {str(folder)!r}; the computer stopped while it was "
                        f"being replaced. Restore it with: mv {left} {folder}"
                    )
                raise FileNotFoundError(
                    f"there is no model in {str(folder)!r}, which has no file {name}. "
                    "Make one with: cnf fit DATA --out MODEL"
                )
        path = folder / _DESCRIPTION
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            newer = found["format"] > FORMAT_VERSION
            stated = {key: tuple(value) for key, value in found["columns"].items()}
            # Format 1 scaled contexts outside of the flow.
            scales = [stated.pop(f"context_{name}", None) for name in ("mean", "std")]
            columns = Columns(**stated)
            count = len(columns.context_names)
            if any(scales) and any(len(part or ()) != count for part in scales):
                raise ValueError("each context column must have a mean and a standard deviation")
            notes = dict(found["notes"])
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is damaged ({error!r}). Restore it from a copy, or fit again."
            ) from error
        if newer:
            raise ValueError(
                f"{str(path)!r} has format {found['format']}, newer than the {FORMAT_VERSION} that "
                "this version of cnf reads. Upgrade cnf-flows."
            )
        _refuse_damage(folder, found)
        flow = saving.load(folder / _FLOW)
        if any(scales):
            for scaling in context_scalings(flow):
                scaling.set(*map(scaling.mean.new_tensor, scales))
        return cls(flow=flow, columns=columns, notes=notes)


def _refuse_damage(folder: Path, found: dict[str, Any]) -> None:
    """Refuse a damaged description, or one of another flow.

    Keys must be known: with a damaged key, a file could pass for an old one without digest.
    """
    path = folder / _DESCRIPTION
    others = found.keys() - {"format", "version", "columns", "notes"}
    if not others:
        warn(
            f"{str(path)!r} is from a version of cnf that wrote no digest, so damage cannot be "
            "detected. Save the model again, or fit again."
        )
    elif others != {"sha256", "flow_sha256"} or not is_intact(path, found["sha256"]):
        raise ValueError(
            f"{str(path)!r} is damaged: its bytes changed since it was written. Restore it from a "
            "copy, or fit again."
        )
    elif digest_of(folder / _FLOW) != found["flow_sha256"]:
        raise ValueError(
            f"{str(folder / _FLOW)!r} is damaged, or of another model than {_DESCRIPTION} in the "
            "same folder. Restore both from a copy, or fit again."
        )


def check_destination(folder: str | os.PathLike[str], *, replace: bool) -> None:
    """Refuse a folder where a model cannot be saved, or would replace anything else.

    Raises:
        OSError: If the folder around it does not exist or cannot be written to.
        ValueError: If there is a model and `replace` is False, or there is something else.
    """
    name, folder = str(folder), as_path("folder", folder).resolve()
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"{name!r} must be a new folder, not the one that you are in.")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder.parent)!r} to write a model to.")
    if not os.access(folder.parent, os.W_OK):
        raise PermissionError(f"the folder {str(folder.parent)!r} cannot be written to.")
    if folder.exists():
        _check_replaceable(folder, name, replace=replace)


def _check_replaceable(folder: Path, name: str, *, replace: bool) -> None:
    """Refuse to replace anything but a model; `name` is the user's name of the folder."""
    if not folder.is_dir():
        raise ValueError(f"{name!r} must be a folder; there is a file of that name.")
    others = sorted({path.name for path in folder.iterdir()} - set(_FILES))
    if others:
        raise ValueError(
            f"{name!r} must be a new folder, or contain only a model; it contains "
            f"{quoted(others[:3])}. Choose another folder, or move these files."
        )
    if any(folder.iterdir()) and not replace:
        raise ValueError(
            f"there is a model in {name!r}. Choose another folder, or replace it by --force."
        )


def _select(table: Table, names: Sequence[str]) -> Tensor:
    for name in names:
        _refuse_missing(table, name)
    refuse_unless_numbers("table.values", table.values)
    chosen = [table.columns.index(name) for name in names]
    values = np.array(table.values[:, chosen], dtype=np.float64, order="C")  # of any byte order
    return torch.from_numpy(values)


def _refuse_missing(table: Table, name: str) -> None:
    if name not in table.columns:
        raise ValueError(f"the table has no column {name!r}; it has {quoted(table.columns)}.")
