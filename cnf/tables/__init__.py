"""Densities of tables: fitted, scored row by row, kept in a folder, and for scikit-learn."""
