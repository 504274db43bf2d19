"""Saving and loading of a flow as one file."""

from cnf.saving.flow_files import load, save

__all__ = ["load", "save"]
