"""The benchmark tables, from small files in the original formats, against plain computations."""

import sys

import numpy as np
import pytest

from cnf.data.table_files import write_table
from cnf.data.uci import BENCHMARKS, benchmark_table, prepare_power


def saved(folder, *names):
    path = folder.joinpath(*names)
    path.parent.mkdir(exist_ok=True)
    return path


def test_power(tmp_path):
    rng = np.random.default_rng(0)
    data = np.round(rng.normal(20, 5, (107, 8)))
    np.save(saved(tmp_path, "power", "data.npy"), data)
    splits = benchmark_table("POWER", tmp_path)
    assert [part.shape for part in splits] == [(88, 6), (9, 6), (10, 6)]

    # Without the noise, row by row: a permutation of the data by the order that the seed gives.
    random = np.random.RandomState(42)
    order = np.arange(107)
    random.shuffle(order)
    uniform = {
        "voltage": random.rand(107),
        "power": random.rand(107),
        "metering": random.rand(107, 3),
    }
    spread = {0: 1e-3 * uniform["power"], 1: 1e-2 * uniform["voltage"], 5: np.zeros(107)}
    spread |= {2 + i: uniform["metering"][:, i] for i in range(3)}
    columns = [data[order, source] + spread[i] for i, source in enumerate([0, 2, 4, 5, 6, 7])]
    together = np.concatenate(splits)
    for found, column in zip(together.T, columns, strict=True):
        known = column[:97]
        scale = np.sqrt(np.mean((known - known.mean()) ** 2))
        assert found == pytest.approx((column - known.mean()) / scale, abs=1e-12)


def test_power_leaves_what_it_is_given(tmp_path):
    data = np.random.default_rng(0).normal(size=(30, 8))
    before = data.copy()
    prepare_power(data)
    assert (data == before).all()
    with pytest.raises(ValueError, match=r"POWER must have shape \(rows, 8\); got \(30, 7\)"):
        prepare_power(data[:, 1:])


@pytest.mark.parametrize("suffix", ["npy", "csv", "parquet"])
def test_gas(tmp_path, suffix):
    rng = np.random.default_rng(0)
    sensors = rng.normal(5, 3, (100, 16))
    sensors[:, 0] = 2 * sensors[:, 3] + 1e-3 * sensors[:, 4]  # 0, 3 and 9 go together,
    sensors[:, 9] = sensors[:, 3] + 1e-3 * rng.normal(size=100)
    sensors[:, 5] = -sensors[:, 6]  # and these do not, by the sign
    names = ["Time", "Meth", "Eth", *(f"R{i}" for i in range(16))]
    table = np.hstack([rng.normal(size=(100, 3)), sensors])
    path = saved(tmp_path, "gas", f"ethylene_CO.{suffix}")
    if suffix == "npy":
        np.save(path, sensors)
    elif suffix == "csv":
        write_table(path, table, names)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        columns = dict(zip(names, table.T, strict=True))
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)

    splits = benchmark_table("gas", tmp_path)
    assert [part.shape for part in splits] == [(81, 14), (9, 14), (10, 14)]
    kept = sensors[:, [i for i in range(16) if i not in (0, 3)]]
    expected = (kept - kept.mean(0)) / np.sqrt(kept.var(0) * 100 / 99)
    assert np.concatenate(splits) == pytest.approx(expected, abs=1e-12)


def test_gas_as_a_pickle_is_not_read_but_the_way_is_shown(tmp_path):
    saved(tmp_path, "gas", "ethylene_CO.pickle").write_bytes(b"cos\nsystem\n")
    with pytest.raises(FileNotFoundError, match=r"is code, .*pandas.read_pickle\('ethylene_CO.pi"):
        benchmark_table("gas", tmp_path)
    np.save(tmp_path / "gas" / "ethylene_CO.npy", np.random.default_rng(0).normal(size=(9, 19)))
    with pytest.raises(ValueError, match=r"16 columns beside Time, Meth, Eth; got 19"):
        benchmark_table("gas", tmp_path)


