"""Invertible linear maps of channels and pixels."""

from cnf.transforms.linear.conv1x1 import Conv1x1
from cnf.transforms.linear.convolutions import EmergingConv, PeriodicConv
from cnf.transforms.linear.woodbury import WoodburyConv

__all__ = ["Conv1x1", "EmergingConv", "PeriodicConv", "WoodburyConv"]
