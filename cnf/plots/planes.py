"""Plots in the plane: densities, samples, trajectories and vector fields."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_count, check_dense, check_type
from cnf.plots.figures import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    TEXT_SIZE,
    TITLE_SIZE,
    Axes,
    Figure,
    Number,
    OptionalAxes,
    figure_grid,
    new_panel,
)

_MOST_PIXELS = 10_000
"""Largest number of cells along an axis."""

Extent: TypeAlias = Sequence[Number]
"""Rectangle of a plot: xmin, xmax, ymin, ymax."""


def plot_density(
    log_prob: Callable[[Float[Tensor, "n 2"]], Float[Tensor, " n"]],
    extent: Extent,
    *,
    log: bool = False,
    resolution: int = 200,
    ax: OptionalAxes = None,
    title: str | None = None,
) -> Figure:
    """Plot a density as an image, evaluated at the centre of each pixel.

    Args:
        log_prob: Log-densities (n,) in nats of points (n, 2), which come in chunks, without
            gradient, in torch's default dtype and on its default device. May be -inf.
        extent: The rectangle (xmin, xmax, ymin, ymax).
        log: Plot the log-density, down to 12 nats below its maximum: it shows tails and false
            bridges between modes, which the density hides.
        resolution: Number of pixels along each axis.
        ax: Panel to draw into.
        title: Text above the panel.

    Raises:
        ValueError: If `extent` or `resolution` is invalid, grid points coincide in the dtype, or
            `log_prob` returns a wrong shape, NaN, values too large for an image or, with `log`,
            -inf everywhere.
    """
    points = _rounded(grid_points(extent, resolution), torch.empty(()))
    return draw_density(log_prob, points, extent, log=log, ax=ax, title=title)


def draw_density(
    log_prob: Callable[[Float[Tensor, "n 2"]], Float[Tensor, " n"]],
    points: Float[Tensor, "n 2"],
    extent: Extent,
    *,
    log: bool = False,
    ax: OptionalAxes = None,
    title: str | None = None,
) -> Figure:
    """Plot a density as `plot_density` does, at the points of `grid_points` in any dtype."""
    resolution = math.isqrt(len(points))
    chunks = torch.split(points, 16_384)
    values = torch.cat([_evaluate("log_prob", log_prob, (len(x),), x) for x in chunks])
    image = values.clamp(min=values.max().item() - 12) if log else values.exp()
    if not image.isfinite().all():
        raise ValueError(
            "log_prob must return values that make a finite picture; "
            f"got values from {values.min():g} to {values.max():g}."
        )
    floor = image.min().item() if log else 0.0
    return _show_density(image.reshape(resolution, resolution), extent, floor, ax, title)


def plot_samples(
    x: Float[Tensor, "n features"],
    *,
    extent: Extent | None = None,
    ax: OptionalAxes = None,
    title: str | None = None,
) -> Figure:
    """Plot samples as a histogram in the style and units of `plot_density`, below 1000 as points.

    Args:
        x: Samples (n, 2).
        extent: The rectangle (xmin, xmax, ymin, ymax), by default a square around the samples. The
            histogram is normalised by all samples, those outside included.
        ax: Panel to draw into.
        title: Text above the panel.

    Raises:
        ValueError: If `x` is empty, not finite or not (n, 2), or `extent` invalid.
    """
    points = _checked_points("x", x, 2)
    extent = _square_around(points) if extent is None else _checked_extent(extent)
    across, up = points.T.numpy()
    if len(points) >= 1000:
        bins = min(200, math.isqrt(len(points) // 4))
        left, right, bottom, top = extent
        counts, _, _ = np.histogram2d(up, across, bins=bins, range=[(bottom, top), (left, right)])
        cell = (right - left) * (top - bottom) / bins**2
        image = torch.from_numpy(counts) / (len(points) * cell)
        return _show_density(image, extent, 0.0, ax, title)
    ax = new_panel() if ax is None else ax
    ax.scatter(across, up, s=5, color="#fcbf8c", alpha=0.8, linewidths=0)
    ax.set_facecolor(BLACK)
    return _finish_plane(ax, extent, title)


def plot_trajectories(
    states: Float[Tensor, "times n features"],
    *,
    extent: Extent | None = None,
    ax: OptionalAxes = None,
    title: str | None = None,
) -> Figure:
    """Plot trajectories of samples from the base, t = 0, to the data, t = 1.

    Args:
        states: Points (times, n, 2) of n trajectories, the base first.
        extent: The rectangle (xmin, xmax, ymin, ymax), by default a square around all points.
        ax: Panel to draw into.
        title: Text above the panel.

    Raises:
        ValueError: If `states` is empty, not finite or not (times, n, 2), or `extent` invalid.
    """
    paths = _checked_points("states", states, 3)
    extent = _square_around(paths.flatten(0, 1)) if extent is None else _checked_extent(extent)
    ax = new_panel() if ax is None else ax
    ax.plot(*paths.movedim(-1, 0).numpy(), color=GREY, alpha=0.4, linewidth=0.6)
    base, data = paths[0].numpy(), paths[-1].numpy()
    look: dict[str, Any] = {"marker": "o", "linestyle": "none", "markeredgewidth": 0.7}
    ax.plot(*base.T, color=BLUE, markerfacecolor="white", markersize=3, label="base, t = 0", **look)
    ax.plot(*data.T, color=ORANGE, markersize=2.3, label="data, t = 1", **look)
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=TEXT_SIZE, frameon=False
    )
    return _finish_plane(ax, extent, title)


def plot_vector_field(
    vector_field: Callable[[Float[Tensor, ""], Float[Tensor, "n 2"]], Float[Tensor, "n 2"]],
    times: Float[Tensor, " times"],
    extent: Extent,
    *,
    resolution: int = 20,
    title: str | None = None,
) -> Figure:
    """Plot a vector field as arrows, a panel for each time, with a common scale.

    Args:
        vector_field: Velocities (n, 2) at a time (0-dim) and points (n, 2), without gradient.
        times: Times of the panels; points have their dtype and device.
        extent: The rectangle (xmin, xmax, ymin, ymax).
        resolution: Number of arrows along each axis.
        title: Text above all panels.

    Raises:
        ValueError: If an argument is invalid or a velocity is not finite.
    """
    if times.ndim != 1 or len(times) == 0 or not times.isfinite().all():
        raise ValueError(f"times must be finite and of shape (times,), not empty; got {times}.")
    x = _rounded(grid_points(extent, resolution), times)
    arrows = torch.stack([_evaluate("vector_field", vector_field, x.shape, t, x) for t in times])
    if not arrows.isfinite().all():
        raise ValueError("vector_field must return finite velocities; got NaN or infinity.")
    columns = min(len(times), 5)
    figure, _ = figure_grid(math.ceil(len(times) / columns), columns)
    if title is not None:
        figure.suptitle(title, fontsize=TITLE_SIZE)
    for ax in figure.axes[len(times) :]:
        ax.remove()
    speeds = arrows.norm(dim=-1)
    fast = speeds.quantile(0.9).item() or speeds.max().item() or 1.0
    cell = min(extent[1] - extent[0], extent[3] - extent[2]) / resolution
    for ax, t, velocity in zip(figure.axes, times.tolist(), arrows, strict=True):
        look: dict[str, Any] = {"cmap": "viridis_r", "clim": (0.0, fast), "width": 0.005}
        # The speed `fast` is one cell long, with the top colour.
        units: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": fast / cell}
        speed = velocity.norm(dim=-1).numpy()
        ax.quiver(*x.cpu().T.numpy(), *velocity.T.numpy(), speed, pivot="mid", **units, **look)
        _finish_plane(ax, extent, f"t = {t:.3g}")
    return figure


def _checked_extent(extent: Extent) -> Extent:
    numbers = isinstance(extent, Sequence) and all(isinstance(bound, Real) for bound in extent)
    if not numbers:
        raise TypeError(f"extent must be (xmin, xmax, ymin, ymax); got {extent!r:.60}.")
    finite = len(extent) == 4 and all(math.isfinite(bound) for bound in extent)
    if not finite or extent[0] >= extent[1] or extent[2] >= extent[3]:
        raise ValueError(
            "extent must be finite (xmin, xmax, ymin, ymax) with xmin < xmax and ymin < ymax; "
            f"got {tuple(extent)}."
        )
    return extent


def _checked_points(name: str, points: Tensor, ndim: int) -> Tensor:
    check_type(name, points, Tensor, f"use torch.as_tensor({name})")
    check_dense(name, points)
    if not points.is_floating_point():
        raise ValueError(f"{name} must have a floating dtype; got {points.dtype}.")
    if points.ndim != ndim or points.shape[-1] != 2 or points.numel() == 0:
        shape = "(n, 2)" if ndim == 2 else "(times, n, 2)"
        raise ValueError(f"{name} must have shape {shape}, not empty; got {tuple(points.shape)}.")
    if not points.isfinite().all():
        raise ValueError(f"{name} must be finite; got {(~points.isfinite()).sum()} other numbers.")
    return points.detach().cpu().double().resolve_neg()


def _square_around(points: Tensor) -> Extent:
    low, high = points.amin(dim=0), points.amax(dim=0)
    x, y = ((low + high) / 2).tolist()
    half = 0.525 * (high - low).max().item() or 1.0
    return (x - half, x + half, y - half, y + half)


def _rounded(points: Tensor, like: Tensor) -> Tensor:
    """Convert points of a grid to the dtype and device of a tensor; refuse points that coincide."""
    rounded = points.to(like)
    for exact, kept in zip(points.T, rounded.T, strict=True):
        if len(kept.unique()) < len(exact.unique()):
            raise ValueError(
                f"extent must be wide enough for the dtype {like.dtype}, in which points of the "
                f"grid from {exact.min():g} to {exact.max():g} coincide. Centre the data at 0, or "
                "take float64."
            )
    return rounded


def grid_points(extent: Extent, resolution: int) -> Tensor:
    """Return the centres of the cells of `extent`: rows from below, each from the left."""
    left, right, bottom, top = _checked_extent(extent)
    check_count("resolution", resolution, most=_MOST_PIXELS)
    centres = (torch.arange(resolution, dtype=torch.float64, device="cpu") + 0.5) / resolution
    y, x = bottom + (top - bottom) * centres, left + (right - left) * centres
    return torch.cartesian_prod(y, x).flip(-1)


def _evaluate(
    name: str, function: Callable[..., Tensor], shape: Sequence[int], *arguments: Tensor
) -> Tensor:
    if not callable(function):
        raise TypeError(f"{name} must be callable; got {type(function).__name__}.")
    with torch.no_grad():
        value = function(*arguments)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a torch.Tensor; got {type(value).__name__}.")
    if value.shape != tuple(shape):
        raise ValueError(
            f"{name} must return shape {tuple(shape)} for points of shape "
            f"{tuple(arguments[-1].shape)}; got {tuple(value.shape)}."
        )
    return value.detach().cpu().double()  # a divergence may have turned the gradient on


def _show_density(
    image: Tensor, extent: Extent, floor: float, ax: OptionalAxes, title: str | None
) -> Figure:
    ax = new_panel() if ax is None else ax
    left, right, bottom, top = extent
    shown = ax.imshow(image.numpy(), extent=(left, right, bottom, top), origin="lower")
    shown.set(cmap="magma", clim=(floor, image.max().item()), interpolation="bilinear")
    return _finish_plane(ax, extent, title)


def _finish_plane(ax: Axes, extent: Extent, title: str | None) -> Figure:
    ax.set(xlim=extent[:2], ylim=extent[2:], aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set(color="#c0c0c0", linewidth=0.6)
    if title is not None:
        ax.set_title(title, fontsize=TITLE_SIZE)
    return ax.figure.figure  # the whole figure, also for a subfigure
