"""Laws of damaged and hostile files: none gives other numbers, or costs before it is checked."""

import contextlib
import hashlib
import json
import math
import threading
import zipfile

import numpy as np
import pytest
import torch
from old_files import without_digest
from safetensors.torch import save_file
from torch.utils.data import StackDataset, TensorDataset
from zoo import EVERY_FLOW, UserNetwork, cnf

from cnf import CNF, Checkpoints, Flow, History, ODESolver, fit, load, save
from cnf._building import Building
from cnf._files import BLANK_DIGEST, seal
from cnf.baselines import build
from cnf.data.memmap import NpyRows
from cnf.data.table_files import read_table
from cnf.saving.description import describe, rebuild
from cnf.tables.model import Columns, TableModel
from cnf.training import TrainingConfig
from cnf.training.checkpoint import checkpoints_in, read_newest_checkpoint, write_checkpoint
from cnf.transforms import Affine

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

X = torch.linspace(-1, 2, 40, dtype=torch.float64).reshape(20, 2).square()
SMALL = {"hidden_features": (3,), "solver": ODESolver(method="rk4", steps=2)}


def flips(content, count):
    """The content with one bit flipped, at as many places spread over it."""
    generator = np.random.default_rng(0)
    for place in generator.choice(8 * len(content), count, replace=False):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)


def hostile(path, flow):
    """A file with no tensors, a valid digest and this description of a flow."""
    description = {"sha256": BLANK_DIGEST, "format": 1, "flow": flow}
    save_file({}, path, metadata={"cnf": json.dumps(description)})
    path.write_bytes(seal(path.read_bytes()))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


def test_no_file_with_a_flipped_bit_loads(path):
    save(CNF(1, **SMALL), path)
    content = path.read_bytes()
    for damaged in flips(content, 1000):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|was not written by cnf\.save"):
            load(path)
    path.write_bytes(content)
    load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content + b"\0",
        lambda content: content.replace(b"silu", b"tanh"),
        lambda content: content[:-8] + b"\1" * 8,
        lambda content: content[:-8],
    ],
    ids=["longer", "setting", "weight", "shorter"],
)
def test_a_changed_file_is_damaged(change, path):
    save(CNF(1, hidden_features=(3, 3)), path)
    content = path.read_bytes()
    assert change(content) != content
    path.write_bytes(change(content))
    with pytest.raises(ValueError, match=r"damaged.*Restore it"):
        load(path)


def test_a_file_from_before_there_was_a_digest_loads_with_a_note_until_it_is_saved_again(path):
    flow, x = CNF(2, 1, **SMALL), torch.randn(4, 2)
    flow.initialize(3 + x, 7 + x[:, :1])
    flow.chain[0].keep_identity()
    save(flow, path)
    added = ("is_initialized", "context_scaling.mean", "context_scaling.log_std")
    # Older still: what flows hold since then is missing, and was the identity.
    without_digest(
        path, lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(added)}
    )
    with pytest.warns(UserWarning, match=r"wrote no digest.*save\(load\(path\), path\)"):
        old = load(path)
    field = flow.chain[-1].vector_field
    field.context_scaling.set(torch.zeros(1), torch.ones(1))
    assert torch.equal(old.log_prob(x, x[:, :1]), flow.log_prob(x, x[:, :1]))
    save(old, path)
    load(path)


def test_a_scaling_of_which_a_part_is_missing_is_refused(path):
    flow = CNF(2, 1, **SMALL)
    flow.initialize(torch.randn(9, 2), 5 + torch.randn(9, 1))
    save(flow, path)
    for missing in ("mean", "log_std", "is_initialized"):
        for where in ("transforms.0", "context_scaling"):
            if (where, missing) == ("transforms.0", "is_initialized"):
                continue  # which older files lack alone
            save(flow, path)
            without_digest(
                path,
                lambda tensors, where=where, missing=missing: {
                    k: v for k, v in tensors.items() if not k.endswith(f"{where}.{missing}")
                },
            )
            with (
                pytest.warns(UserWarning, match="no digest"),
                pytest.raises(ValueError, match=rf"Missing key.*{missing}"),
            ):
                load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(value, path):
    flow = CNF(2, **SMALL)
    save(flow, path)
    content = path.read_bytes()
    with torch.no_grad():
        flow.chain[-1].vector_field.layers[-1].linear.weight[1, 0] = value
    with pytest.raises(ValueError, match=r"NaN or inf in the tensor '.*layers\.1\.linear\.weight'"):
        save(flow, path)
    assert path.read_bytes() == content
    without_digest(path, lambda tensors: {k: value + 0 * v for k, v in tensors.items() if v.ndim})
    with pytest.raises(
        ValueError, match=r"must hold finite.*NaN or inf in the tensor.*and \d+ more"
    ):
        load(path)


