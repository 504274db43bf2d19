"""Laws of saving: a file gives back the same flow, or a message; and it is never half a file."""

import copy
import errno
import inspect
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributions import ExpTransform
from zoo import COARSE, EVERY_FLOW, perturbed, rows_for

from cnf import (
    CNF,
    Checkpoints,
    Exact,
    Flow,
    History,
    Hutchinson,
    MLPField,
    ModuleField,
    ODESolver,
    Standardize,
)
from cnf._files import BLANK_DIGEST, seal
from cnf.adapters import FromTorch
from cnf.adapters.wrapped_transform import WrappedTransform
from cnf.bases import StandardNormal
from cnf.data.memmap import NpyRows
from cnf.data.table_files import read_table, write_table
from cnf.data.uci import benchmark_table
from cnf.saving import load, save
from cnf.saving.description import describe, own_classes, rebuild
from cnf.saving.flow_files import FORMAT_VERSION
from cnf.tables.model import Columns, TableModel
from cnf.training import TrainingConfig, fit
from cnf.transforms import Affine, ContinuousTransform, Transform
from cnf.vector_fields import LinearField
from cnf.vector_fields.activations import ACTIVATIONS
from cnf.vector_fields.layers import LAYERS

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

OPTIONS = {
    "defaults": {},
    **{f"layer {layer}": {"layer": layer} for layer in LAYERS},
    **{f"activation {name}": {"activation": name} for name in ACTIVATIONS},
    "one hidden layer": {"hidden_features": (5,), "activation": "tanh"},
    "three hidden layers": {"hidden_features": (5, 6, 7), "activation": ("sin", "silu", "tanh")},
    "frequency": {"frequency": 0.7},
    "two blocks": {"blocks": 2},
    "exact": {"divergence": Exact()},
    "hutchinson": {"divergence": Hutchinson(noise="gaussian", probes=3)},
    "tolerances": {"solver": ODESolver(rtol=1e-4, atol=1e-3, max_evaluations=500)},
    "fixed steps": {"solver": ODESolver(method="rk4", steps=7, gradient="backprop")},
    "checkpoint": {"solver": ODESolver(gradient="checkpoint", error_norm="points", first_step=0.1)},
    "base": {"base": StandardNormal(2).double()},
    "context": {"context_features": 3},
    "transforms": {"transforms": [Standardize(2).double(), Affine(2).double()]},
}
"""Every argument of `CNF`, one at a time."""

CLASSES = [zoo.UserNetwork]

SAVABLE = {
    **EVERY_FLOW,
    **{
        f"CNF: {name}": lambda settings=settings: perturbed(
            CNF(2, **{"hidden_features": (6, 5), **copy.deepcopy(settings)})
        )
        for name, settings in OPTIONS.items()
    },
    "linear with context": lambda: Flow(
        [perturbed(Affine(2)), ContinuousTransform(perturbed(LinearField(2, 3)))]
    ),
    "no ODE": lambda: Flow([perturbed(Affine(4))]),
    "conformal embedding": lambda: Flow([zoo.conformal_embedding()]),
    "autoencoder coupling": lambda: Flow([zoo.autoencoder()]),
}


def small_cnf():
    return perturbed(CNF(2, hidden_features=(6, 5)), 0.1)


def log_prob(flow, x, context):
    """With the same probes at each call, and of points on the surface, if there is one."""
    if flow.likelihood == "on_manifold":
        x = flow.to_data(flow.to_base(x, context), context)
    return flow.log_prob(x, context, generator=torch.Generator().manual_seed(1))


def settings(flow):
    """Class and public settings of every part; what follows from its parts is not a setting."""
    left_out = {"training", "support", "codomain"}
    return [
        (
            name,
            type(part),
            {k: v for k, v in vars(part).items() if not k.startswith("_") and k not in left_out},
        )
        for name, part in flow.named_modules()
    ]


def global_randomness():
    """Of torch and numpy; that of Python is drawn upon by beartype while tests run."""
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), kind, keys.tolist(), rest


def description_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["cnf"])


