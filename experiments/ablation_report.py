"""The table and the figure of `experiments.ablation`."""

import csv
import io
import itertools
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.files import write_text
from cnf.plots import figure_grid, save_figure

COLUMNS = {
    "nll": "NLL",
    "kl_gap": "KL gap",
    "nfe_forward": "nfe forward",
    "nfe_backward": "nfe backward",
    "seconds_per_step": "CPU s per step",
    "kinetic_energy": "∫‖v‖²",
    "jacobian_frobenius": "∫‖J‖²",
    "straightness": "straightness",
    "round_trip_error": "round trip",
}
"""What is measured: key in the records -> heading."""

_FEWER = 2.0
_WORSE = 0.02
_LOOKS = {
    "none": ("black", "o"),
    "kinetic": ("tab:blue", "v"),
    "Frobenius": ("tab:orange", "^"),
    "both": ("tab:red", "s"),
    "random end time": ("tab:green", "P"),
    "potential": ("tab:purple", "D"),
    "potential + HJB": ("tab:pink", "X"),
}


def write(records: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Write ``table.csv``, ``table.md`` and ``figure.png``; returns the rows of the table."""
    rows = summarise(records)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "table.csv", text.getvalue())
    write_text(folder / "table.md", markdown(rows))
    draw(rows, folder / "figure.png")
    return rows


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over the seeds, for each data set and variant."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        run, variant = record["run"], record["run"]["variant"]
        weight = f" {variant['weight']:g}" if variant["weight"] else ""
        groups[Path(run["data"]).stem, variant["name"], variant["name"] + weight].append(record)
    rows = []
    for (data, name, label), group in groups.items():
        good = [record for record in group if "failure" not in record]
        row: dict[str, Any] = {"data": data, "name": name, "variant": label, "seeds": len(good)}
        row["failed"] = len(group) - len(good)
        for key in COLUMNS:
            values = [record[key] for record in good]
            row[key], row[f"{key}_standard_error"] = mean_and_error(values)
        rows.append(row)
    return rows


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error; NaN where there are too few values."""
    if not values:
        return math.nan, math.nan
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of what each variant buys over all sets, and one of everything."""
    lines = [
        f"| variant | nfe without / with (geometric mean) | KL gap with - without (mean) | "
        f"toy sets with a ratio of {_FEWER:g} or more for at most {_WORSE:g} nats |",
        "|---|---|---|---|",
    ]
    for label, fewer, worse, reached, sets in against_none(rows):
        lines.append(f"| {label} | {fewer:.2f} | {worse:+.3f} | {reached} of {sets} |")
    lines += ["", f"| data | variant | {' | '.join(COLUMNS.values())} |"]
    lines.append("|---|---|" + "---|" * len(COLUMNS))
    for row in rows:
        cells = [_cell(row[key], row[f"{key}_standard_error"]) for key in COLUMNS]
        lines.append(f"| {row['data']} | {row['variant']} | {' | '.join(cells)} |")
    failed = [f"{row['data']} {row['variant']} ({row['failed']})" for row in rows if row["failed"]]
    if failed:
        lines += ["", f"Training failed for: {', '.join(failed)}."]
    return "\n".join(lines) + "\n"


def against_none(rows: list[dict[str, Any]]) -> list[tuple[str, float, float, int, int]]:
    """Over the toy sets, each variant against none: nfe ratio, KL difference, sets that gain."""
    known = [row for row in rows if not math.isnan(row["kl_gap"])]
    plain = {row["data"]: row for row in known if row["name"] == "none"}
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in known:
        if row["data"] not in plain:
            continue
        reference = plain[row["data"]]
        fewer = reference["nfe_forward"] / row["nfe_forward"]
        found[row["variant"]].append((fewer, row["kl_gap"] - reference["kl_gap"]))
    return [
        (
            label,
            math.exp(sum(math.log(fewer) for fewer, _ in pairs) / len(pairs)),
            sum(worse for _, worse in pairs) / len(pairs),
            sum(fewer >= _FEWER and worse <= _WORSE for fewer, worse in pairs),
            len(pairs),
        )
        for label, pairs in found.items()
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """NLL against nfe for each set: left and low is good."""
    sets = list(dict.fromkeys(row["data"] for row in rows))
    columns = min(3, len(sets))
    figure, axes = figure_grid(math.ceil(len(sets) / columns), columns)
    panels = list(itertools.chain(*axes))
    for ax, data in zip(panels, sets, strict=False):
        for name, (colour, marker) in _LOOKS.items():
            points = [row for row in rows if row["data"] == data and row["name"] == name]
            if points:
                _draw_variant(ax, points, name, colour, marker)
        ax.set_title(data)
        ax.set_xlabel("nfe of log_prob at 1e-5")
        ax.set_ylabel("held-out NLL (nats)")
    for ax in panels[len(sets) :]:
        ax.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
    save_figure(figure, path)


def _draw_variant(
    ax: Axes, points: list[dict[str, Any]], name: str, colour: str, marker: str
) -> None:
    """The weights of one variant, joined by a line, each with its weight beside it."""
    nfe, nll = ([row[key] for row in points] for key in ("nfe_forward", "nll"))
    errors = {
        axis: [_drawn(row[f"{key}_standard_error"]) for row in points]
        for axis, key in (("xerr", "nfe_forward"), ("yerr", "nll"))
    }
    ax.errorbar(nfe, nll, **errors, color=colour, marker=marker, linewidth=1, label=name)
    for row in points:
        ax.annotate(
            row["variant"].removeprefix(name).strip(),
            (row["nfe_forward"], row["nll"]),
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=6,
            color=colour,
        )


def _drawn(error: float) -> float:
    return 0.0 if math.isnan(error) else error


def _cell(value: float, error: float) -> str:
    """The value to the last digit that its error leaves."""
    if math.isnan(value):
        return "-"
    if math.isnan(error) or error == 0:
        return f"{value:.3g}"
    decimals = max(0, -math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