def mlp(**settings):
    return {
        "class": "Flow",
        "base": {"class": "StandardNormal", "features": 2},
        "transforms": [
            {
                "class": "ContinuousTransform",
                "vector_field": {"class": "MLPField", "features": 2, **settings},
            }
        ],
    }


def flow_of(*transforms, features=2):
    base = {"class": "StandardNormal", "features": features}
    return {"class": "Flow", "base": base, "transforms": list(transforms)}


def nested(depth):
    part = {"class": "Affine", "features": 1}
    for _ in range(depth):
        part = {"class": "FactorOut", "transforms": [part], "features": 2}
    return flow_of(part)


COSTLY = {
    "wide": mlp(hidden_features=[10**5, 10**5]),
    "huge": mlp(hidden_features=[10**12]),
    "beyond an integer": mlp(hidden_features=[10**30]),
    "deep": mlp(hidden_features=[1] * 30_000),
    "many waves": mlp(time_features=10**9, context_features=10**8),
    "many transforms": flow_of(*[{"class": "Permute", "permutation": [1, 0]}] * 30_000),
    "flattened": flow_of(*[{"class": "Flatten", "shape": [1, 1, 2]}] * 30_000),
    "nested": nested(200),
    "blocks": flow_of(
        {
            "class": "ContinuousTransform",
            "vector_field": {
                "class": "ResidualField",
                "features": 2,
                "hidden_features": 1,
                "blocks": 10**9,
            },
        }
    ),
    "affine": flow_of({"class": "Affine", "features": 10**11}, features=10**11),
    "mask": flow_of({"class": "ExactLipschitz", "features": 10**5}, features=10**5),
    "channels": flow_of({"class": "Conv1x1", "shape": 10**5}, features=10**5),
    "components": {
        "class": "Flow",
        "transforms": [],
        "base": {"class": "NamedMixture", "features": 2, "size": 10**9},
    },
    "named": flow_of({"class": "NamedTransform", "name": "nsf", "features": 2, "size": 10**6}),
    "named of many": flow_of(
        {"class": "NamedTransform", "name": "gf", "features": 10**8, "size": 2}, features=10**8
    ),
    "augmented": flow_of(
        {"class": "Augment", "features": 2, "extra": 10**9, "hidden_features": [10**9]}
    ),
}


@pytest.mark.parametrize("flow", COSTLY.values(), ids=COSTLY)
def test_what_a_small_file_asks_for_is_refused_before_it_is_built(flow, path, monkeypatch):
    spent = []
    count = Building.count_call

    def record(building):
        spent.append((building.calls, building.bytes))
        count(building)

    monkeypatch.setattr(Building, "count_call", record)
    hostile(path, flow)
    with pytest.raises(ValueError, match="does not describe a flow of this version of cnf"):
        load(path)
    calls, size = max(spent, default=(0, 0))
    assert calls <= 20_000
    assert size <= 2**26


def test_deep_nesting_is_refused(path):
    hostile(path, nested(60))  # what JSON itself can read
    with pytest.raises(ValueError, match="does not describe a flow"):
        load(path)


@pytest.mark.parametrize("name", EVERY_FLOW)
def test_building_takes_little_beside_the_file(name, path):
    """Far from what `load` allows, so that it refuses no flow that was saved."""
    flow = EVERY_FLOW[name]()
    building = Building(most_bytes=2**40)
    description = describe(flow)
    with building:
        rebuild(description, {"UserNetwork": UserNetwork}, building.count_call)
    tensors = flow.state_dict().values()
    assert building.calls < 200 + 10 * len(tensors)
    assert building.bytes < 2**16 + 4 * sum(tensor.nbytes for tensor in tensors)


