"""What `experiments.compare` found: tables and a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import markdown
from cnf import Flow
from cnf.data.toy import toy_density
from cnf.plots import figure_grid, plot_density, save_figure


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one flow is worth on one task."""

    task: str
    flow: str
    parameters: int
    likelihood: str
    loss: float
    """Negative log-likelihood on the test rows, less that of the truth if it is known."""
    standard_error: float
    unit: str
    training_seconds: float
    log_prob_seconds: float
    """For the rows that are timed."""
    sample_seconds: float
    """For as many samples."""
    round_trip: float


def tables(results: Sequence[Result]) -> list[str]:
    """One table for each task, best first."""
    made = []
    for task in dict.fromkeys(result.task for result in results):
        group = sorted((r for r in results if r.task == task), key=lambda result: result.loss)
        heads = [
            "flow",
            group[0].unit,
            "is",
            "parameters",
            "training",
            "log_prob",
            "sample",
            "round trip",
        ]
        rows = [
            [
                result.flow,
                f"{result.loss:.3f} ± {result.standard_error:.3f}",
                result.likelihood.replace("_", " "),
                str(result.parameters),
                f"{result.training_seconds:.0f} s",
                f"{result.log_prob_seconds:.2f} s",
                f"{result.sample_seconds:.2f} s",
                f"{result.round_trip:.0e}",
            ]
            for result in group
        ]
        made.append(f"{task}:\n\n{markdown(heads, rows)}")
    return made


def draw(drawn: dict[str, dict[str, Flow]], path: Path, *, coarse: bool) -> None:
    """A row for each toy set: the truth, and the density of each flow."""
    names = list(dict.fromkeys(name for flows in drawn.values() for name in flows))
    figure, axes = figure_grid(len(drawn), 1 + len(names), panel_size=1.8)
    for row, (task, flows) in zip(axes, drawn.items(), strict=True):
        truth = toy_density(task)
        for ax, name in zip(row, ["truth", *names], strict=True):
            if name not in {"truth", *flows}:  # left out of this set
                ax.set_axis_off()
                continue
            density = truth.log_prob if name == "truth" else flows[name].log_prob
            resolution = 40 if coarse else 120
            plot_density(density, truth.extent, resolution=resolution, ax=ax, title=name)
    save_figure(figure, path)
