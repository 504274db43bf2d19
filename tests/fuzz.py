"""Calls of the public surface with arguments of which one or two are hostile.

The tests make 2000 calls with a fixed seed (`tests/test_fuzz.py`). By hand, for more:
``PYTHONPATH=.:tests python tests/fuzz.py --calls 50000 --seed 1``.
"""

import argparse
import collections
import contextlib
import math
import os
import random
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import cnf
import cnf.baselines
from cnf import metrics, plots
from cnf.bases import GaussianMixtureBase, StandardNormal
from cnf.data.toy import toy_density
from cnf.tables.fit import DensitySettings
from cnf.training import TrainingConfig, TrainingError, recipe

PACKAGE = str(Path(cnf.__file__).parent)
SECONDS = 20
"""After which a call counts as one that hangs."""
CLEAR = (ValueError, TypeError, OSError, NotImplementedError, cnf.ODEError, TrainingError)


class Hang(BaseException):
    """A call took too long; no library catches this."""


class Target(NamedTuple):
    """A public callable, and arguments that it takes."""

    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    parts_of: str = ""
    """The argument of the package that these are parts of, if they are."""


class Outcome(NamedTuple):
    """What became of a call."""

    kind: str
    """"result", "error", "unclear", "nan" or "hang"."""
    told: str


def rows(*shape: int) -> Tensor:
    """Rows that are right."""
    return torch.randn(*shape)


def small(**settings: Any) -> cnf.CNF:
    """A flow that is cheap to ask."""
    solver = cnf.ODESolver(method="rk4", steps=2, gradient="backprop")
    return cnf.CNF(**{"features": 2, "hidden_features": (4,), "solver": solver, **settings})