def rewrite(path, *, description=None, tensors=None):
    """Put other JSON, given as an object or as text, or other tensors into the file.

    The digest is then that of the new content: whoever can write files can write digests.
    """
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["cnf"]
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description = json.loads(text) if description is None else description
    if not isinstance(description, str):
        if isinstance(description, dict) and "sha256" in description:
            description = {**description, "sha256": BLANK_DIGEST}
        description = json.dumps(description)
    save_file(old if tensors is None else tensors(old), path, metadata={"cnf": description})
    path.write_bytes(seal(path.read_bytes()))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


@pytest.fixture
def saved(path):
    """The path of a file that holds `small_cnf()`."""
    save(small_cnf(), path)
    return path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("make", SAVABLE.values(), ids=SAVABLE)
def test_load_undoes_save_bit_for_bit(make, dtype, path):
    flow = make().to(dtype)
    x, context = rows_for(flow, 3)
    x, context = x.to(dtype), None if context is None else context.to(dtype)

    save(flow, path)
    loaded = load(path, classes=CLASSES)

    assert type(loaded) is type(flow)
    assert settings(loaded) == settings(flow)
    for name, value in flow.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    loaded, flow = (each.using(solver=COARSE) for each in (loaded, flow))
    assert torch.equal(log_prob(loaded, x, context), log_prob(flow, x, context))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_dtype_of_a_loaded_flow_is_the_saved_one_whatever_the_default(dtype, path):
    flow = small_cnf().to(dtype)
    save(flow, path)
    torch.set_default_dtype(torch.float32)

    loaded = load(path)

    x = torch.ones(2, dtype=dtype)
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
    assert loaded.sample(generator=torch.Generator().manual_seed(0)).dtype == dtype


def test_a_file_of_an_old_version_gives_the_numbers_that_it_gave():
    stored = Path(__file__).parents[1] / "stored" / "flow_before_context_scaling.safetensors"
    with pytest.warns(UserWarning, match="wrote no digest"):
        flow = load(stored)
    x, context = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([[0.5], [-2.0]])
    expected = torch.tensor([-12.823086739, -84.372604370])  # printed by that version
    found = flow.log_prob(x.float(), context.float())
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)
    assert not any(part.needs_initialization for part in flow.chain)


def test_a_file_with_settings_of_older_names_gives_the_numbers_that_it_gave():
    flow = load(
        Path(__file__).parents[1] / "stored" / "flow_with_settings_of_old_names.safetensors"
    )
    x, context = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([[0.5], [-2.0]])
    expected = torch.tensor([-2.314725399, -3.067035198])  # printed by that version, c3fd381
    found = flow.log_prob(x.float(), context.float())
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)
    coupling, continuous = flow.chain  # which were saved as `kept` and `control`
    assert coupling.mask == "last"
    assert continuous.solver.error_norm == "points"


def test_a_file_from_before_a_setting_of_the_solver_loads_with_its_default_of_then(saved):
    description = description_of(saved)
    for name in ("error_norm", "first_step"):
        del description["flow"]["transforms"][-1]["solver"][name]
    then = ODESolver(error_norm="points_and_ladj")
    expected = load(saved).using(solver=then).log_prob(torch.ones(2))
    rewrite(saved, description=description)

    loaded = load(saved)

    assert loaded.chain[-1].solver == then
    assert torch.equal(loaded.log_prob(torch.ones(2)), expected)


def test_a_file_with_the_default_solver_of_before_keeps_it_until_fit_calibrates(path):
    before = ODESolver(rtol=1e-5, atol=1e-5, error_norm="points_and_ladj", gradient="adjoint")
    save(small_cnf().using(solver=before), path)
    loaded = load(path)
    assert loaded.only_ode.solver == before

    fit(loaded, torch.randn(50, 2), TrainingConfig(steps=2, progress=False), validation=None)

    assert loaded.accuracy == 1e-3
    assert loaded.only_ode.solver.gradient == "adjoint"


