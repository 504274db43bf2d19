"""Laws of settings: numbers, names, flags and generators are taken as meant, or refused."""

import math

import numpy as np
import pytest
import torch
from zoo import cnf, lipschitz_mlp, rows_for

from cnf import (
    CNF,
    FlowMatching,
    Hutchinson,
    MaximumLikelihood,
    MLPField,
    ODESolver,
    TrainingConfig,
    certify,
    load,
    save,
)
from cnf.data.toy import toy_density
from cnf.objectives import SmoothedPath
from cnf.regularizers import kinetic_energy
from cnf.tables.fit import DensitySettings
from cnf.transforms import ContinuousTransform, ExactLipschitz, Logit, ResidualFlow, RussianRoulette
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

NUMBERS = {
    "rtol": lambda value: ODESolver(rtol=value),
    "atol": lambda value: ODESolver(atol=value),
    "first_step": lambda value: ODESolver(first_step=value),
    "end_time": lambda value: ContinuousTransform(LinearField(2), end_time=value),
    "start_time": lambda value: ContinuousTransform(LinearField(2), start_time=value),
    "frequency": lambda value: MLPField(2, frequency=value),
    "alpha": lambda value: Logit(2, alpha=value),
    "lipschitz": lambda value: ExactLipschitz(2, lipschitz=value),
    "coefficient": lambda value: lipschitz_mlp(coefficient=value),
    "tolerance": lambda value: ResidualFlow(lipschitz_mlp(), tolerance=value),
    "probability": lambda value: RussianRoulette(probability=value),
    "sigma": SmoothedPath,
    "learning_rate": lambda value: TrainingConfig(learning_rate=value),
    "gradient_clip": lambda value: TrainingConfig(gradient_clip=value),
    "weight_decay": lambda value: TrainingConfig(weight_decay=value),
    "max_seconds": lambda value: TrainingConfig(max_seconds=value),
    "ema": lambda value: TrainingConfig(ema=value),
    "random_end_time": lambda value: MaximumLikelihood(cnf(), random_end_time=value),
    "regularizers": lambda value: MaximumLikelihood(cnf(), {kinetic_energy: value}),
    "validation_fraction": lambda value: DensitySettings(validation_fraction=value),
}
OPTIONAL = ("first_step", "frequency", "gradient_clip", "max_seconds", "ema")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", ["1e-3", True, None, 1j, [0.1], np.array([0.1]), torch.tensor([0.1]), {}], ids=repr
)
def test_what_is_no_number_is_refused(name, value):
    if value is None and name in OPTIONAL:
        return
    with pytest.raises(TypeError, match=f"{name} must be a number; got"):
        NUMBERS[name](value)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, -math.inf, np.float32("nan")], ids=repr)
def test_numbers_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*; got"):
        NUMBERS[name](value)


@pytest.mark.parametrize(
    "kind",
    [np.float32, np.float64, torch.tensor, np.array],
    ids=["float32", "float64", "tensor", "array"],
)
def test_numbers_of_other_libraries_are_kept_as_python_has_them(kind, tmp_path):
    solver = ODESolver(rtol=kind(0.25), atol=kind(0.5))
    assert (type(solver.rtol), solver.rtol, solver.atol) == (float, 0.25, 0.5)
    field = MLPField(2, hidden_features=(np.int64(4),), frequency=kind(0.5))
    assert type(field.frequency) is float
    flow = CNF(2, hidden_features=(4,), frequency=kind(0.5), solver=solver)
    save(flow, tmp_path / "flow.safetensors")
    assert load(tmp_path / "flow.safetensors").chain[-1].solver == solver


def test_settings_of_training_are_kept_as_python_has_them():
    config = TrainingConfig(
        steps=np.int64(4),
        learning_rate=torch.tensor(0.5),
        ema=np.float32(0.5),
        patience=np.int32(2),
    )
    plain = TrainingConfig(steps=4, learning_rate=0.5, ema=0.5, patience=2)
    assert repr(config) == repr(plain)