def targets(folder: Path) -> dict[str, Target]:
    """Everything that is called."""
    flow, given = small(), small(context_features=3)
    image = cnf.Flow(
        [
            cnf.transforms.Flatten((1, 2, 2)),
            cnf.transforms.Dequantize(4, 3),
            cnf.transforms.Logit(4),
            cnf.transforms.Affine(4),
        ]
    )
    field = cnf.MLPField(2, hidden_features=(4,))
    neural = cnf.NeuralODE(cnf.MLPField(3, hidden_features=(4,)), augment=1)
    config = TrainingConfig(steps=1, progress=False)
    toy = toy_density("moons")
    saved = folder / "flow.safetensors"
    cnf.save(flow, saved)

    def with_context(**more: Any) -> Callable[[], dict[str, Any]]:
        return lambda: {"x": rows(4, 2), "context": rows(4, 3), "generator": None, **more}

    def drawn(**more: Any) -> Callable[[], dict[str, Any]]:
        return lambda: {"sample_shape": (3,), "context": rows(4, 3), "generator": None, **more}

    def settings(**right: Any) -> Callable[[], dict[str, Any]]:
        return lambda: dict(right)

    made = {
        "CNF": (
            cnf.CNF,
            settings(
                features=2,
                context_features=1,
                hidden_features=(4, 4),
                layer="film",
                blocks=1,
                activation="silu",
                time_features=1,
                divergence=None,
                solver=None,
                base=None,
                transforms=(),
                standardize=True,
                augment=0,
            ),
        ),
        "Flow": (cnf.Flow, settings(transforms=[cnf.transforms.Affine(2)], base=None)),
        "ODESolver": (
            cnf.ODESolver,
            settings(
                method="dopri5",
                rtol=1e-3,
                atol=1e-3,
                error_norm="points",
                first_step=None,
                gradient="backprop",
                max_evaluations=100,
            ),
        ),
        "ODESolver fixed": (cnf.ODESolver, settings(method="rk4", steps=3, gradient="adjoint")),
        "ContinuousTransform": (
            cnf.transforms.ContinuousTransform,
            settings(
                vector_field=field,
                divergence=None,
                solver=None,
                start_time=0.0,
                end_time=1.0,
                learn_end_time=False,
            ),
        ),
        "MLPField": (
            cnf.MLPField,
            settings(
                features=2,
                context_features=1,
                hidden_features=(4,),
                layer="film",
                activation="sin",
                frequency=1.0,
                time_features=2,
            ),
        ),
        "ResidualField": (
            cnf.vector_fields.ResidualField,
            settings(features=2, context_features=1, hidden_features=4, blocks=1),
        ),
        "PotentialField": (
            cnf.vector_fields.PotentialField,
            settings(features=2, context_features=1, hidden_features=4, activation="tanh"),
        ),
        "ConvField": (
            cnf.vector_fields.ConvField,
            settings(shape=(1, 2, 2), context_features=0, hidden_channels=(2,), kernel_size=3),
        ),
        "LinearField": (cnf.vector_fields.LinearField, settings(features=2, context_features=1)),
        "ModuleField": (
            cnf.ModuleField,
            settings(network=nn.Identity(), features=2, context_features=0),
        ),
        "NeuralODE": (cnf.NeuralODE, settings(vector_field=field, augment=1, solver=None)),
        "Hutchinson": (cnf.Hutchinson, settings(noise="gaussian", probes=2, bottleneck=False)),
        "StandardNormal": (StandardNormal, settings(features=2)),
        "GaussianMixtureBase": (GaussianMixtureBase, settings(features=2, components=3)),
        "GaussianMixtureBase.from_data": (
            GaussianMixtureBase.from_data,
            lambda: {"z": rows(5, 2), "weight": torch.ones(5)},
        ),
        "Affine": (cnf.transforms.Affine, settings(features=2)),
        "Standardize": (cnf.Standardize, settings(features=2)),
        "Standardize.from_data": (
            cnf.Standardize.from_data,
            lambda: {"x": rows(5, 2), "weight": torch.ones(5)},
        ),
        "ActNorm": (cnf.transforms.ActNorm, settings(shape=(2, 1, 1))),
        "ConditionalAffine": (
            cnf.transforms.ConditionalAffine,
            settings(shape=2, context_features=1),
        ),
        "AffineCoupling": (
            cnf.transforms.AffineCoupling,
            settings(shape=3, context_features=1, conditioner=None, mask="first", bound=2.0),
        ),
        "AdditiveCoupling": (
            cnf.transforms.AdditiveCoupling,
            settings(shape=3, context_features=1, conditioner=None, mask="last"),
        ),
        "Augment": (
            cnf.transforms.Augment,
            settings(features=2, augment=1, context_features=0, hidden_features=(4,)),
        ),
        "Conv1x1": (cnf.transforms.Conv1x1, settings(shape=(2, 1, 1), lu=True)),
        "Dequantize": (cnf.transforms.Dequantize, settings(features=2, levels=4)),
        "EmergingConv": (cnf.transforms.EmergingConv, settings(shape=(1, 3, 3), kernel_size=3)),
        "PeriodicConv": (cnf.transforms.PeriodicConv, settings(shape=(1, 3, 3), kernel_size=3)),
        "WoodburyConv": (
            cnf.transforms.WoodburyConv,
            settings(shape=(1, 3, 3), rank_channels=1, rank_space=1),
        ),
        "ExactLipschitz": (
            cnf.transforms.ExactLipschitz,
            settings(features=2, context_features=0, units=2, hidden_features=(4,), lipschitz=0.5),
        ),
        "FactorOut": (
            cnf.transforms.FactorOut,
            settings(transforms=[cnf.transforms.Affine(1)], features=2),
        ),
        "Flatten": (cnf.transforms.Flatten, settings(shape=(1, 2, 2))),
        "Squeeze": (cnf.transforms.Squeeze, settings(shape=(1, 2, 2))),
        "Permute": (cnf.transforms.Permute, settings(order=[1, 0])),
        "Logit": (cnf.transforms.Logit, settings(features=2, alpha=0.1)),
        "LipschitzMLP": (
            cnf.transforms.LipschitzMLP,
            settings(features=2, context_features=0, hidden_features=(4,), coefficient=0.5),
        ),
        "LipschitzAttention": (
            cnf.transforms.LipschitzAttention,
            settings(tokens=2, width=2, coefficient=0.5),
        ),
        "ResidualFlow": (
            cnf.transforms.ResidualFlow,
            settings(network=cnf.transforms.LipschitzMLP(2, hidden_features=(4,)), tolerance=1e-4),
        ),
        "RussianRoulette": (
            cnf.transforms.RussianRoulette,
            settings(exact_terms=2, probability=0.5, probes=1),
        ),
        "TruncatedSeries": (cnf.transforms.TruncatedSeries, settings(terms=2, probes=1)),
        "MLPConditioner": (
            cnf.transforms.MLPConditioner,
            settings(features=2, outputs=2, context_features=0, hidden_features=(4,)),
        ),
        "ConvConditioner": (
            cnf.transforms.ConvConditioner,
            settings(shape=(1, 2, 2), outputs=2, context_features=0, hidden_channels=(2,)),
        ),
        "Planar": (cnf.transforms.Planar, settings(features=2)),
        "Radial": (cnf.transforms.Radial, settings(features=2)),
        "Unconstrain": (
            cnf.transforms.Unconstrain,
            settings(columns=["real", "positive", ("interval", 0, 1)]),
        ),
        "glow": (
            cnf.baselines.glow,
            settings(shape=(1, 4, 4), context_features=0, levels=1, steps=1, hidden_channels=(2,)),
        ),
        "FlowMatching": (
            cnf.FlowMatching,
            settings(flow=flow, path=None, pairing=None, times="late"),
        ),
        "MaximumLikelihood": (
            cnf.MaximumLikelihood,
            settings(
                flow=flow, regularizers=None, solver=None, divergence=None, random_end_time=0.1
            ),
        ),
        "ReverseKL": (
            cnf.ReverseKL,
            settings(flow=flow, log_density=lambda x: -x.square().sum(-1), draws=3, solver=None),
        ),
        "SmoothedPath": (cnf.objectives.SmoothedPath, settings(sigma=0.1)),
        "OptimalTransport": (cnf.objectives.OptimalTransport, settings(context_weight=1.0)),
        "TrainingConfig": (
            TrainingConfig,
            settings(
                steps=1,
                batch_size=2,
                learning_rate=0.1,
                optimizer=None,
                weight_decay=0.1,
                schedule="constant",
                max_seconds=9.0,
                gradient_clip=1.0,
                ema=0.5,
                validate_every=1,
                patience=None,
                accumulation_steps=1,
                precision="float32",
                seed=0,
                progress=False,
                objective=cnf.MaximumLikelihood,
            ),
        ),
        "recipe": (
            recipe,
            settings(
                rows=100,
                matching_steps=1,
                likelihood_steps=1,
                batch_size=4,
                learning_rate=0.1,
                patience=None,
                seed=0,
                progress=False,
            ),
        ),
        "DensitySettings": (
            DensitySettings,
            settings(
                matching_steps=1,
                likelihood_steps=1,
                batch_size=4,
                learning_rate=0.1,
                hidden_features=(4,),
                validation_fraction=0.1,
                seed=0,
            ),
        ),
        "Checkpoints": (cnf.Checkpoints, settings(folder=folder / "run", every=1, keep=1)),
    }
    asked = {
        "log_prob": (given.log_prob, with_context(importance_samples=1)),
        "log_prob of an image": (
            image.log_prob,
            lambda: {
                "x": torch.randint(3, (4, 1, 2, 2)).to(torch.get_default_dtype()),
                "importance_samples": 2,
            },
        ),
        "log_prob_and_error": (given.log_prob_and_error, with_context()),
        "sample": (given.sample, drawn()),
        "rsample": (given.rsample, drawn()),
        "sample_and_log_prob": (given.sample_and_log_prob, drawn()),
        "to_base": (given.to_base, with_context()),
        "to_base_and_ladj": (given.to_base_and_ladj, with_context()),
        "to_data": (
            given.to_data,
            lambda: {"z": rows(4, 2), "context": rows(4, 3), "generator": None},
        ),
        "trajectory": (
            given.trajectory,
            lambda: {
                "x_or_z": rows(4, 2),
                "times": torch.tensor([1.0, 0.5, 0.0]),
                "context": rows(4, 3),
                "generator": None,
            },
        ),
        "initialize": (
            lambda **arguments: small(context_features=3).initialize(**arguments),
            with_context(),
        ),
        "using": (flow.using, settings(solver=cnf.ODESolver(), divergence=cnf.Exact())),
        "distribution": (given, lambda: {"context": rows(4, 3)}),
        "distribution.log_prob": (
            given(rows(4, 3)).log_prob,
            lambda: {"value": rows(4, 2), "generator": None},
        ),
        "distribution.sample": (
            given(rows(4, 3)).sample,
            settings(sample_shape=(2,), generator=None),
        ),
        "distribution.expand": (given(rows(4, 3)).expand, settings(batch_shape=(2, 4))),
        "log_prob_in_chunks": (
            cnf.flows.log_prob_in_chunks,
            lambda: {
                "flow": given,
                "x": rows(4, 2),
                "context": rows(4, 3),
                "chunk_size": 2,
                "generator": None,
            },
        ),
        "sample_in_chunks": (
            cnf.flows.sample_in_chunks,
            lambda: {"flow": given, "count": 3, "context": rows(3, 3), "chunk_size": 2},
        ),
        "matching": (cnf.FlowMatching(given), with_context(weight=torch.ones(4))),
        "likelihood": (cnf.MaximumLikelihood(given), with_context(weight=torch.ones(4))),
        "fit": (
            lambda **arguments: cnf.fit(small(), **arguments),
            lambda: {
                "data": rows(12, 2),
                "config": config,
                "validation": 0.2,
                "checkpoints": None,
                "resume": False,
                "callbacks": (),
            },
        ),
        "fit given": (
            lambda x, context, weight: cnf.fit(
                small(context_features=3), {"x": x, "context": context, "weight": weight}, config
            ),
            lambda: {"x": rows(12, 2), "context": rows(12, 3), "weight": torch.ones(12)},
            "data",
        ),
        "certify": (
            cnf.certify,
            lambda: {"flow": given, "x": rows(4, 2), "context": rows(4, 3), "generator": None},
        ),
        "check_gradients": (
            cnf.diagnostics.check_gradients,
            lambda: {"flow": given, "x": rows(4, 2), "context": rows(4, 3), "tolerance": 1.0},
        ),
        "save": (cnf.save, settings(flow=flow, path=folder / "other.safetensors")),
        "load": (cnf.load, settings(path=saved, device="cpu")),
        "NeuralODE.forward": (neural, lambda: {"x": rows(4, 2)}),
        "NeuralODE.trajectory": (
            neural.trajectory,
            lambda: {"x": rows(4, 2), "times": torch.tensor([0.0, 1.0])},
        ),
        "toy.sample": (toy.sample, settings(n=3, generator=None)),
        "toy.log_prob": (toy.log_prob, lambda: {"x": rows(4, 2)}),
        "toy_density": (toy_density, settings(name="moons")),
        "bits_per_dim": (metrics.bits_per_dim, lambda: {"log_prob": rows(4), "dimensions": 3}),
        "effective_sample_size": (
            metrics.effective_sample_size,
            lambda: {"log_weights": rows(4, 2)},
        ),
        "log_mean_exp": (metrics.log_mean_exp, lambda: {"log_weights": rows(4, 2)}),
        "gaussian_log_prob": (
            metrics.gaussian_log_prob,
            lambda: {"x": rows(4, 2), "training": rows(9, 2)},
        ),
        "plot_density": (
            plots.plot_density,
            lambda: {"log_prob": flow.log_prob, "extent": (-1.0, 1.0, -1.0, 1.0), "resolution": 4},
        ),
        "plot_samples": (
            plots.plot_samples,
            lambda: {"x": rows(9, 2), "extent": (-1.0, 1.0, -1.0, 1.0)},
        ),
        "transforms_for": (
            cnf.transforms.transforms_for,
            lambda: {"x": rows(9, 2), "support": ["real", "real"]},
        ),
    }
    return {name: Target(*parts) for name, parts in {**made, **asked}.items()}


