"""``cnf fit``."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from cnf.bases import GaussianMixtureBase
from cnf.cli.options import (
    Assignments,
    DataFile,
    MeanAndError,
    TableCommand,
    assigned,
    number,
    refuse_overwriting,
    refuse_rows_outside,
)
from cnf.data.degeneracy import DegenerateDataWarning, check_columns
from cnf.data.names import listed, quoted, shortened
from cnf.data.table_files import check_for_training, read_table, warn_of_fill_values
from cnf.flows.flow import Flow
from cnf.metrics import gaussian_log_prob
from cnf.tables import fit as density
from cnf.tables.fit import DensitySettings, TableRows, fit_density, hold_out
from cnf.tables.model import Columns, TableModel, check_destination
from cnf.transforms import Unconstrain, transforms_for
from cnf.transforms.support.columns import Support

_NOTES = 4
"""Largest number of columns with a note."""


@dataclass(frozen=True, kw_only=True)
class Fit(TableCommand):
    """Fit a density to the rows of a table, and write it into a folder.

    The table is a file of numbers: .csv, .tsv, .npy, .npz or .parquet. Some of the rows are held
    out, to choose the best weights. Their negative log-likelihood (NLL: the lower, the better) is
    printed with its standard error, beside the NLL of a Gaussian.
    """

    data: DataFile
    """The table."""
    out: Path
    """Folder to make for the model."""
    columns: tuple[str, ...] = ()
    """Names of the columns to use, contexts aside; all of them if left out."""
    context_columns: tuple[str, ...] = ()
    """Columns that the density of the other columns is conditioned on."""
    support: Assignments = ()
    """Support of a column that does not hold any real number: positive, integer,
    interval:LOW:HIGH or periodic:LOW:HIGH. For instance: --support age=positive
    share=interval:0:1"""
    settings: OmitArgPrefixes[DensitySettings] = field(default_factory=DensitySettings)
    force: bool = False
    """Replace the model in the folder if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._supports()

    def run(self) -> int:
        """Fit, save and report."""
        check_destination(self.out, replace=self.force)
        for replaced in self.out.glob("*"):
            refuse_overwriting(replaced, [self.data])
        wanted = [*self.columns, *self.context_columns] if self.columns else None
        table = read_table(self.data, wanted, header=self.has_header)
        check_for_training(table, str(self.data))
        warn_of_fill_values(table, str(self.data))
        columns = Columns.of(table, self.context_columns)
        rows = columns.rows(table)
        supports = self._supports_of(columns, rows.x)
        training, held_out = hold_out(rows, self.settings)
        given = f" given {listed(columns.context_names)}" if columns.context_names else ""
        print(f"{len(rows.x)} rows of {listed(columns.names)}{given}", flush=True)
        _note_integers(rows.x, columns.names, supports)
        real = [i for i, support in enumerate(supports) if support != "integer"]
        check_columns(str(self.data), rows.x[:, real], [columns.names[i] for i in real])
        with warnings.catch_warnings():  # given above, with the names of the columns
            warnings.simplefilter("ignore", DegenerateDataWarning)
            flow, history = fit_density(
                transforms_for(rows.x, supports),
                training,
                held_out,
                self.settings,
                progress=self.progress,
            )
        notes = {
            "data": str(self.data),
            "rows": len(rows.x),
            "support": assigned("support", self.support),
            "settings": asdict(self.settings),
            "nll": _report(flow, training, held_out, progress=self.progress),
        }
        TableModel(flow=flow, columns=columns, notes=notes).save(
            self.out, history, replace=self.force
        )
        print(f"written to {self.out}")
        return 0

    def _supports(self) -> dict[str, Support]:
        texts = assigned("support", self.support)
        return {column: _parsed(column, text) for column, text in texts.items()}

    def _supports_of(self, columns: Columns, x: Tensor) -> list[Support]:
        """Return the support of each column; refuse rows outside of it."""
        supports = self._supports()
        for column in supports:
            if column not in columns.names:
                raise ValueError(
                    f"support must name columns of the density; got {column!r}, which is not "
                    f"among {quoted(columns.names)}."
                )
        found = [supports.get(column, "real") for column in columns.names]
        refuse_rows_outside(self.data, x, columns.names, found, header=self.has_header)
        return found


def _note_integers(x: Tensor, names: Sequence[str], supports: Sequence[Support]) -> None:
    """Print a note on columns of repeated integers, on which a density can have spikes."""
    found = []
    for index, (name, support) in enumerate(zip(names, supports, strict=True)):
        column = x[:, index]
        different = len(column.unique())
        if support == "real" and (column == column.round()).all() and different <= len(x) / 2:
            found.append((name, different))
    for name, different in found[:_NOTES]:
        print(
            f"note: column {shortened(name)!r} holds {different} different integers. A density "
            "can have spikes on them, and then its NLL says little: perhaps give "
            f"--support {name}=integer."
        )
    if len(found) > _NOTES:
        print(f"note: {len(found) - _NOTES} more columns hold integers.")


def _parsed(column: str, text: str) -> Support:
    kind, *bounds = text.split(":")
    numbers = [number(f"support of {column}", bound) for bound in bounds]
    if kind == "periodic" and len(numbers) == 2:  # the density is of a flow on a manifold
        kind = "circle"
    parsed: Support = (kind, *numbers) if numbers else kind
    try:
        Unconstrain([parsed])
    except ValueError:
        raise ValueError(
            f"support of {column} must be real, positive, integer, interval:LOW:HIGH or "
            f"periodic:LOW:HIGH, where LOW is less than HIGH; got {text!r}."
        ) from None
    return parsed


def _report(
    flow: Flow, training: TableRows, held_out: TableRows | None, *, progress: bool
) -> Mapping[str, float | None]:
    """Print and return the NLL of the flow and of a Gaussian."""
    rows = training if held_out is None else held_out
    which = "training" if held_out is None else "held-out"
    bound = " (estimate)" if flow.likelihood == "lower_bound" else ""
    print(f"NLL of {len(rows.x)} {which} rows, in nats:")
    nll = MeanAndError.of(-density.log_prob(flow, rows, progress=progress))
    print(f"  flow      {nll}{bound}")
    if isinstance(flow.base, GaussianMixtureBase):
        print(
            f"            as a mixture of {flow.base.components} Gaussians: with so few rows a "
            "trained flow was not clearly better"
        )
    found = {"flow": nll.mean, "standard_error": nll.error, "gaussian": None}
    gaussian = _gaussian_nll(training, rows)
    if gaussian is None:
        print("  Gaussian  has no density: columns depend on each other, or rows are too few")
        return found
    floor = MeanAndError.of(gaussian)
    print(f"  Gaussian  {floor}")
    return {**found, "gaussian": floor.mean}


def _gaussian_nll(training: TableRows, rows: TableRows) -> Tensor | None:
    """Return the NLL of a joint Gaussian of columns and contexts, given the contexts."""
    if training.context is None or rows.context is None:
        log_prob = gaussian_log_prob(rows.x, training.x)
        return None if log_prob is None else -log_prob
    joint = gaussian_log_prob(
        torch.cat([rows.x, rows.context], -1), torch.cat([training.x, training.context], -1)
    )
    context = gaussian_log_prob(rows.context, training.context)
    return None if joint is None or context is None else context - joint