def test_another_thread_draws_the_same_while_flows_are_loaded(path):
    """Also from numpy, and with a mixture, whose constructor draws."""

    def draw():
        while not done.is_set():
            drawn.append(torch.rand(()).item())

    for name in ("gmm", "maf"):
        save(build(name, 2, size=4), path)
        torch.manual_seed(1)
        drawn, done = [], threading.Event()
        thread = threading.Thread(target=draw)
        thread.start()
        for _ in range(4):
            load(path)
        done.set()
        thread.join()
        torch.manual_seed(1)
        assert drawn == [torch.rand(()).item() for _ in drawn]


def test_a_flow_loads_under_any_default_device_or_mode(path):
    flow = cnf()
    save(flow, path)
    with torch.device("meta"):
        loaded = load(path)
    assert torch.equal(loaded.log_prob(torch.ones(2)), flow.log_prob(torch.ones(2)))


@pytest.fixture
def model(tmp_path):
    """The folder of a model of two columns, one of them of text beyond ASCII."""
    columns = Columns(names=("größe",), context_names=("jahr",))
    model = TableModel(flow=CNF(1, 1, **SMALL), columns=columns, notes={"rows": 12345.678})
    model.save(tmp_path / "model", History())
    return tmp_path / "model"


def test_no_model_with_a_flipped_bit_in_its_description_loads(model):
    file = model / "model.json"
    content = file.read_bytes()
    for damaged in flips(content, 300):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.json' (is damaged|has format)"):
            TableModel.load(model)
    file.write_bytes(content)
    TableModel.load(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("12345.678", "12345.679"),
        lambda text: text.replace("größe", "groesse"),
        lambda text: text.replace('"version": "', '"version": "9'),
        lambda text: text + "\n",
        lambda text: "[]",
    ],
    ids=["note", "name", "version", "longer", "list"],
)
def test_a_changed_description_of_a_model_is_damaged(change, model):
    file = model / "model.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=r"model\.json' is damaged.*Restore it"):
        TableModel.load(model)


def test_the_flow_of_another_model_is_told_apart(model):
    save(CNF(1, 1, **SMALL), model / "model.safetensors")
    with pytest.raises(ValueError, match=r"or of another model than .* in the same"):
        TableModel.load(model)


def affine_run(folder, *, resume=False, data=None, validation=X, flow=None, **settings):
    """A run of six steps in two phases, and what the flow ends with."""
    phases = [
        TrainingConfig(steps=3, progress=False, batch_size=5, ema=0.9, seed=2),
        TrainingConfig(steps=3, progress=False, batch_size=5),
    ]
    flow = Flow([Affine(2)]) if flow is None else flow
    checkpoints = Checkpoints(**{"folder": folder, "every": 4, "keep": 2, **settings})
    x = X if data is None else data
    fit(flow, x, phases, validation=validation, checkpoints=checkpoints, resume=resume)
    return flow.state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def the_only_checkpoint(folder):
    """The one in the midst of the second phase; the other is removed."""
    newest, middle = checkpoints_in(folder)
    newest.unlink()
    return middle


def test_no_checkpoint_with_a_flipped_bit_is_read(tmp_path, monkeypatch):
    affine_run(tmp_path)
    file = the_only_checkpoint(tmp_path)
    content = file.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", None)  # unpickles
        for damaged in flips(content, 300):
            file.write_bytes(damaged)
            with (
                pytest.warns(UserWarning, match=rf"{file.name}' is damaged"),
                pytest.raises(ValueError, match=rf"every checkpoint .* is damaged: {file.name}"),
            ):
                read_newest_checkpoint(tmp_path)
    file.write_bytes(content)
    assert read_newest_checkpoint(tmp_path)[0] == file


def test_a_checkpoint_from_before_there_was_a_digest_resumes(tmp_path):
    final = affine_run(tmp_path)
    file = the_only_checkpoint(tmp_path)
    torch.save(torch.load(file), file)
    assert same(affine_run(tmp_path, resume=True), final)


def replaced(*path, by):
    """A change of a state: another value at a path of keys, or none if it is `...`."""

    def change(state):
        *way, last = path
        for key in way:
            state = state[key]
        if by is ...:
            del state[last]
        else:
            state[last] = by

    return change


def expanded(state):
    state["history"]["loss"] = torch.zeros(()).expand(10**12)