def recursive() -> list[Any]:
    """A list that holds itself."""
    made: list[Any] = []
    made.append(made)
    return made


VALUES: list[Callable[[], Any]] = [
    lambda: math.nan,
    lambda: math.inf,
    lambda: -math.inf,
    lambda: -1,
    lambda: 0,
    lambda: 1.5,
    lambda: 10**30,
    lambda: -(10**30),
    lambda: 2**63,
    lambda: 1e308,
    lambda: 5e-324,
    lambda: True,
    lambda: None,
    lambda: "1e-3",
    lambda: "",
    lambda: "no such thing",
    lambda: b"x",
    lambda: 1j,
    list,
    lambda: (),
    dict,
    set,
    lambda: [1, "a"],
    lambda: [None],
    object,
    lambda: int,
    lambda: lambda *a, **k: None,
    lambda: ...,
    lambda: np.float32("nan"),
    lambda: np.int64(3),
    lambda: np.array([1.0, 2.0]),
    lambda: np.bool_(True),
    lambda: np.random.default_rng(0),
    lambda: torch.tensor(3.0),
    lambda: torch.tensor([1.0, 2.0]),
    lambda: torch.tensor(2),
    lambda: 7,
    lambda: (2, 2),
    lambda: (-1, 2),
    lambda: (10**12,),
    lambda: [2.5],
    lambda: nn.Linear(2, 2),
    recursive,
    lambda: Path("/nowhere/at/all"),
    lambda: torch.float32,
    lambda: torch.device("meta"),
    lambda: cnf.transforms.Affine(3),
    cnf.ODESolver,
    cnf.Exact,
]
TENSORS: list[Callable[[], Any]] = [
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.zeros(0, 2),
    lambda: torch.zeros(3),
    lambda: torch.zeros(4, 1),
    lambda: torch.zeros(4, 3),
    lambda: torch.zeros(2, 4, 2),
    lambda: torch.zeros(4, 2),
    lambda: torch.full((4, 2), math.nan),
    lambda: torch.tensor([[0.0, math.inf]] * 4),
    lambda: torch.full((4, 2), 1e30),
    lambda: torch.full((4, 2), -3e38),
    lambda: torch.full((4, 2), 1e-40),
    lambda: torch.zeros(4, 2, dtype=torch.int64),
    lambda: torch.zeros(4, 2, dtype=torch.bool),
    lambda: torch.zeros(4, 2, dtype=torch.half),
    lambda: torch.zeros(4, 2, dtype=torch.bfloat16),
    lambda: torch.zeros(4, 2, dtype=torch.complex64),
    lambda: torch.zeros(4, 2).to_sparse(),
    lambda: torch.zeros(4, 2, device="meta"),
    lambda: torch.zeros(1, 1).expand(4, 2),
    lambda: torch.randn(2, 4).T,
    lambda: torch.randn(4, 2, requires_grad=True),
    lambda: torch.view_as_complex(torch.randn(4, 2, 2)).conj().imag,
    lambda: np.zeros((4, 2)),
    lambda: [[0.0, 1.0]] * 4,
    lambda: "x",
    lambda: None,
    lambda: 3.0,
    lambda: nn.Linear(2, 2),
    lambda: -torch.ones(4),
    lambda: torch.zeros(4),
    lambda: torch.full((4,), 1e30),
    lambda: torch.tensor([0.0, 1.0, math.nan]),
    lambda: torch.tensor([0.5, 0.5]),
]