CHOICES = {
    "method": lambda value: ODESolver(method=value),
    "gradient": lambda value: ODESolver(gradient=value),
    "error_norm": lambda value: ODESolver(error_norm=value),
    "noise": lambda value: Hutchinson(noise=value),
    "layer": lambda value: MLPField(2, layer=value),
    "times": lambda value: FlowMatching(cnf(), times=value),
    "schedule": lambda value: TrainingConfig(schedule=value),
    "precision": lambda value: TrainingConfig(precision=value),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["nothing", ["adjoint"], None, 3, {}, {1}], ids=repr)
def test_unknown_names_are_refused_by_those_there_are(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, .*; got"):
        CHOICES[name](value)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("learn_end_time", lambda value: ContinuousTransform(LinearField(2), learn_end_time=value)),
        ("bottleneck", lambda value: Hutchinson(bottleneck=value)),
        ("standardize", lambda value: CNF(2, standardize=value)),
        ("progress", lambda value: TrainingConfig(progress=value)),
    ],
)
@pytest.mark.parametrize("value", ["no", 1, None, torch.tensor(True)], ids=repr)
def test_flags_are_true_or_false(name, make, value):
    with pytest.raises(TypeError, match=f"{name} must be True or False; got"):
        make(value)


X = torch.zeros(3, 2)
DRAWS = {
    "log_prob": lambda flow, generator: flow.log_prob(X, generator=generator),
    "sample": lambda flow, generator: flow.sample(3, generator=generator),
    "rsample_and_log_prob": lambda flow, generator: flow.rsample_and_log_prob(
        3, generator=generator
    ),
    "to_base": lambda flow, generator: flow.to_base(X, generator=generator),
    "to_data": lambda flow, generator: flow.to_data(X, generator=generator),
    "trajectory": lambda flow, generator: flow.trajectory(
        X, torch.tensor([1.0, 0.0]), generator=generator
    ),
    "initialize": lambda flow, generator: flow.initialize(X, generator=generator),
    "distribution": lambda flow, generator: flow().sample((2,), generator=generator),
    "matching": lambda flow, generator: FlowMatching(flow)(X, generator=generator),
    "likelihood": lambda flow, generator: MaximumLikelihood(flow)(X, generator=generator),
    "certify": lambda flow, generator: certify(flow, X, generator=generator),
    "toy": lambda flow, generator: toy_density("moons").sample(3, generator=generator),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize(
    "generator", [7, np.random.default_rng(0), "0"], ids=["int", "numpy", "str"]
)
def test_a_seed_is_no_generator(name, generator):
    with pytest.raises(TypeError, match=r"generator must be .*manual_seed\(\d\)"):
        DRAWS[name](cnf().float(), generator)


TENSORS = {
    "sparse": (lambda: torch.eye(2).to_sparse(), r"must be a dense tensor; got one that is torch"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(2)]), "nested"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3, 2).float(), 1.0, 0, torch.qint8),
        "dequantize",
    ),
    "complex": (lambda: torch.ones(3, 2, dtype=torch.complex64), "must have a floating dtype"),
    "integer": (lambda: torch.ones(3, 2, dtype=torch.int64), "must have a floating dtype"),
    "bool": (lambda: torch.ones(3, 2, dtype=torch.bool), "must have a floating dtype"),
    "meta": (lambda: torch.ones(3, 2, device="meta"), "got a tensor on the device meta"),
    "half": (lambda: torch.ones(3, 2, dtype=torch.half), "the model's dtype torch.float32"),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("method", ["log_prob", "to_base", "to_data", "initialize"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per")
def test_tensors_of_other_kinds_are_refused(name, method):
    make, message = TENSORS[name]
    with pytest.raises(ValueError, match=message):
        getattr(cnf().float(), method)(make())


def test_a_context_of_another_kind_is_refused_too():
    flow = cnf(2, 3)
    x, context = rows_for(flow, 4)
    with pytest.raises(ValueError, match="context must be a dense tensor"):
        flow.log_prob(x, context.to_sparse())
