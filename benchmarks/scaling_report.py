"""The tables and the figure of `benchmarks.scaling`."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.timing import describe, markdown, report
from benchmarks.trace_report import select
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import BLUE, GREY, ORANGE, TEXT_SIZE, TITLE_SIZE

DIVERGENCES = ("closed form", "one probe", "basis")
"""Ways to the divergence, the usual one first."""
MODES = ("training step", "log-density")
_ROOM = 30
"""How much higher the panels are than what they show, for the legend."""
_AXES = ("batch", "features", "width", "tolerance")
_COLOURS = dict(zip(DIVERGENCES, (ORANGE, BLUE, GREY), strict=True))
_LINES = dict(zip(MODES, ("o-", "s--"), strict=True))


def write(content: dict[str, Any], folder: Path) -> None:
    """Write ``results.json``, ``table.md`` and ``figure.png``, and print the tables."""
    tables = [table(axis, content["records"]) for axis in _AXES]
    report(folder, content, "\n".join([*tables, describe(content["machine"])]))
    draw(content["records"], folder / "figure.png")


def table(axis: str, records: Sequence[dict[str, Any]]) -> str:
    """A row for each value along the axis, two columns for each mode and divergence."""
    own = select(records, axis=axis)
    ways = [
        (mode, divergence)
        for mode, divergence in itertools.product(MODES, DIVERGENCES)
        if select(own, mode=mode, divergence=divergence)
    ]
    headings = [axis]
    for mode, divergence in ways:
        headings += [f"{mode}, {divergence} (ms)", "evaluations"]
    rows = []
    for value in dict.fromkeys(record[axis] for record in own):
        cells = [f"{value:g}"]
        for mode, divergence in ways:
            (record,) = select(own, **{axis: value}, mode=mode, divergence=divergence)
            cells += [f"{record['milliseconds']['median']:.3g}", str(record["evaluations"])]
        rows.append(cells)
    return f"By {axis}:\n\n{markdown(headings, rows)}"


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each axis: CPU time of each mode and divergence."""
    figure, (panels,) = figure_grid(1, len(_AXES), panel_size=3.2)
    medians = [record["milliseconds"]["median"] for record in records]
    limits = min(medians) / 2, max(medians) * _ROOM
    for ax, axis in zip(panels, _AXES, strict=True):
        for mode, divergence in itertools.product(MODES, DIVERGENCES):
            own = select(records, axis=axis, mode=mode, divergence=divergence)
            if own:
                draw_line(ax, axis, own)
        finish(ax, axis, select(records, axis=axis))
        ax.set_ylim(*limits)
    panels[0].set_ylabel("CPU time (ms)", fontsize=TEXT_SIZE)
    save_figure(figure, path)


def draw_line(ax: Axes, axis: str, records: Sequence[dict[str, Any]]) -> None:
    """The medians along an axis, of one mode and divergence."""
    mode, divergence = records[0]["mode"], records[0]["divergence"]
    ax.plot(
        [record[axis] for record in records],
        [record["milliseconds"]["median"] for record in records],
        _LINES[mode],
        color=_COLOURS[divergence],
        markersize=4,
        label=f"{mode}, {divergence}",
    )


def finish(ax: Axes, axis: str, records: Sequence[dict[str, Any]]) -> None:
    """What the panels share; a finer tolerance lies further to the right."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    values = sorted({record[axis] for record in records})
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.set_xticks([], minor=True)
    if axis == "tolerance":
        ax.invert_xaxis()
    ax.set_title(f"by {axis}", fontsize=TITLE_SIZE)
    ax.set_xlabel(axis, fontsize=TEXT_SIZE)
    ax.tick_params(labelsize=TEXT_SIZE)
    ax.legend(fontsize=TEXT_SIZE, frameon=False, loc="upper left")
