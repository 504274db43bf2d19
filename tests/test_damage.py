"""Laws of damaged and hostile files: none gives other numbers, and none costs before it is checked."""

import json
import math
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from zoo import EVERY_FLOW, UserNetwork, cnf

from cnf import (
    CNF,
    Affine,
    ContinuousTransform,
    Flow,
    MLPField,
    ODESolver,
    Standardize,
    load,
    save,
)
from cnf._building import Building
from cnf._files import BLANK_DIGEST, seal
from cnf.baselines import build
from cnf.description import describe, rebuild

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

SMALL = {"hidden_features": (3,), "solver": ODESolver(method="rk4", steps=2)}


def flips(content, count):
    """The content with one bit flipped, at as many places spread over it."""
    generator = np.random.default_rng(0)
    for place in generator.choice(8 * len(content), count, replace=False):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)


def without_digest(path, change=lambda tensors: tensors, flow=None):
    """The file as a version wrote it that knew no digest."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["cnf"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del description["sha256"]
    if flow is not None:
        description["flow"] = flow
    save_file(change(tensors), path, metadata={"cnf": json.dumps(description)})


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
        path,
        lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(added)},
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
    "many transforms": flow_of(*[{"class": "Permute", "permutation": [1, 0]}] * 100_000),
    "flattened": flow_of(*[{"class": "Flatten", "shape": [1, 1, 2]}] * 100_000),
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
        for _ in range(10):
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
