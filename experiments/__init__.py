"""One module for each claim, run as ``python -m experiments.NAME``."""
