"""Figures, their panels and files, and the common style."""

import io
import os
from typing import TYPE_CHECKING, TypeAlias

from cnf._checks import check_number, is_positive
from cnf._files import as_path, write_atomically

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

Number: TypeAlias = int | float
Figure: TypeAlias = "matplotlib.figure.Figure"
Axes: TypeAlias = "matplotlib.axes.Axes"
OptionalAxes: TypeAlias = "matplotlib.axes.Axes | None"

ORANGE, BLUE, GREY, BLACK = "#d95f02", "#2b5c8a", "#8a8a8a", "#000004"
TITLE_SIZE, TEXT_SIZE = 10, 8


def figure_grid(
    rows: int, columns: int, *, panel_size: Number = 3.2
) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure of empty panels, `panel_size` inches each; its axes are a list for each row.

    Raises:
        ValueError: If `rows` or `columns` is less than 1, or `panel_size` is not positive.

    Example:
        >>> figure, axes = figure_grid(1, 2)
        >>> axes[0][1].figure is figure
        True
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be at least 1; got {rows} and {columns}.")
    check_number("panel_size", panel_size, "positive and finite", is_positive)
    import matplotlib.figure

    size = (columns * panel_size, rows * panel_size)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def save_figure(figure: Figure, path: str | os.PathLike[str], *, replace: bool = True) -> None:
    """Write a figure as PNG, atomically; make missing folders.

    Raises:
        ValueError: If `path` does not end in ".png".
        OSError: If the file cannot be written, or exists and `replace` is False.
    """
    path = as_path("path", path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png; got {str(path)!r}.")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=200)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue(), replace=replace)


def new_panel(width: float = 3.2) -> Axes:
    """Return the panel of a new figure, `width` inches wide."""
    figure, axes = figure_grid(1, 1)
    figure.set_size_inches(width, 3.2)
    return axes[0][0]