def test_a_loaded_flow_trains_on_as_the_saved_one_would(path):
    flow = small_cnf()
    save(flow, path)
    loaded = load(path)
    x = torch.randn(20, 2)
    config = TrainingConfig(steps=3, batch_size=10, progress=False)

    history, history_loaded = fit(flow, x, config), fit(loaded, x, config)

    assert history_loaded.loss == history.loss
    for weight, weight_loaded in zip(flow.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(weight_loaded, weight)


def test_a_loaded_flow_shares_nothing_with_the_saved_one(saved):
    first, second = load(saved), load(saved)
    before = second.log_prob(torch.ones(2))
    perturbed(first)
    assert torch.equal(second.log_prob(torch.ones(2)), before)


def test_tensors_of_any_strides_and_sign_bit_are_saved_as_they_read(path):
    scaled = Standardize(3)
    scaled.mean = torch._neg_view(torch.randn(3))
    scaled.log_std = torch.randn(6)[::2]
    flow, x = Flow([scaled]), torch.randn(4, 3)
    assert scaled.mean.is_neg()
    save(flow, path)
    assert torch.equal(load(path).log_prob(x), flow.log_prob(x))


def test_saving_twice_gives_the_same_bytes(tmp_path):
    flow = small_cnf()
    save(flow, tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.slow
def test_the_file_alone_suffices(path):
    flow = small_cnf()
    x = torch.randn(3, 2)
    save(flow, str(path))
    code = f"""
import torch
from cnf.saving import load
print(load({str(path)!r}).log_prob(torch.tensor({x.tolist()}, dtype=torch.float64)).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == flow.log_prob(x).tolist()


def test_saving_and_loading_draw_no_random_number(path):
    flow = small_cnf()
    before = global_randomness()
    save(flow, path)
    load(path)
    assert global_randomness() == before


CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("as_string", [True, False])
def test_a_flow_is_loaded_on_the_device_asked_for(device, as_string, saved):
    flow = load(saved, device=device if as_string else torch.device(device))
    assert {tensor.device.type for tensor in (*flow.parameters(), *flow.buffers())} == {device}


def test_the_file_is_safetensors_and_json_and_holds_no_pickle(saved):
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    description = json.loads(header["__metadata__"]["cnf"])

    assert description["format"] == FORMAT_VERSION
    assert description["flow"]["class"] == "CNF"
    assert len(content) == 8 + length + sum(
        value.nbytes for value in load(saved).state_dict().values()
    )


def test_a_saved_file_has_the_permissions_of_any_new_file(saved, tmp_path):
    (tmp_path / "other").write_bytes(b"")
    assert saved.stat().st_mode == (tmp_path / "other").stat().st_mode


class UserFlow(CNF):
    """A subclass, which a file could not rebuild."""


class UserTransform(Affine):
    """A transform of the user's own."""


class UserBase(StandardNormal):
    """A base of the user's own."""


class UserDivergence(Exact):
    """A divergence of the user's own."""


class UserField(LinearField):
    """A vector field of the user's own, with settings of every kind and a buffer of its own."""

    def __init__(self, features, *, scale=1.0, names=(), part=None):
        super().__init__(features)
        self.scale, self.names, self.part = scale, names, part
        self.register_buffer("weights", torch.full((3,), scale), persistent=False)

    def _velocity(self, t, x, context):
        return super()._velocity(t, x, context) * self.weights[0]

    def _velocity_and_divergence(self, t, x, context):
        velocity, divergence = super()._velocity_and_divergence(t, x, context)
        return velocity, self.weights[0] * divergence


class UserNetwork(nn.Module):
    """A network of the user's own."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, t, x):
        return self.layers(x)


def users_flow():
    field = UserField(2, scale=0.5, names=["a", "b"], part=UserNetwork(3))
    module = ModuleField(UserNetwork(4), 2)
    parts = [
        ContinuousTransform(part, divergence=UserDivergence(), solver=COARSE)
        for part in (field, module)
    ]
    return perturbed(Flow([UserTransform(2), *parts], UserBase(2)))


USERS = [UserBase, UserDivergence, UserField, UserNetwork, UserTransform]


def test_parts_of_the_users_own_are_loaded_where_their_classes_are_given(path):
    flow, x = users_flow(), torch.randn(3, 2)
    save(flow, path)
    loaded = load(path, classes=USERS)
    assert [type(part) for part in loaded.modules()] == [type(part) for part in flow.modules()]
    assert loaded.chain[1].vector_field.names == ["a", "b"]
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("missing", USERS)
def test_a_class_that_is_not_given_is_named(missing, path):
    save(users_flow(), path)
    with pytest.raises(ValueError, match=rf"names the class '{missing.__name__}', .*\n?.*classes="):
        load(path, classes=[cls for cls in USERS if cls is not missing])


Impostor = type("MLPField", (MLPField,), {})
Twin = type("UserBase", (StandardNormal,), {})


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([Impostor], ValueError, "got MLPField, and cnf has a class MLPField. Rename yours"),
        ([UserBase, Twin], ValueError, "classes must differ in name; got UserBase twice"),
        ([dict], TypeError, "got dict"),
        ([UserFlow], TypeError, "got UserFlow"),
        (["UserBase"], TypeError, "classes must hold classes; got 'UserBase'"),
        (UserBase, TypeError, r"classes must be a list of classes, such as \[Mine\]"),
        (None, TypeError, "classes must be a list"),
    ],
)
def test_classes_that_no_part_can_have_are_refused(classes, error, message, saved):
    with pytest.raises(error, match=message):
        load(saved, classes=classes)
    load(saved, classes=[UserBase, UserBase, MLPField])


class Forgetful(Affine):
    def __init__(self, features, width):
        super().__init__(features)


class Unnamed(Affine):
    def __init__(self, *features):
        super().__init__(*features)


def with_scale(scale):
    return Flow([ContinuousTransform(UserField(2, scale=1.0, part=scale))])


UNSAVABLE = {
    "UserFlow": (lambda: UserFlow(2), "got UserFlow"),
    "MLPField": (lambda: Flow([ContinuousTransform(Impostor(2))]), "Rename yours"),
    "attribute": (
        lambda: Flow([Forgetful(2, 7)]),
        r"Forgetful has no attribute 'width'.*Set self\.width = width.*Save flow\.state_dict\(\)",
    ),
    "no name": (lambda: Flow([Unnamed(2)]), r"Unnamed takes settings without a name \(\*features"),
    "torch's": (
        lambda: Flow([ContinuousTransform(ModuleField(nn.Sequential(UserNetwork(2)), 2))]),
        r"Sequential takes settings without a name \(\*args\).*Wrap it in a class",
    ),
    "tensor": (
        lambda: with_scale(torch.ones(2)),
        "the setting 'part' of UserField cannot be saved: .*got Tensor. Save flow",
    ),
    "function": (lambda: with_scale(print), "the setting 'part' .*got builtin_function"),
    "mapping": (lambda: with_scale({"class": "CNF"}), "the setting 'part' .*got dict"),
    "foreign": (
        lambda: Flow([FromTorch(ExpTransform(), 2)]),
        "the setting 'transform' of FromTorch cannot be saved",
    ),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_cannot_be_described_is_refused_with_a_remedy_and_leaves_the_old_file(name, saved):
    make, message = UNSAVABLE[name]
    before = saved.read_bytes()

    with pytest.raises((TypeError, ValueError), match=message):
        save(make(), saved)

    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (io.BytesIO(), TypeError, "path must be a str or a pathlib.Path; got BytesIO"),
        (None, TypeError, "got NoneType"),
        (3, TypeError, "got int"),
        (b"name", TypeError, "got bytes"),
        ("", ValueError, "path must be a name that a file can have; got ''"),
        ("a\0b", ValueError, "path must be a name that a file can have"),
        (".", ValueError, "'.' is a folder. Name a file in it"),
        ("/dev/null", ValueError, "must be an ordinary file"),
    ],
    ids=["buffer", "none", "int", "bytes", "empty", "NUL", "folder", "device"],
)
@pytest.mark.parametrize("door", ["save", "load"])
def test_what_is_no_path_of_a_file_is_refused(door, path, error, message):
    if door == "load" and path == "/dev/null":
        error, message = FileNotFoundError, "there is no file .*Check the path"
    with pytest.raises(error, match=message):
        save(small_cnf(), path) if door == "save" else load(path)


@pytest.mark.parametrize(
    ("device", "error"),
    [
        ("warp", ValueError),
        ("meta", ValueError),
        (torch.device("meta"), ValueError),
        ("cpu:x", ValueError),
        pytest.param(
            "cuda",
            ValueError,
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU"),
        ),
        (7, TypeError),
        (None, TypeError),
    ],
    ids=str,
)
def test_what_is_no_device_is_refused(device, error, saved):
    with pytest.raises(error, match="device must be "):
        load(saved, device=device)


@pytest.mark.usefixtures("shapes_unchecked")
def test_only_flows_are_saved(path):
    with pytest.raises(TypeError, match=r"flow must be a cnf\.Flow; got Linear"):
        save(nn.Linear(2, 2), path)
    assert not path.exists()


@pytest.mark.parametrize("shared", ["transform", "vector field"])
def test_shared_tensors_are_refused_because_a_file_cannot_keep_them_shared(shared, path):
    first = ContinuousTransform(LinearField(2))
    second = first if shared == "transform" else ContinuousTransform(first.vector_field)

    with pytest.raises(ValueError, match="flow must not share tensors between its parts"):
        save(Flow([first, second]), path)

    assert not path.exists()


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save(small_cnf(), tmp_path / "nowhere" / "flow.safetensors")


def fail(*_):
    raise OSError("crash")


@pytest.mark.parametrize("where", [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"])
@pytest.mark.parametrize("exists", [True, False], ids=["old file", "no file"])
def test_a_crash_while_writing_leaves_what_was_there_and_nothing_else(
    where, exists, path, monkeypatch
):
    if exists:
        path.write_bytes(b"old")
    before = list(path.parent.iterdir())
    monkeypatch.setattr(*where, fail)

    with pytest.raises(OSError, match="crash"):
        save(small_cnf(), path)

    assert list(path.parent.iterdir()) == before
    if exists:
        assert path.read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path):
    path.write_bytes(b"old")
    flow = small_cnf()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large.*{re.escape(repr(str(path)))}"):
            save(flow, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "to nothing"])
def test_a_link_stays_a_link_and_the_file_that_it_points_at_is_written(exists, path, tmp_path):
    target = tmp_path / "elsewhere" / "real"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"old")
    path.symlink_to(target)
    flow = small_cnf()

    save(flow, path)

    assert path.readlink() == target
    assert list(target.parent.iterdir()) == [target]
    for place in (path, target):
        assert torch.equal(load(place).log_prob(torch.ones(2)), flow.log_prob(torch.ones(2)))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save(small_cnf(), path),
        lambda path: write_table(path.with_suffix(".csv"), [[1.0]]),
        lambda path: History().save(path),
        lambda path: TableModel(flow=CNF(1), columns=Columns(names=("a",))).save(path, History()),
    ],
    ids=["flow", "table", "history", "model"],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_an_error_of_the_disk_names_what_was_to_be_written(write, number, path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), "/some/temporary/file")

    for where, name in [(os, "fsync"), (Path, "rename")]:
        monkeypatch.setattr(where, name, refuse)
    with pytest.raises(OSError, match=re.escape(str(path.with_suffix("")))) as caught:
        write(path)
    assert caught.value.errno == number
    assert type(caught.value) is type(OSError(number, ""))
    assert "temporary" not in str(caught.value)
    assert list(path.parent.iterdir()) == []


def refused(path, *words):
    """The message of `load`, which names the path, holds the words and offers a remedy."""
    before = global_randomness()
    with pytest.raises(ValueError, match=re.escape(repr(str(path)))) as caught:
        load(path)
    message = str(caught.value)
    for word in (*words, r"Restore it|Upgrade|Build the flow|pass it"):
        assert re.search(word, message), message
    assert global_randomness() == before


@pytest.mark.parametrize("part", [0, 1, 7, 8, 9, 100, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused(part, saved):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    refused(saved, "is not a safetensors file, or is cut short")


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_are_refused(seed, path):
    path.write_bytes(np.random.default_rng(seed).bytes(500))
    refused(path, "is not a safetensors file")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=str)
def test_safetensors_of_another_library_are_refused(metadata, path):
    save_file(small_cnf().state_dict(), path, metadata=metadata)
    refused(path, r"was not written by cnf\.save", "load_state_dict")


GARBLED = {
    "empty": "",
    "cut short": '{"format": 1, "flow": {"cl',
    "deep": "[" * 100_000,
    "list": [],
    "null": "null",
    "number": 3,
    "no format": {"flow": {}},
    "format of text": {"format": "one", "flow": {}},
    "format null": {"format": None},
}


@pytest.mark.parametrize("description", GARBLED.values(), ids=GARBLED)
def test_a_garbled_description_is_refused(description, saved):
    rewrite(saved, description=description)
    refused(saved, "garbled description")


NO_FLOWS = {
    "nothing": (None, "NoneType"),
    "text": ("CNF", "str"),
    "list": ([], "list"),
    "solver": ({"class": "ODESolver"}, "ODESolver"),
    "transform": ({"class": "Affine", "features": 2}, "Affine"),
    "no class": ({}, "class"),
    "class of a list": ({"class": []}, "unhashable"),
    "no base": ({"class": "Flow", "transforms": []}, "base"),
    "base of the wrong kind": (
        {"class": "Flow", "transforms": [], "base": {"class": "Exact"}},
        "base must be",
    ),
    "transforms of the wrong kind": ({"class": "Flow", "transforms": 3, "base": None}, "int"),
}


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("flow", "word"), NO_FLOWS.values(), ids=NO_FLOWS)
def test_a_description_of_no_flow_is_refused(flow, word, saved):
    rewrite(saved, description={**description_of(saved), "flow": flow})
    refused(saved, "does not describe a flow of this version", word)


WRONG_SETTINGS = {
    "features": (-1, "features must be at least 1"),
    "hidden_features": ([6, -5], "hidden_features must be at least 1"),
    "layer": ("round", "layer must be one of"),
    "surprise": (1, "surprise"),
    "context_features": (10**30, "context_features|size|overflow|Overflow"),
}


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("key", WRONG_SETTINGS)
def test_a_setting_out_of_range_is_refused(key, saved):
    value, word = WRONG_SETTINGS[key]
    description = description_of(saved)
    description["flow"]["transforms"][-1]["vector_field"][key] = value
    rewrite(saved, description=description)
    refused(saved, "does not describe a flow of this version", word)


def without_one(tensors):
    return {name: value for name, value in tensors.items() if not name.endswith("weight")}


def with_another(tensors):
    return {**tensors, "surprise": torch.zeros(2)}


def with_another_axis(tensors):
    return {name: value.reshape(1, *value.shape) for name, value in tensors.items()}


def of_integers(tensors):
    return {name: value.long() for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (without_one, "Missing key"),
        (with_another, "surprise"),
        (with_another_axis, "size mismatch"),
        (of_integers, "torch.int64, not torch.bool"),
    ],
)
def test_tensors_that_do_not_fit_the_description_are_refused(change, word, saved):
    rewrite(saved, tensors=change)
    refused(saved, "does not describe a flow of this version", word)


def test_a_newer_format_is_refused(saved):
    rewrite(saved, description={**description_of(saved), "format": FORMAT_VERSION + 1})
    refused(saved, f"has format {FORMAT_VERSION + 1}, newer", "Upgrade")


FOREIGN = ["os.mkdir", "mkdir", "Path", "builtins.eval", "Linear", "UserTransform", "UserFlow"]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("place", ["flow", "transform"])
def test_no_class_from_outside_the_registry_is_built(name, place, saved, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    foreign = {"class": name, "path": str(canary), "features": 2}
    flow = {"class": "Flow", "transforms": [foreign], "base": None}
    description = {**description_of(saved), "flow": foreign if place == "flow" else flow}
    rewrite(saved, description=description)

    refused(saved, re.escape(f"it names the class {name!r}"), re.escape(f"classes=[{name}]"))

    assert not canary.exists()


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=re.escape(repr(str(path))) + ".*Check the path"):
        load(path)


def test_every_concrete_transform_of_the_package_can_be_saved(path):
    kinds = {
        kind
        for parent in (Transform, *Transform.__subclasses__())
        for kind in parent.__subclasses__()
        if kind.__module__.startswith("cnf.")
        and not inspect.isabstract(kind)
        and not issubclass(kind, WrappedTransform)  # around what the user made
    }
    saved = {type(part) for make in SAVABLE.values() for part in make().modules()}
    assert kinds <= saved


def test_a_flow_of_several_dtypes_is_refused(path):
    flow = small_cnf()
    mixed = Flow([Affine(2), *flow.chain])
    flow.chain[-1].vector_field.float()
    with pytest.raises(ValueError, match=r"must have one dtype; got .*float32.*float64"):
        save(mixed, path)
    assert not path.exists()


NUMBERS = {
    "numpy": lambda value: np.asarray(value)[()],
    "single precision": lambda value: {float: np.float32, int: np.int32}.get(
        type(value), lambda value: np.asarray(value)[()]
    )(value),
    "array": np.asarray,
    "tensor": lambda value: value if isinstance(value, str) else torch.tensor(value),
}


def parts_in(description):
    """Class and settings of all parts but flows."""
    if isinstance(description, list):
        for item in description:
            yield from parts_in(item)
    elif isinstance(description, dict):
        settings = {key: value for key, value in description.items() if key != "class"}
        yield from parts_in(list(settings.values()))
        if description["class"] not in ("CNF", "Flow"):
            yield description["class"], settings


def every_setting():
    """Each setting of each class that is saved, with values that it has in the zoo."""
    found = {}
    for make in SAVABLE.values():
        for name, settings in parts_in(describe(make())):
            for key, value in settings.items():
                plain = value if isinstance(value, list) else [value]
                if not any(item is None or isinstance(item, dict) for item in plain):
                    found.setdefault((name, key), settings)
    return found


def with_numbers(value, change):
    if isinstance(value, list):
        return [with_numbers(item, change) for item in value]
    return change(value)


@pytest.mark.parametrize("change", NUMBERS.values(), ids=NUMBERS)
def test_settings_are_saved_as_pythons_numbers_whatever_they_came_as(change):
    """Or refused when the part is built."""
    kept = 0
    own = {"UserNetwork": zoo.UserNetwork}
    for (name, key), settings in every_setting().items():
        plain = {other: rebuild(value, own, int) for other, value in settings.items()}
        cls = own.get(name) or own_classes()[name]
        try:
            part = cls(**{**plain, key: with_numbers(settings[key], change)})
        except (TypeError, ValueError):
            continue
        kept += 1
        again = json.loads(json.dumps(describe(part)[key]))
        if change is not NUMBERS["single precision"]:
            assert again == settings[key], (name, key)
    # Names and flags are refused in arrays and tensors; numbers are taken from them.
    assert kept > (60 if change is NUMBERS["numpy"] else 10)


DOORS = {
    "save": lambda path: save(small_cnf(), path),
    "load": load,
    "History.save": History().save,
    "History.load": History.load,
    "read_table": read_table,
    "write_table": lambda path: write_table(path, [[1.0]]),
    "NpyRows": NpyRows,
    "benchmark_table": lambda path: benchmark_table("power", path),
    "Checkpoints": lambda path: Checkpoints(folder=path),
    "TableModel.load": TableModel.load,
    "TableModel.save": lambda path: TableModel(flow=CNF(1), columns=Columns(names=("a",))).save(
        path, History()
    ),
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_every_door_refuses_what_is_no_path_by_name(door):
    for nothing in (io.BytesIO(), None, 3, b"bytes", ["a"]):
        with pytest.raises(TypeError, match=r"(path|folder) must be a str or a pathlib\.Path; got"):
            door(nothing)
    for name in ("", "a\0b"):
        with pytest.raises(ValueError, match=r"(path|folder) must be a name that a file can have"):
            door(name)
