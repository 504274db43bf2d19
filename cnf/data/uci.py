"""UCI benchmark tables for density estimation: POWER, GAS, HEPMASS, MINIBOONE and BSDS300.

They are split and scaled as by Papamakarios et al., so that results compare with published ones.
The files are in their archive, https://zenodo.org/records/1161203; this package contains and
downloads none.

References:
    Papamakarios, Pavlakou & Murray (2017), Masked Autoregressive Flow for Density Estimation.
    https://arxiv.org/abs/1705.07057
    Their code: https://github.com/gpapamak/maf
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cnf._files import as_path, check_unpacked
from cnf.data.splits import Splits, split_rows
from cnf.data.table_files import read_table

_HEPMASS_FEATURES = 27
_GAS_FILES = ("ethylene_CO.npy", "ethylene_CO.parquet", "ethylene_CO.csv")
_GAS_LEFT_OUT = ("Time", "Meth", "Eth")
_GAS_SENSORS = 16
_GAS_CORRELATION = 0.98
_HEPMASS_REPEATS = 5
_CONVERT_GAS = (
    "python -c \"import numpy, pandas; numpy.save('ethylene_CO.npy', "
    "pandas.read_pickle('ethylene_CO.pickle').drop(columns=['Time', 'Meth', 'Eth']))\""
)


def benchmark_table(name: str, folder: str | os.PathLike[str]) -> Splits:
    """Load one of the five benchmark tables, split into three and standardised.

    Args:
        name: One of `BENCHMARKS`, in any case.
        folder: Folder of the unpacked archive: it has ``power/data.npy``, ``hepmass/`` with
            ``1000_train.csv`` and ``1000_test.csv``, ``miniboone/data.npy``,
            ``BSDS300/BSDS300.hdf5`` (needs h5py), and ``gas/``, whose pickle is code and not read.
            Convert it once to ``ethylene_CO.npy``, ``.parquet`` or ``.csv``; the error without
            them shows a command.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If there is no table of that name, or the file has another content.
    """
    if name.lower() not in _LOADERS:
        raise ValueError(f"name must be one of {', '.join(BENCHMARKS)}; got {name!r}.")
    return _LOADERS[name.lower()](as_path("folder", folder))


def prepare_power(data: NDArray[np.float64]) -> Splits:
    """Prepare POWER from its eight columns: shuffle, drop two, add noise, split, standardise.

    The noise spreads each rounded measurement over the rounding step of its column; the time of day
    gets none.

    Args:
        data: ``(rows, 8)``: active power, reactive power, voltage, intensity, three sub-meterings,
            minute of the day.

    Raises:
        ValueError: If there are not eight columns.
    """
    if data.ndim != 2 or data.shape[1] != 8:
        raise ValueError(f"POWER must have shape (rows, 8); got {data.shape}.")
    random = np.random.RandomState(42)  # these draws define the published split
    data = data.copy()
    random.shuffle(data)
    rows = len(data)
    data = np.delete(data, (1, 3), axis=1)
    voltage, active_power = 0.01 * random.rand(rows, 1), 0.001 * random.rand(rows, 1)
    metering, time = random.rand(rows, 3), np.zeros((rows, 1))
    noise = np.hstack([active_power, voltage, metering, time])
    return split_rows(data + noise, seed=None).standardized()


def _gas(folder: Path) -> Splits:
    files = [folder / "gas" / name for name in _GAS_FILES]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"there is none of {', '.join(_GAS_FILES)} in {files[0].parent}. The original "
            "ethylene_CO.pickle is code, which this package does not run; if you trust it, convert "
            f"it in that folder by: {_CONVERT_GAS}"
        )
    table = read_table(found)
    sensors = [i for i, column in enumerate(table.columns) if column not in _GAS_LEFT_OUT]
    x = table.values[:, sensors]
    if x.shape[1] != _GAS_SENSORS:
        raise ValueError(
            f"{found} must have {_GAS_SENSORS} columns beside {', '.join(_GAS_LEFT_OUT)}; got "
            f"{x.shape[1]}. A file without names must have the sensors alone."
        )
    alike = np.asarray(np.corrcoef(x, rowvar=False)) > _GAS_CORRELATION
    kept = list(range(x.shape[1]))
    while (correlated := alike[np.ix_(kept, kept)].sum(1) > 1).any():  # with others than itself
        del kept[int(correlated.argmax())]
    x = x[:, kept]
    return split_rows((x - x.mean(0)) / x.std(0, ddof=1), seed=None)


def _hepmass(folder: Path) -> Splits:
    known, test = (
        _hepmass_signal(folder / "hepmass" / f"1000_{part}.csv") for part in ("train", "test")
    )
    mean, std = known.mean(0), known.std(0, ddof=1)
    varied = (known == known.min(0)).sum(0) <= _HEPMASS_REPEATS  # the original's criterion
    known, test = (((part - mean) / std)[:, varied] for part in (known, test))
    train = len(known) - int(0.1 * len(known))
    return Splits(known[:train], known[train:], test)


def _hepmass_signal(path: Path) -> NDArray[np.float64]:
    """Return the features of the signal; header and lines differ in their last columns."""
    _check_exists(path)
    try:
        columns = range(1 + _HEPMASS_FEATURES)
        table = np.loadtxt(
            str(path), delimiter=",", skiprows=1, usecols=columns, ndmin=2, comments=None
        )
    except ValueError as error:
        raise ValueError(
            f"{path} must have a label and {_HEPMASS_FEATURES} features in each line ({error})."
        ) from error
    return table[table[:, 0] == 1, 1:]


def _miniboone(folder: Path) -> Splits:
    return split_rows(_read(folder / "miniboone" / "data.npy", 43), seed=None).standardized()


def _bsds300(folder: Path) -> Splits:
    path = folder / "BSDS300" / "BSDS300.hdf5"
    _check_exists(path)
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} needs h5py, which is not installed: pip install h5py.") from error
    try:
        with h5py.File(path, "r") as file:
            parts = [file[part] for part in ("train", "validation", "test")]
            check_unpacked(path, sum(part.nbytes for part in parts))
            splits = Splits(*map(np.asarray, parts))
    except (KeyError, OSError) as error:
        raise ValueError(
            f"{path} must be an HDF5 file with train, validation and test ({error})."
        ) from error
    for part in splits:
        if part.ndim != 2 or part.shape[1] != 63 or part.dtype.kind != "f":
            raise ValueError(f"{path} must have shape (rows, 63); got {part.dtype} {part.shape}.")
    return splits


def _read(path: Path, columns: int) -> NDArray[np.float64]:
    _check_exists(path)
    table = read_table(path)
    if len(table.columns) != columns:
        raise ValueError(f"{path} must have {columns} columns; got {len(table.columns)}.")
    return table.values


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}. Unpack the archive of https://zenodo.org/records/1161203, "
            "and pass its folder."
        )


_LOADERS: dict[str, Callable[[Path], Splits]] = {
    "power": lambda folder: prepare_power(_read(folder / "power" / "data.npy", 8)),
    "gas": _gas,
    "hepmass": _hepmass,
    "miniboone": _miniboone,
    "bsds300": _bsds300,
}

BENCHMARKS = tuple(_LOADERS)
"""Names of the tables."""
