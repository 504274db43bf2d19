"""Plots of the columns of a table, and of a density fitted to them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._row_names import name_rows
from cnf.plots.figures import (
    BLUE,
    GREY,
    ORANGE,
    TEXT_SIZE,
    TITLE_SIZE,
    Axes,
    Figure,
    figure_grid,
    new_panel,
)
from cnf.plots.planes import draw_density, grid_points, plot_samples

LogProb = Callable[[Float[Tensor, "n features"]], Float[Tensor, " n"]]

_LEFT_OUT = 0.003
_POINTS = 2000


def plot_column(
    log_prob: LogProb,
    name: str,
    *,
    samples: Float[Tensor, "n 1"],
    data: Float[Tensor, "rows 1"] | None = None,
    title: str | None = None,
) -> Figure:
    """Plot the density of one column as a curve, over a histogram of the data or else of samples.

    Args:
        log_prob: Log-densities (n,) in nats of values (n, 1), in float64. May be -inf.
        name: Name of the column.
        samples: Samples of the density, for the range of the plot.
        data: Values of the column.
        title: Text above the panel.

    Raises:
        ValueError: If `samples` or `data` are not (n, 1), empty or not finite, or a density is
            NaN or infinite.
    """
    samples, data = _checked("samples", samples, 1), _checked_data(data, 1)
    values, label = (samples, "samples") if data is None else (data, "data")
    low, high = _range(torch.cat([samples, values])[:, 0])
    x = torch.linspace(low, high, 500, dtype=torch.float64)
    with torch.no_grad():
        density = log_prob(x.unsqueeze(-1)).exp()
    if not density.isfinite().all():
        raise ValueError(
            "log_prob must return values that make a finite picture; got "
            f"{(~density.isfinite()).sum()} others of {len(density)}."
        )
    ax = new_panel(width=5.2)
    look: dict[str, Any] = {"bins": 60, "range": (low, high), "density": True}
    ax.hist(values[:, 0].numpy(), color=GREY, alpha=0.4, label=label, **look)
    ax.plot(x.numpy(), density.numpy(), color=ORANGE, linewidth=1.6, label="density")
    _finish(ax, name, "density")
    ax.legend(fontsize=TEXT_SIZE, frameon=False)
    if title is not None:
        ax.set_title(title, fontsize=TITLE_SIZE)
    return ax.figure.figure


def plot_two_columns(
    log_prob: LogProb,
    names: Sequence[str],
    *,
    samples: Float[Tensor, "n 2"],
    data: Float[Tensor, "rows 2"] | None = None,
    title: str | None = None,
) -> Figure:
    """Plot the density of two columns as an image, beside its samples and, if given, the data.

    Args:
        log_prob: Log-densities (n,) in nats of points (n, 2), in float64.
        names: Names of the columns.
        samples: Samples of the density.
        data: Rows of the table.
        title: Text above all panels.

    Raises:
        ValueError: If `samples` or `data` are not (n, 2), empty or not finite, or `log_prob`
            returns invalid values, as in `plot_density`.
    """
    from matplotlib.ticker import MaxNLocator

    samples, data = _checked("samples", samples, 2), _checked_data(data, 2)
    shown = samples if data is None else torch.cat([samples, data])
    extent = (*_range(shown[:, 0]), *_range(shown[:, 1]))
    figure, ((first, *others),) = figure_grid(1, 2 if data is None else 3)
    draw_density(log_prob, grid_points(extent, 100), extent, ax=first, title="density")
    points = {"samples": samples} if data is None else {"samples": samples, "data": data}
    for ax, (label, x) in zip(others, points.items(), strict=True):
        plot_samples(x, extent=extent, ax=ax, title=label)
    for ax in (first, *others):
        ax.set_aspect("auto")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4))
        _finish(ax, *names)
    if title is not None:
        figure.suptitle(title, fontsize=TITLE_SIZE)
    return figure


def plot_pairs(
    samples: Float[Tensor, "n features"],
    names: Sequence[str],
    *,
    data: Float[Tensor, "rows features"] | None = None,
    title: str | None = None,
) -> Figure:
    """Plot every pair of columns as points, and each column as a histogram.

    Args:
        samples: Samples of a density.
        names: Names of the columns.
        data: Rows of the table, drawn beneath.
        title: Text above all panels.

    Raises:
        ValueError: If there is not one name for each column, or `samples` or `data` are empty or
            not finite.
    """
    samples = _checked("samples", samples, samples.shape[-1])
    count = samples.shape[-1]
    data = _checked_data(data, count)
    if len(names) != count:
        raise ValueError(f"names must be {count}, one for each column; got {len(names)}.")
    layers = [("samples", samples, ORANGE)]
    if data is not None:
        layers.insert(0, ("data", data, BLUE))
    ranges = [_range(torch.cat([x[:, i] for _, x, _ in layers])) for i in range(count)]
    figure, axes = figure_grid(count, count, panel_size=max(1.2, 6.4 / count))
    for i, row in enumerate(axes):
        for j, ax in enumerate(row):
            if j > i:
                ax.remove()
                continue
            for label, x, colour in layers:
                _draw_pair(ax, x, i, j, ranges[j], colour, label)
            ax.set(xlim=ranges[j], xticks=[], yticks=[])
            if i != j:
                ax.set(ylim=ranges[i])
            _finish(ax, names[j] if i == count - 1 else "", names[i] if j == 0 else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", fontsize=TEXT_SIZE, frameon=False)
    if title is not None:
        figure.suptitle(title, fontsize=TITLE_SIZE)
    return figure


def _checked(name: str, x: Tensor, columns: int) -> Tensor:
    """Return rows to draw in float64 on the CPU; refuse invalid ones."""
    if x.ndim != 2 or x.shape[-1] != columns or x.numel() == 0:
        raise ValueError(f"{name} must have shape (n, {columns}), not empty; got {tuple(x.shape)}.")
    bad = ~x.detach().isfinite().all(-1)
    if bad.any():
        raise ValueError(
            f"{name} must be finite; got NaN or infinity in {name_rows(bad)}. Drop these rows."
        )
    return x.detach().cpu().double().resolve_neg()


def _checked_data(data: Tensor | None, columns: int) -> Tensor | None:
    return None if data is None else _checked("data", data, columns)


def _draw_pair(
    ax: Axes, x: Tensor, row: int, column: int, extent: tuple[float, float], colour: str, label: str
) -> None:
    across = x[:, column].numpy()
    if row == column:
        look: dict[str, Any] = {"bins": 40, "range": extent, "density": True, "histtype": "step"}
        ax.hist(across, color=colour, label=label, **look)
    else:
        up = x[:, row].numpy()
        ax.scatter(across[:_POINTS], up[:_POINTS], s=3, color=colour, alpha=0.3, linewidths=0)


def _range(values: Tensor) -> tuple[float, float]:
    """Return bounds around all values but a few at either end."""
    few = math.ceil(_LEFT_OUT * len(values))
    ordered = values.sort().values
    low, high = float(ordered[few - 1]), float(ordered[-few])
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _finish(ax: Axes, across: str, up: str) -> None:
    # Column names may hold $ signs, and are never formulas.
    ax.set_xlabel(across, fontsize=TEXT_SIZE, parse_math=False, usetex=False)
    ax.set_ylabel(up, fontsize=TEXT_SIZE, parse_math=False, usetex=False)
    ax.tick_params(labelsize=TEXT_SIZE)
