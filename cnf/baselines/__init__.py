"""Baselines: named discrete flows, to compare a CNF with."""

from cnf.baselines.catalogue import Baseline, build, names
from cnf.baselines.glow import glow
from cnf.baselines.zuko_flows import NamedMixture, NamedTransform

__all__ = ["Baseline", "NamedMixture", "NamedTransform", "build", "glow", "names"]
