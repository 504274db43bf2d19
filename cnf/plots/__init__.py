"""Plots of flows and tables: from tensors and callables to matplotlib figures.

Matplotlib is imported with the first figure; neither pyplot nor a global setting is used. A plot is
drawn into the panel `ax`, or into a new figure.
"""

from cnf.plots.figures import figure_grid, save_figure
from cnf.plots.planes import plot_density, plot_samples, plot_trajectories, plot_vector_field
from cnf.plots.tables import plot_column, plot_pairs, plot_two_columns
from cnf.plots.tradeoffs import Tradeoff, plot_tradeoffs
from cnf.plots.training import plot_training

__all__ = [
    "Tradeoff",
    "figure_grid",
    "plot_column",
    "plot_density",
    "plot_pairs",
    "plot_samples",
    "plot_tradeoffs",
    "plot_training",
    "plot_trajectories",
    "plot_two_columns",
    "plot_vector_field",
    "save_figure",
]