@pytest.mark.parametrize("extra", ["header", "lines", "neither"])
def test_hepmass(tmp_path, extra):
    rng = np.random.default_rng(0)
    parts = {}
    for part, rows in (("train", 60), ("test", 40)):
        table = np.hstack([rng.integers(0, 2, (rows, 1)), rng.normal(size=(rows, 27))])
        table[:, 4] = np.abs(table[:, 4]) * (rng.random(rows) < 0.5)  # least value often,
        table[:, 7] = np.minimum(table[:, 7], 0.5)  # and greatest value often
        header = ["# label", *(f"f{i}" for i in range(27))] + ["mass"] * (extra == "header")
        lines = np.hstack([table, np.ones((rows, 1))]) if extra == "lines" else table
        text = "\n".join([",".join(header), *(",".join(map(repr, row)) for row in lines.tolist())])
        saved(tmp_path, "hepmass", f"1000_{part}.csv").write_text(text)
        parts[part] = table[table[:, 0] == 1, 1:]

    splits = benchmark_table("hepmass", tmp_path)
    known = parts["train"]
    held_out = len(known) // 10
    assert [len(part) for part in splits] == [len(known) - held_out, held_out, len(parts["test"])]
    scale = np.sqrt(((known - known.mean(0)) ** 2).sum(0) / (len(known) - 1))
    kept = [i for i in range(27) if i != 3]
    for found, expected in ((np.concatenate(splits[:2]), known), (splits.test, parts["test"])):
        assert found == pytest.approx(((expected - known.mean(0)) / scale)[:, kept], abs=1e-12)


def test_hepmass_says_which_file_is_wrong(tmp_path):
    saved(tmp_path, "hepmass", "1000_train.csv").write_text("# label\n1,x\n")
    with pytest.raises(ValueError, match=r"1000_train.csv must have a label and 27 features"):
        benchmark_table("hepmass", tmp_path)


def test_miniboone(tmp_path):
    data = np.random.default_rng(0).normal(2, 3, (207, 43))
    np.save(saved(tmp_path, "miniboone", "data.npy"), data)
    splits = benchmark_table("miniboone", tmp_path)
    assert [len(part) for part in splits] == [169, 18, 20]
    known = data[:187]
    scale = np.sqrt(((known - known.mean(0)) ** 2).mean(0))
    assert np.concatenate(splits) == pytest.approx((data - known.mean(0)) / scale, abs=1e-12)
    np.save(tmp_path / "miniboone" / "data.npy", data[:, 1:])
    with pytest.raises(ValueError, match=r"data.npy must have 43 columns; got 42"):
        benchmark_table("miniboone", tmp_path)


def test_bsds300(tmp_path):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    parts = {name: rng.normal(size=(5, 63)) for name in ("train", "validation", "test")}
    path = saved(tmp_path, "BSDS300", "BSDS300.hdf5")
    with h5py.File(path, "w") as file:
        for name, values in parts.items():
            file[name] = values
    splits = benchmark_table("BSDS300", tmp_path)
    assert all((getattr(splits, name) == values).all() for name, values in parts.items())
    with h5py.File(path, "w") as file:
        file["train"] = parts["train"]
    with pytest.raises(ValueError, match="HDF5 file with train, validation and test"):
        benchmark_table("BSDS300", tmp_path)
    with h5py.File(path, "w") as file:
        for name, values in parts.items():
            file[name] = values[:, 1:]
    with pytest.raises(ValueError, match=r"shape \(rows, 63\); got float64 \(5, 62\)"):
        benchmark_table("BSDS300", tmp_path)
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="HDF5 file"):
        benchmark_table("BSDS300", tmp_path)


def test_without_h5py_bsds300_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    saved(tmp_path, "BSDS300", "BSDS300.hdf5").touch()
    with pytest.raises(ValueError, match=r"needs h5py, .* pip install h5py"):
        benchmark_table("bsds300", tmp_path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_not_there_is_said(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"there is (no|none)"):
        benchmark_table(name, tmp_path)


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one of power, gas, .*; got 'higgs'"):
        benchmark_table("higgs", tmp_path)
