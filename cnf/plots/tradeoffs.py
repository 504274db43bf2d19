"""Plot of nats against evaluations."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from cnf.plots.figures import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    TEXT_SIZE,
    TITLE_SIZE,
    Axes,
    Figure,
    figure_grid,
)

_COLOURS = (BLUE, ORANGE, "#1b9e77", "#7b3294", GREY)
_MARKERS = "ov^sD"


class Tradeoff(NamedTuple):
    """Nats and evaluations of one trained flow."""

    row: str
    """Title of the row of panels, such as the name of the data."""
    column: str
    """Title of the column of panels, such as the name of the training."""
    name: str
    """Name of the penalty, for the legend; "" for none."""
    strength: float
    """Weight of the penalty."""
    evaluations: float
    """Evaluations for a row."""
    nats: float
    """Mean loss at held-out rows in nats; less is better."""
    error: float
    """Standard error of the mean."""


def plot_tradeoffs(points: Sequence[Tradeoff], *, nats: str, accuracy: float) -> Figure:
    """Plot nats against evaluations: a panel for each row and column, a line for each name.

    A line goes from the point without a penalty through rising strengths, which stand beside the
    points. The panels of a row have the same scales. Left and low is good.

    Args:
        points: Trained flows.
        nats: What the nats are, for the vertical axis, such as "held-out NLL".
        accuracy: Accuracy in nats at which evaluations are counted, for the horizontal axis.

    Raises:
        ValueError: If there are no points.
    """
    if not points:
        raise ValueError("points must be one or more; got none. Perhaps every training failed.")
    rows, columns = (list(dict.fromkeys(point[i] for point in points)) for i in (0, 1))
    names = list(dict.fromkeys(point.name for point in points if point.name))
    figure, axes = figure_grid(len(rows), len(columns))
    for row, panels in zip(rows, axes, strict=True):
        for column, ax in zip(columns, panels, strict=True):
            if ax is not panels[0]:  # before drawing, so that every point is inside
                ax.sharex(panels[0])
                ax.sharey(panels[0])
            _draw(ax, [point for point in points if point[:2] == (row, column)], names)
            ax.set_title(f"{row}: {column}", fontsize=TITLE_SIZE, parse_math=False)
            ax.set_xlabel(f"evaluations a row, for {accuracy:g} nats", fontsize=TEXT_SIZE)
            ax.tick_params(labelsize=TEXT_SIZE)
            ax.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(f"{nats} (nats)", fontsize=TEXT_SIZE)
    handles = {
        label: handle
        for panels in axes
        for ax in panels
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=len(handles),
        fontsize=TEXT_SIZE,
        frameon=False,
    )
    return figure


def _draw(ax: Axes, points: Sequence[Tradeoff], names: Sequence[str]) -> None:
    plain = [point for point in points if not point.name]
    for number, name in enumerate(names):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        own = sorted((point for point in points if point.name == name), key=lambda p: p.strength)
        across, up = ([point[i] for point in plain + own] for i in (4, 5))
        ax.plot(across, up, color=colour, linewidth=0.9)
        across, up, errors = ([point[i] for point in own] for i in (4, 5, 6))
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4}
        ax.errorbar(across, up, errors, linestyle="", label=name, elinewidth=0.9, **look)
        for point in own:
            ax.annotate(
                f"{point.strength:g}",
                (point.evaluations, point.nats),
                textcoords="offset points",
                xytext=(4, 3),
                fontsize=TEXT_SIZE - 2,
                color=colour,
            )
    for point in plain:
        look = {"color": BLACK, "marker": "*", "elinewidth": 0.9, "label": "no penalty"}
        ax.errorbar(point.evaluations, point.nats, point.error, linestyle="", **look)
