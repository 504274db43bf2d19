"""A flow in one file: its tensors, and a description of its parts."""

from cnf.saving.flow_files import load, save

__all__ = ["load", "save"]
