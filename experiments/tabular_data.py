"""Tables for density estimation: where they come from, and what others reached on them."""

import zipfile
from pathlib import Path

import numpy as np

from cnf.data.splits import Splits, split_rows
from cnf.data.table_files import read_table
from cnf.data.uci import BENCHMARKS, benchmark_table, prepare_power

PARTS = ("x_train", "x_val", "x_test")

MAF_PAPER = "Papamakarios et al. 2017, arXiv:1705.07057"
FFJORD_PAPER = "Grathwohl et al. 2019, arXiv:1810.01367"
PAPERS = {
    "Gaussian": MAF_PAPER,
    "MADE": MAF_PAPER,
    "Real NVP": MAF_PAPER,
    "MAF": MAF_PAPER,
    "Glow": FFJORD_PAPER,
    "FFJORD": FFJORD_PAPER,
    "NAF": "Huang et al. 2018, arXiv:1804.00779",
    "OT-Flow": "Onken et al. 2021, arXiv:2006.00104",
}
"""Where the published figures stand."""

PUBLISHED: dict[str, dict[str, float]] = {
    "power": {
        "Gaussian": -7.74,
        "MADE": -3.08,
        "Real NVP": 0.17,
        "MAF": 0.24,
        "Glow": 0.17,
        "FFJORD": 0.46,
        "NAF": 0.62,
        "OT-Flow": 0.30,
    },
    "gas": {
        "Gaussian": -3.58,
        "MADE": 3.56,
        "Real NVP": 8.33,
        "MAF": 10.08,
        "Glow": 8.15,
        "FFJORD": 8.59,
        "NAF": 11.96,
    },
    "hepmass": {
        "Gaussian": -27.93,
        "MADE": -20.98,
        "Real NVP": -18.71,
        "MAF": -17.70,
        "Glow": -18.92,
        "FFJORD": -14.92,
        "NAF": -15.09,
    },
    "miniboone": {
        "Gaussian": -37.24,
        "MADE": -15.59,
        "Real NVP": -13.55,
        "MAF": -11.75,
        "Glow": -11.35,
        "FFJORD": -10.43,
        "NAF": -8.86,
        "OT-Flow": -10.55,
    },
    "bsds300": {
        "Gaussian": 96.67,
        "MADE": 148.85,
        "Real NVP": 153.28,
        "MAF": 155.69,
        "Glow": 155.07,
        "FFJORD": 157.40,
        "NAF": 157.73,
        "OT-Flow": 154.20,
    },
}
"""Mean test log-likelihoods on the whole tables, in nats: the best of the sizes in a paper."""


def read(data: Path, name: str | None) -> Splits:
    """The table at `data`, cut into three.

    Args:
        data: The folder of the original benchmark files; or an .npz file with x_train, x_val and
            x_test, or with one table; or any other file that `read_table` reads.
        name: Which benchmark a folder, or the raw rows of a file, are of; None for any other table.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If it is not as it must be.
    """
    if name is not None and name.lower() not in BENCHMARKS:
        raise ValueError(f"name must be one of {', '.join(BENCHMARKS)}; got {name!r}.")
    if data.is_dir():
        if name is None:
            raise ValueError(f"name must say which table of the folder {data} is meant.")
        return benchmark_table(name, data)
    if data.suffix.lower() == ".npz" and set(PARTS) <= set(names_in(data)):
        return Splits(*(read_table(data, array=part).values for part in PARTS))
    rows = read_table(data).values
    if name is not None and name.lower() == "power":
        return prepare_power(rows)
    return split_rows(rows, seed=None if name else 0)


def check_rows(splits: Splits) -> None:
    """Refuse parts from which nothing can be learnt or measured.

    Raises:
        ValueError: If there are too few rows.
    """
    features = splits.train.shape[1]
    for name, part, least in zip(splits._fields, splits, (features + 2, 1, 2), strict=True):
        if part.shape[1] != features or len(part) < least:
            raise ValueError(
                f"{name} must have {features} columns, as train has, and at least {least} rows; "
                f"got {part.shape}."
            )


def names_in(path: Path) -> list[str]:
    """Names of the arrays in an .npz file; none if it is damaged, which its reader will say."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return list(content)
    except (EOFError, ValueError, zipfile.BadZipFile):
        return []