CRAFTED = {
    **{
        f"no {name}": replaced(name, by=...)
        for name in (
            *("history", "finished_phases", "best", "best_nll"),
            *("stopped", "objective", "phase"),
        )
    },
    **{
        f"no {name} of the phase": replaced("phase", name, by=...)
        for name in ("step", "stale_validations", "good", "optimizer", "averaged")
    },
    "history of one column": replaced("history", by={"loss": torch.zeros(4)}),
    "history of text": replaced("history", by="nothing"),
    "unequal columns": replaced("history", "loss", by=torch.zeros(3)),
    "column of another dtype": replaced("history", "step", by=torch.zeros(4)),
    "endless column": expanded,
    "phases of text": replaced("finished_phases", by="1"),
    "phases beyond": replaced("finished_phases", by=7),
    "phases below": replaced("finished_phases", by=-1),
    "phase beyond": replaced("finished_phases", by=2),
    "best of another shape": replaced("best", "transforms.0.loc", by=torch.zeros(3)),
    "best of another dtype": replaced("best", "transforms.0.loc", by=torch.zeros(2).float()),
    "best of numbers": replaced("best", by=[1.0]),
    "best of NaN": replaced("best_nll", by=math.nan),
    "stopped of text": replaced("stopped", by="no"),
    "objective of another shape": replaced("objective", "flow.transforms.0.loc", by=torch.zeros(1)),
    "objective with more": replaced("objective", "more", by=torch.zeros(1)),
    "step of text": replaced("phase", "step", by="1"),
    "step beyond": replaced("phase", "step", by=10**9),
    "step below": replaced("phase", "step", by=-1),
    "good of another shape": replaced("phase", "good", "flow.transforms.0.loc", by=torch.zeros(1)),
    "no moments": replaced("phase", "optimizer", "state", by=...),
    "moments of another shape": replaced(
        "phase", "optimizer", "state", 0, "exp_avg", by=torch.zeros(5)
    ),
    "moment of no parameter": replaced("phase", "optimizer", "state", 9, by={}),
    "no groups": replaced("phase", "optimizer", "param_groups", by=[]),
    "group of text": replaced("phase", "optimizer", "param_groups", 0, "betas", by="no"),
}


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_checkpoint_is_refused_by_name_and_changes_nothing(change, tmp_path):
    affine_run(tmp_path)
    file = the_only_checkpoint(tmp_path)
    state = torch.load(file)
    change(state)
    write_checkpoint(tmp_path, 4, {k: v for k, v in state.items() if k != "format"}, keep=1)

    flow = Flow([Affine(2)])
    with pytest.raises(ValueError, match=rf"{file.name}' holds no state of this run \(.*Restore"):
        affine_run(tmp_path, resume=True, flow=flow)
    assert same(flow.state_dict(), Flow([Affine(2)]).state_dict())


@pytest.mark.parametrize("told", [None, 3, {"data": 3}, ["data"]], ids=str)
def test_a_checkpoint_that_does_not_say_of_which_run_it_is_counts_as_damaged(told, tmp_path):
    affine_run(tmp_path)
    file = the_only_checkpoint(tmp_path)
    state = {k: v for k, v in torch.load(file).items() if k not in ("format", "fingerprint")}
    write_checkpoint(tmp_path, 4, state if told is None else {**state, "fingerprint": told}, keep=1)
    with (
        pytest.warns(UserWarning, match="is damaged .it has no fingerprint of a run"),
        pytest.raises(ValueError, match=file.name),
    ):
        affine_run(tmp_path, resume=True)


def test_a_checkpoint_that_would_be_unpacked_is_refused(tmp_path):
    with zipfile.ZipFile(
        tmp_path / "checkpoint_000000001.pt", "w", zipfile.ZIP_DEFLATED
    ) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    with (
        pytest.warns(UserWarning, match="it is compressed, which no checkpoint is"),
        pytest.raises(ValueError, match="is damaged"),
    ):
        read_newest_checkpoint(tmp_path)


