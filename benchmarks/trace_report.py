"""The tables and the figure of `benchmarks.trace`."""

import itertools
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.timing import describe, markdown, report
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import BLACK, BLUE, GREY, ORANGE, TEXT_SIZE, TITLE_SIZE

PLACES = (("wide", "x"), ("narrow", "x"), ("narrow", "bottleneck"))
"""Fields, and where in them probes start."""
ESTIMATES = tuple(itertools.product(("rademacher", "gaussian"), (1, 8)))
"""Noise and number of the probes."""
_COLOURS = {"rademacher": BLUE, "gaussian": ORANGE}
_MARKERS = {1: "o", 8: "s"}
_COSTS = {
    "wide: basis": (BLACK, "D"),
    "wide: 8 probes": (BLUE, "s"),
    "wide: 1 probe": (BLUE, "o"),
    "narrow: 1 probe at x": (GREY, "o"),
    "narrow: 1 probe at the bottleneck": (GREY, "v"),
    "two layers: closed form": (ORANGE, "P"),
}


def write(content: dict[str, Any], folder: Path) -> None:
    """Write ``results.json``, ``table.md`` and ``figure.png``, and print the tables."""
    tables = [spread_table(content["spread"]), cost_table(content["cost"])]
    report(folder, content, "\n".join([*tables, describe(content["machine"])]))
    draw(content, folder / "figure.png")


def spread_table(records: list[dict[str, Any]]) -> str:
    """A row for each size, field and place of the probes."""
    headings = ["features", "field", "probes at", "size of the divergence"]
    headings += [f"{noise.capitalize()}, {probes}" for noise, probes in ESTIMATES]
    rows = []
    for features in dict.fromkeys(record["features"] for record in records):
        for field, place in PLACES:
            group = select(records, features=features, field=field, probes_at=place)
            size = f"{group[0]['divergence']:.3g}"
            cells = [
                f"{record['measured']:.3g} ({record['theory']:.3g})"
                for noise, probes in ESTIMATES
                for record in select(group, noise=noise, probes=probes)
            ]
            rows.append([str(features), field, place, size, *cells])
    return (
        "Standard deviation of the estimate, measured (theory), by noise and number of probes; "
        "the size is a root mean square over the points:\n\n" + markdown(headings, rows)
    )


def cost_table(records: list[dict[str, Any]]) -> str:
    """A row for each size, a column for each way."""
    rows = [
        [str(record["features"]), *(f"{record['relative'][name]:.2f}" for name in _COSTS)]
        for record in records
    ]
    return (
        "CPU time of a training step, relative to one of the velocity alone of the same field:\n\n"
        + markdown(["features", *_COSTS], rows)
    )


def select(records: list[dict[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    """The records with these values."""
    return [
        record for record in records if all(record[key] == value for key, value in wanted.items())
    ]


def draw(content: dict[str, Any], path: Path) -> None:
    """The estimates of each field, and the costs, against the number of features."""
    figure, ((wide, narrow, cost),) = figure_grid(1, 3, panel_size=4)
    records = content["spread"]
    wide.set_title("wide field: standard deviation of the estimate")
    draw_size(wide, select(records, field="wide"))
    for noise, probes in ESTIMATES:
        own = select(records, field="wide", noise=noise, probes=probes)
        label = f"{noise.capitalize()}, {probes}"
        draw_deviation(wide, own, label, _COLOURS[noise], _MARKERS[probes])
    narrow.set_title("narrow field: one Rademacher probe")
    one = select(records, field="narrow", noise="rademacher", probes=1)
    draw_size(narrow, one)
    for place, label, colour in (("x", "at x", BLUE), ("bottleneck", "at the bottleneck", GREY)):
        draw_deviation(narrow, select(one, probes_at=place), label, colour, "o")
    cost.set_title("CPU time of a training step / velocity alone")
    features = [record["features"] for record in content["cost"]]
    for name, (colour, marker) in _COSTS.items():
        relative = [record["relative"][name] for record in content["cost"]]
        cost.plot(features, relative, color=colour, marker=marker, markersize=4, label=name)
    for ax in (wide, narrow, cost):
        finish(ax, features)
    save_figure(figure, path)


def draw_size(ax: Axes, records: list[dict[str, Any]]) -> None:
    """The size of the divergence itself."""
    sizes = {record["features"]: record["divergence"] for record in records}
    ax.plot(list(sizes), list(sizes.values()), color=BLACK, linewidth=2, label="the divergence")


def draw_deviation(
    ax: Axes, records: list[dict[str, Any]], label: str, colour: str, marker: str
) -> None:
    """What was measured as markers on the line of the theory; an exact estimate has neither."""
    features = [record["features"] for record in records]
    theory, measured = (
        [record[key] or math.nan for record in records] for key in ("theory", "measured")
    )
    ax.plot(features, theory, color=colour, linewidth=1)
    ax.plot(features, measured, marker, color=colour, markersize=4, label=label)


def finish(ax: Axes, features: list[int]) -> None:
    """What the panels share."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(features, map(str, features))
    ax.set_xticks([], minor=True)
    ax.set_xlabel("features", fontsize=TEXT_SIZE)
    ax.title.set_size(TITLE_SIZE)
    ax.tick_params(labelsize=TEXT_SIZE)
    ax.legend(fontsize=TEXT_SIZE, frameon=False)
