"""``cnf plot``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tyro.conf import Positional, arg

from cnf._checks import check_count
from cnf.cli.options import Assignments, ModelFolder, TableCommand, assigned_numbers, check_new_file
from cnf.data.names import quoted, shortened
from cnf.plots import plot_column, plot_pairs, plot_two_columns, save_figure
from cnf.plots.figures import Figure
from cnf.tables import fit as density
from cnf.tables.fit import TableRows
from cnf.tables.model import TableModel

_COLUMNS = 6


@dataclass(frozen=True, kw_only=True)
class Plot(TableCommand):
    """Plot a model: its density and samples, beside the data if given.

    For one or two columns this is the density itself; for more, every pair of columns of samples
    and data. If the model is conditional, give either the data, for samples with the contexts of
    its rows, or one --context.
    """

    model: ModelFolder
    """Folder of the model."""
    data: Annotated[Positional[Path | None], arg(metavar="DATA")] = None
    """The table, to draw it too."""
    out: Path
    """Image to write: .png."""
    columns: tuple[str, ...] = ()
    """Columns to draw in pairs; by default the first 6."""
    context: Assignments = ()
    """Value of each context column, if the model has any: --context age=40 height=1.8"""
    rows: int = 2000
    """Number of samples, and largest number of rows of the data."""
    seed: int = 0
    """Seed of the samples and rows."""
    force: bool = False
    """Replace the image if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out.suffix.lower() != ".png":
            raise ValueError(f"out must end in .png; got {str(self.out)!r}.")
        check_count("rows", self.rows, least=2)
        check_count("seed", self.seed, least=0)
        assigned_numbers("context", self.context)

    def run(self) -> int:
        """Draw and write the plot."""
        reads = [*self.model.glob("*"), *([] if self.data is None else [self.data])]
        check_new_file(self.out, force=self.force, reads=reads)
        model = TableModel.load(self.model)
        save_figure(self._figure(model), self.out, replace=self.force)
        return 0

    def _figure(self, model: TableModel) -> Figure:
        data = None
        if self.data is not None:
            rows = model.columns.read(self.data, header=self.has_header)
            order = torch.randperm(len(rows.x), generator=torch.Generator().manual_seed(self.seed))
            data = rows.take(order[: self.rows])
        by_row = bool(model.columns.context_names) and data is not None
        if by_row and self.context:
            raise ValueError("draw either the data or one --context, not both.")
        context = None
        if data is not None and by_row:
            generator = torch.Generator().manual_seed(self.seed)
            samples = model.flow.sample((), data.context, generator=generator)
        else:
            context = model.columns.context(assigned_numbers("context", self.context))
            samples = density.sample(model.flow, self.rows, context, seed=self.seed)
        x = None if data is None else data.x
        names = model.columns.names
        has_density = model.flow.likelihood == "exact" and not by_row and not self.columns

        def log_prob(points: Tensor) -> Tensor:
            contexts = None if context is None else context.expand(len(points), -1)
            return density.log_prob(model.flow, TableRows(points, contexts))

        title = " ".join(self.context).replace("$", r"\$") or None
        labels = [shortened(name) for name in names]
        if has_density and len(names) == 1:
            return plot_column(log_prob, labels[0], samples=samples, data=x, title=title)
        if has_density and len(names) == 2:
            return plot_two_columns(log_prob, labels, samples=samples, data=x, title=title)
        chosen = [names.index(name) for name in self._shown(names)]
        return plot_pairs(
            samples[:, chosen],
            [labels[index] for index in chosen],
            data=None if x is None else x[:, chosen],
            title=title,
        )

    def _shown(self, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in self.columns:
            if name not in names:
                raise ValueError(f"columns must be of the density, {quoted(names)}; got {name!r}.")
        return self.columns or names[:_COLUMNS]