def npy(shape, numbers):
    """An .npy file whose header states any shape, before so many numbers."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    size = len(text).to_bytes(2, "little")
    return b"\x93NUMPY\x01\x00" + size + text.encode() + np.ones(numbers).tobytes()


SHAPES = ["(10**9, 2)", "(100000000000, 2)", f"({10**30}, 2)", f"({2**63 - 1}, 2)", "(-1, 2)"]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_array_whose_header_lies_is_refused_before_memory_is_taken(shape, tmp_path):
    content = npy(shape, 4)
    (tmp_path / "x.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", content)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(ValueError, match=rf"{name} must be a NumPy file .*damaged"):
            read_table(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"x\.npy' is not a \.npy file of numbers, or is cut short"
    ):
        NpyRows(tmp_path / "x.npy")


def test_an_array_of_no_rows_and_endless_columns_is_refused(tmp_path):
    (tmp_path / "x.npy").write_bytes(npy("(0, 1000000000000)", 0))
    with pytest.raises(ValueError, match=r"must have rows and columns; got the shape \(0, 1000"):
        read_table(tmp_path / "x.npy")


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused_at_once(tmp_path):
    file = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy("(50000000, 1)", 0))
        for _ in range(400):
            member.write(bytes(10**6))
    assert file.stat().st_size < 2e6
    with pytest.raises(ValueError, match=r"bomb\.npz states that its .* bytes unpack to 400,0"):
        read_table(file)
    np.savez_compressed(file, **{f"x{i}": np.zeros((100, 1)) for i in range(5)}, y=np.ones((9, 2)))
    assert read_table(file, array="y").values.shape == (9, 2)


def test_a_table_of_parquet_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    file = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table({"x": pyarrow.nulls(40_000_000, pyarrow.int8())}), file)
    with pytest.raises(ValueError, match=r"bomb\.parquet states that its .* bytes unpack to"):
        read_table(file)


def datasets(folder, rows):
    """The same rows, and a change of one number far from every thousandth, in all forms."""
    x = torch.linspace(-1, 2, 2 * rows).reshape(rows, 2).square()
    weight = torch.linspace(1, 2, rows)
    x_of_files, weight_of_files = folder / "x.npy", folder / "weight.npy"

    def on_disk():
        np.save(x_of_files, x.numpy())
        np.save(weight_of_files, weight.numpy())
        return StackDataset(x=NpyRows(x_of_files), weight=NpyRows(weight_of_files))

    return {
        "tensor": (x, lambda: x),
        "weight": (weight, lambda: {"x": x, "weight": weight}),
        "file": (x, lambda: (on_disk(), NpyRows(x_of_files))[1]),
        "x of files": (x, on_disk),
        "weight of files": (weight, on_disk),
        "dataset": (x, lambda: TensorDataset(x)),
    }


@pytest.mark.parametrize("rows", [900, 2500])
@pytest.mark.parametrize(
    "form", ["tensor", "weight", "file", "x of files", "weight of files", "dataset"]
)
def test_data_that_differ_in_one_number_are_other_data(form, rows, tmp_path):
    changed, make = datasets(tmp_path, rows)[form]
    affine_run(tmp_path / "run", data=make(), validation=None)
    final = affine_run(tmp_path / "run", data=make(), validation=None, resume=True)
    assert same(affine_run(tmp_path / "other", data=make(), validation=None), final)
    for place in (1, rows - 2, rows // 2 + 1):
        before = changed[place].clone()
        changed[place] += 1e-9
        with pytest.raises(ValueError, match=rf"data: {rows} rows .*hash .* there, {rows} rows"):
            affine_run(tmp_path / "run", data=make(), validation=None, resume=True)
        changed[place] = before


def test_validation_data_are_compared_whole(tmp_path):
    held_out = torch.linspace(-1, 2, 5000).reshape(2500, 2)
    affine_run(tmp_path, validation=held_out)
    held_out[1777] += 1e-9
    with pytest.raises(ValueError, match=r"validation: 2500 rows .* of all"):
        affine_run(tmp_path, validation=held_out, resume=True)


def test_a_run_of_few_rows_resumes_from_the_fingerprint_of_older_versions(tmp_path):
    """They hashed a thousand rows, evenly from first to last."""
    data = torch.linspace(-1, 2, 80).reshape(40, 2).square()
    affine_run(tmp_path, data=data, validation=None)
    old = f"40 rows with the hash {hashlib.sha256(data.numpy().tobytes()).hexdigest()[:8]}"
    file = the_only_checkpoint(tmp_path)
    assert torch.load(file)["fingerprint"]["data"] == old


def test_arrays_with_flipped_bits_give_tables_or_a_message(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 2))
    np.save(tmp_path / "x.npy", values)
    np.savez_compressed(tmp_path / "x.npz", x=values)
    for file in (tmp_path / "x.npy", tmp_path / "x.npz"):
        for damaged in flips(file.read_bytes(), 600):
            file.write_bytes(damaged)
            with contextlib.suppress(ValueError):  # which names the file
                read_table(file)
