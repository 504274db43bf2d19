"""``cnf score``, ``cnf sample`` and ``cnf certify``."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import arg

from cnf._checks import check_count
from cnf.cli.options import (
    STDOUT,
    Assignments,
    Command,
    DataFile,
    MeanAndError,
    ModelFolder,
    TableCommand,
    assigned_numbers,
    check_new_file,
    check_table_name,
    refuse_rows_outside,
    write_rows,
)
from cnf.diagnostics import certify
from cnf.tables import fit as density
from cnf.tables.model import TableModel
from cnf.transforms import Unconstrain


@dataclass(frozen=True, kw_only=True)
class Score(TableCommand):
    """Write the log-density of each row of a table, in nats.

    Columns are found by name, in any order; other columns are ignored.
    """

    model: ModelFolder
    """Folder of the model."""
    data: DataFile
    """The table."""
    out: Path = STDOUT
    """File to write: .csv, .tsv, .npy, or - for the screen."""
    force: bool = False
    """Replace the file if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_table_name(self.out)

    def run(self) -> int:
        """Score and write."""
        check_new_file(self.out, force=self.force, reads=[self.data, *self.model.glob("*")])
        model = TableModel.load(self.model)
        rows = model.columns.read(self.data, header=self.has_header)
        scores = density.log_prob(model.flow, rows, progress=self.progress)
        write_rows(self.out, scores.unsqueeze(-1), ["log_prob"], replace=self.force)
        inside = scores[scores > -torch.inf]
        summary = f"log-density of {len(inside)} rows"
        if len(inside):
            summary += f": mean {MeanAndError.of(inside)} nats"
        if len(inside) < len(scores):
            summary += f"; -inf for {len(scores) - len(inside)} rows outside the support"
        print(summary, file=sys.stderr if self.out == STDOUT else sys.stdout)
        return 0


@dataclass(frozen=True, kw_only=True)
class Sample(Command):
    """Draw rows from a model."""

    model: ModelFolder
    """Folder of the model."""
    n: Annotated[int, arg(aliases=["-n"])] = 1000
    """Number of rows."""
    out: Path = STDOUT
    """File to write: .csv, .tsv, .npy, or - for the screen."""
    context: Assignments = ()
    """Value of each context column, if the model has any: --context age=40 height=1.8"""
    seed: int = 0
    """Seed of the draws."""
    force: bool = False
    """Replace the file if there is one."""

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("seed", self.seed, least=0)
        check_table_name(self.out)
        assigned_numbers("context", self.context)

    def run(self) -> int:
        """Draw and write rows; they include their contexts, so that they can be scored."""
        check_new_file(self.out, force=self.force, reads=self.model.glob("*"))
        model = TableModel.load(self.model)
        given = assigned_numbers("context", self.context)
        drawn = density.sample(
            model.flow, self.n, model.columns.context(given), seed=self.seed, progress=self.progress
        )
        contexts = drawn.new_tensor([given[name] for name in model.columns.context_names])
        rows = torch.cat([drawn, contexts.expand(len(drawn), -1)], -1)
        write_rows(self.out, rows, model.columns.all, replace=self.force)
        return 0


@dataclass(frozen=True, kw_only=True)
class Certify(TableCommand):
    """Check how accurate the numbers of a model are, on rows of a table.

    Prints the value and limit of each check, and the remedy if it fails; the exit code is 1 if one
    fails.
    """

    model: ModelFolder
    """Folder of the model."""
    data: DataFile
    """The table, best of held-out rows."""
    rows: int = 200
    """Number of rows to draw from the table; all if it has fewer."""
    seed: int = 0
    """Seed of the rows and of the measurements."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rows", self.rows, least=2)
        check_count("seed", self.seed, least=0)

    def run(self) -> int:
        """Measure and print."""
        model = TableModel.load(self.model)
        rows = model.columns.read(self.data, header=self.has_header)
        first = model.flow.transforms[0]
        if isinstance(first, Unconstrain):
            refuse_rows_outside(
                self.data, rows.x, model.columns.names, first.columns, header=self.has_header
            )
        generator = torch.Generator().manual_seed(self.seed)
        chosen = rows.take(torch.randperm(len(rows.x), generator=generator)[: self.rows])
        report = certify(model.flow, chosen.x, chosen.context, generator=generator)
        print(report)
        return 0 if report.passed else 1
