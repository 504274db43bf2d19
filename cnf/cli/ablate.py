"""``cnf ablate``."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tyro.conf import OmitArgPrefixes

from cnf._checks import check_count
from cnf._files import write_atomically
from cnf.ablation import AblationSettings, ablate, markdown, tradeoffs
from cnf.cli.options import DataFile, TableCommand
from cnf.data.degeneracy import check_columns
from cnf.data.names import listed, quoted
from cnf.data.table_files import check_for_training, read_table, warn_of_fill_values
from cnf.plots import plot_tradeoffs, save_figure
from cnf.tables.model import Columns

_SHARE = 5
"""A fifth of the rows is held out, unless there are many."""
_FLOWS, _TABLE, _PICTURE = "flows", "table.md", "picture.png"


@dataclass(frozen=True, kw_only=True)
class Ablate(TableCommand):
    """Show what penalties of the paths buy and cost on a table.

    Flows are trained with and without each penalty. A table and a picture show, at rows held out,
    the negative log-likelihood (NLL: the lower, the better) against the evaluations of the network
    that a row takes for a stated accuracy. Columns are real numbers, as they are.

    A command that was stopped goes on after its last finished training if it is given again.
    """

    data: DataFile
    """The table."""
    out: Path
    """Folder to make for the table, the picture and the flows; or the one to go on in."""
    columns: tuple[str, ...] = ()
    """Names of the columns to use, contexts aside; all of them if left out."""
    context_columns: tuple[str, ...] = ()
    """Columns that the density of the other columns is conditioned on."""
    held_out: int = 2000
    """Number of rows to hold out, to measure at; a fifth of the table if that is less."""
    settings: OmitArgPrefixes[AblationSettings] = field(default_factory=AblationSettings)
    quick: bool = False
    """Only see that everything works, with little of everything, in the folder `quick` of OUT."""
    force: bool = False
    """Replace what other settings or data left in the folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("held_out", self.held_out, least=2)

    def run(self) -> int:
        """Train, measure, and write table and picture."""
        wanted = [*self.columns, *self.context_columns] if self.columns else None
        table = read_table(self.data, wanted, header=self.has_header)
        check_for_training(table, str(self.data))
        warn_of_fill_values(table, str(self.data))
        columns = Columns.of(table, self.context_columns)
        rows = columns.rows(table)
        check_columns(str(self.data), rows.x, columns.names)
        out = self._folder()
        settings = self.settings.quick() if self.quick else self.settings
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(rows.x), generator=generator)
        count = min(self.held_out, len(rows.x) // _SHARE)
        check_count(f"a fifth of the {len(rows.x)} rows of the table", count, least=2)
        training, held_out = rows.take(order[count:]), rows.take(order[:count])
        given = f" given {listed(columns.context_names)}" if columns.context_names else ""
        print(f"{len(rows.x)} rows of {listed(columns.names)}{given}, {count} held out", flush=True)
        outcomes = []
        for outcome in ablate(
            training, held_out, settings, out / _FLOWS, replace=self.force, progress=self.progress
        ):
            outcomes.append(outcome)
            what = outcome.failure or f"{outcome.evaluations:.0f} evaluations"
            print(f"  {outcome.run}: {what}", flush=True)
        text = markdown(outcomes)
        write_atomically(out / _TABLE, text.encode())
        print(text, end="")
        points = tradeoffs(outcomes, self.data.stem)
        figure = plot_tradeoffs(points, nats="held-out NLL", accuracy=settings.accuracy)
        save_figure(figure, out / _PICTURE)
        print(f"written to {out}")
        return 0

    def _folder(self) -> Path:
        """Return the folder to write to; refuse one with anything but an ablation."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out must be a folder; {str(self.out)!r} is a file.")
        known = {_FLOWS, _TABLE, _PICTURE, "quick"}
        others = {path.name for path in self.out.glob("*")} - known
        if others:
            raise ValueError(
                f"out must be a new folder, or one of an ablation; {str(self.out)!r} contains "
                f"{quoted(sorted(others)[:3])}. Choose another folder, or move these files."
            )
        return self.out / "quick" if self.quick else self.out
