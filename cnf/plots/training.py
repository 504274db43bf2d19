"""Plot of a training run."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from cnf.plots.figures import (
    BLACK,
    BLUE,
    ORANGE,
    TEXT_SIZE,
    TITLE_SIZE,
    Figure,
    Number,
    OptionalAxes,
    new_panel,
)


def plot_training(
    history_columns: Mapping[str, Sequence[Number | None]],
    *,
    reference: Number | None = None,
    ax: OptionalAxes = None,
    title: str | None = None,
) -> Figure:
    """Plot the loss against the step, its running median and the validation losses.

    Missing values (None or not finite) are not drawn; single spikes may be outside the panel.

    Args:
        history_columns: Columns "step" and "loss", and perhaps "validation" in nats and "phase".
            Phases may have different losses, so that a line marks the end of each, and the running
            median does not cross it.
        reference: Loss of a perfect model, the entropy of the truth, in nats.
        ax: Panel to draw into.
        title: Text above the panel.

    Raises:
        ValueError: If a column is missing or of another length, or `reference` or every loss is
            not finite.
    """
    steps, losses = _measured(history_columns, "loss")
    if len(losses) == 0:
        raise ValueError('history_columns must hold a finite "loss"; got none.')
    if reference is not None and not math.isfinite(reference):
        raise ValueError(f"reference must be finite; got {reference}.")
    ends = _ends_of_phases(history_columns)
    places, medians = _medians_within_phases(steps, losses, ends)
    ax = new_panel(width=5.2) if ax is None else ax
    ax.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.6)
    ax.plot(places, medians, color=BLUE, linewidth=1.6, label="loss, running median")
    shown = [*np.quantile(losses, [0.01, 0.99]), *medians[np.isfinite(medians)]]
    if "validation" in history_columns:
        steps, validation = _measured(history_columns, "validation")
        if len(validation):
            ax.plot(steps, validation, "o", color=ORANGE, markersize=3.5, label="validation")
            shown.extend(validation)
    if reference is not None:
        ax.axhline(reference, color=BLACK, linewidth=0.9, ls="--", label="entropy of the truth")
        shown.append(reference)
    for end in ends:
        ax.axvline(end, color=BLACK, linewidth=0.9, ls=":")
    ax.set_ylabel("loss" if ends else "loss (nats)", fontsize=TEXT_SIZE)
    low, high = float(min(shown)), float(max(shown))
    margin = 0.06 * (high - low) or 1.0
    ax.set(ylim=(low - margin, high + margin), xmargin=0.02)
    ax.set_xlabel("step", fontsize=TEXT_SIZE)
    ax.tick_params(labelsize=TEXT_SIZE)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="center right", fontsize=TEXT_SIZE, frameon=False)
    if title is not None:
        ax.set_title(title, fontsize=TITLE_SIZE)
    return ax.figure.figure


def _ends_of_phases(columns: Mapping[str, Sequence[Number | None]]) -> list[float]:
    """Return the step halfway between each two consecutive phases."""
    steps, phases = columns["step"], columns.get("phase", [])
    return [
        float(steps[row]) + 0.5  # type: ignore[arg-type]
        for row, (phase, following) in enumerate(itertools.pairwise(phases))
        if phase != following
    ]


def _medians_within_phases(
    steps: np.ndarray, losses: np.ndarray, ends: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and running medians, with NaN between phases."""
    cuts = np.searchsorted(steps, ends)
    parts = []
    for part_steps, part in zip(np.split(steps, cuts), np.split(losses, cuts), strict=True):
        if len(part):
            places, medians = _running_median(part)
            parts += [np.array([part_steps[places], medians]), np.full((2, 1), np.nan)]
    joined = np.concatenate(parts[:-1], axis=1)
    return joined[0], joined[1]


def _measured(
    columns: Mapping[str, Sequence[Number | None]], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the values of the column `name` where it is finite."""
    if not {"step", name} <= columns.keys():
        raise ValueError(f'history_columns must hold "step" and "{name}"; got {list(columns)}.')
    steps, values = (np.array(columns[key], dtype=float) for key in ("step", name))
    if steps.shape != values.shape or not np.isfinite(steps).all():
        raise ValueError(
            f'history_columns must hold a finite "step" for each "{name}"; '
            f"got {len(steps)} and {len(values)}."
        )
    measured = np.isfinite(values)
    return steps[measured], values[measured]


def _running_median(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most 400 indices, and medians over a fiftieth of the run around them."""
    half = max(2, len(values) // 100)
    places = np.unique(np.linspace(0, len(values) - 1, 400).astype(int))
    medians = [np.median(values[max(0, place - half) : place + half + 1]) for place in places]
    return places, np.array(medians)
