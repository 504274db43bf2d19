"""Data: toy densities with exact log-densities, tables and benchmarks."""

from cnf.data.cells import Table
from cnf.data.densities import GaussianMixture
from cnf.data.memmap import NpyRows
from cnf.data.splits import Splits, split_rows
from cnf.data.table_files import read_table, write_table
from cnf.data.toy import TOY_NAMES, toy_density
from cnf.data.uci import BENCHMARKS, benchmark_table

__all__ = [
    "BENCHMARKS",
    "TOY_NAMES",
    "GaussianMixture",
    "NpyRows",
    "Splits",
    "Table",
    "benchmark_table",
    "read_table",
    "split_rows",
    "toy_density",
    "write_table",
]