def hostile(right: Any, chance: random.Random) -> Any:
    """An argument in place of one that is right: of its kind, mostly."""
    pool = TENSORS if isinstance(right, Tensor) == (chance.random() < 0.85) else VALUES
    return chance.choice(pool)()


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _within(folder: str) -> Iterator[None]:
    """Relative paths are of this folder: a number in its place may be the name of a file."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def outcome_of(target: Target, arguments: dict[str, Any]) -> Outcome:
    """Make one call, and say what became of it."""
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = target.call(**arguments)
    except Hang:
        return Outcome("hang", "no answer")
    except Exception as error:  # what it is, is the question
        last = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {str(error)[:160]!r} in {last.filename}:{last.lineno}"
        ours = last.filename.startswith(PACKAGE) and isinstance(error, CLEAR)
        named = {**arguments, target.parts_of: None}
        clear = ours and _names_an_argument(str(error), named)
        return Outcome("error" if clear else "unclear", told)
    found = [part for part in _tensors(result) if part.dtype.is_floating_point]
    if any(bool(part.isnan().any()) for part in found if not part.is_meta):
        return Outcome("nan", "a result with NaN")
    return Outcome("result", "")


def _names_an_argument(message: str, arguments: dict[str, Any]) -> bool:
    """Whether a message has the name of an argument, or of one of its entries, as a word."""
    words = {word.rstrip("s") for word in re.findall(r"\w+", message)}
    return not words.isdisjoint(name.rstrip("s") for name in arguments)


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, tuple | list):
        return [tensor for part in result for tensor in _tensors(part)]
    return []


def fuzz(calls: int, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """Make so many calls; how often each outcome came, and each that is bad in words."""
    chance = random.Random(seed)  # noqa: S311 - no secrets
    counts, bad = collections.Counter[str](), []
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as name, _within(name):
        known = targets(Path(name))
        for _ in range(calls):
            place = chance.choice(list(known))
            arguments = known[place].arguments()
            for which in chance.sample(sorted(arguments), k=min(len(arguments), 1)):
                arguments[which] = hostile(arguments[which], chance)
            if chance.random() < 0.2:
                which = chance.choice(sorted(arguments))
                arguments[which] = hostile(arguments[which], chance)
            told = {key: _short(value) for key, value in arguments.items()}
            outcome = outcome_of(known[place], arguments)
            counts[outcome.kind] += 1
            if outcome.kind not in ("result", "error"):
                bad.append(f"{outcome.kind}: {place}({told}) -> {outcome.told}")
    return counts, bad


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)} {value.dtype}"
    return repr(value)[:50]


def main() -> None:
    """The longer form."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts, bad = fuzz(options.calls, options.seed)
    sys.stdout.write("\n".join([*bad, str(dict(counts)), ""]))


if __name__ == "__main__":
    main()
