"""Costs as ratios, measured side by side in one run, as ``python -m benchmarks.NAME``."""
