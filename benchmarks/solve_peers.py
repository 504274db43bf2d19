"""The same log-density by other libraries, for `benchmarks.step` and `benchmarks.evaluation`.

zuko is a package beside ours. diffrax runs in a process of its own, by a Python that has it.
FFJORD's and OT-Flow's code is looked for in a folder that the user names.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.mixture import Mixture, train
from benchmarks.solves import Density, Way
from cnf import MLPField

DIFFRAX_STEPS = {"diffrax, checkpointed": "checkpointed", "diffrax, adjoint": "adjoint"}
"""The two ways of diffrax to a gradient, as `peer_diffrax` calls them, by what we call them."""
DIFFRAX_EVALUATION = {"diffrax": "evaluation"}
"""Likewise without gradient."""
_SCRIPT = Path(__file__).with_name("peer_diffrax.py")
_ROWS = 256
_OTFLOW_STEPS, _OTFLOW_WIDTH = 8, 32
_RK4_STAGES = 4


def torch_densities(
    field: MLPField,
    mixture: Mixture,
    *,
    tolerance: float,
    training_steps: int,
    ffjord: Path | None,
    otflow: Path | None,
) -> dict[str, Density]:
    """The densities of others that can be had, by name: zuko's if it is installed."""
    densities = {}
    if importlib.util.find_spec("zuko"):
        densities["zuko"] = zuko_density(
            mixture, field.hidden_features, training_steps=training_steps, tolerance=tolerance
        )
    if ffjord is not None:
        densities["FFJORD's code"] = ffjord_density(ffjord, field, tolerance=tolerance)
    if otflow is not None:
        densities["OT-Flow's code"] = otflow_density(otflow, field.features)
    return densities


def zuko_density(
    mixture: Mixture, hidden_features: tuple[int, ...], *, training_steps: int, tolerance: float
) -> Density:
    """The CNF of zuko with tanh and the exact trace, taught the same velocities.

    Its network sees time as waves and not in gates, so that the weights cannot be the same.
    """
    import zuko

    flow = zuko.flows.CNF(
        mixture.features,
        hidden_features=hidden_features,
        activation=nn.Tanh,
        exact=True,
        atol=tolerance,
        rtol=tolerance,
    )

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return -flow.transform.f(1 - t, x)  # its time runs from the data to the base

    network = flow.transform.ode
    train(velocity, network.parameters(), mixture, steps=training_steps, rows=_ROWS)
    return Density(log_prob=lambda x: flow().log_prob(x), network=network)


def ffjord_density(folder: Path, field: MLPField, *, tolerance: float) -> Density:
    """FFJORD's code, from a clone of github.com/rtqichen/ffjord, with the weights of our field."""
    layers = _module(
        "lib.layers", folder, "lib/layers/odefunc.py", "ffjord", "github.com/rtqichen/ffjord"
    )
    network = layers.ODEnet(
        hidden_dims=field.hidden_features,
        input_shape=(field.features,),
        strides=None,
        conv=False,
        layer_type="concatsquash",
        nonlinearity="tanh",
    )
    with torch.no_grad():
        for theirs, ours in zip(network.layers, field.layers, strict=True):
            theirs._layer.load_state_dict(ours.linear.state_dict())
            theirs._hyper_gate.load_state_dict(ours.gate.state_dict())
            theirs._hyper_bias.load_state_dict(ours.shift.state_dict())
    ode = layers.ODEfunc(network, divergence_fn="brute_force")
    # In training mode it gives torchdiffeq tolerances that today's adjoint cannot take.
    flow = layers.CNF(ode, T=1.0, solver="dopri5", atol=tolerance, rtol=tolerance).eval()
    base = torch.distributions.Normal(0.0, 1.0)

    def log_prob(x: Tensor) -> Tensor:
        times = x.new_tensor([1.0, 0.0])  # its default runs from the data, at 0, to the base
        z, change = flow(x, x.new_zeros(len(x), 1), integration_times=times)
        return base.log_prob(z).sum(-1) - change.squeeze(-1)

    return Density(log_prob=log_prob, network=network)


def otflow_density(folder: Path, features: int) -> Density:
    """OT-Flow's code, from a clone of github.com/EmoryMLIP/OT-Flow.

    A potential network, new and of the size that its authors give toy sets, through their 8 steps
    of rk4: a cost to look at, not the same problem.
    """
    origin = "github.com/EmoryMLIP/OT-Flow"
    problem = _module("src.OTFlowProblem", folder, "src/OTFlowProblem.py", "otflow", origin)
    potential = _module("src.Phi", folder, "src/Phi.py", "otflow", origin)
    network = potential.Phi(nTh=2, m=_OTFLOW_WIDTH, d=features, alph=[1.0, 1.0, 1.0])

    def log_prob(x: Tensor) -> Tensor:
        path = problem.integrate(x, network, [0.0, 1.0], _OTFLOW_STEPS, "rk4", [1.0, 1.0, 1.0])
        return -problem.C(path).squeeze(-1)

    return Density(log_prob=log_prob, network=network, evaluations=_RK4_STAGES * _OTFLOW_STEPS)


def _module(name: str, folder: Path, file: str, option: str, origin: str) -> ModuleType:
    """A module of somebody's research code, which is no package."""
    if not (folder / file).is_file():
        raise ValueError(f"{option} must be a clone of {origin}; there is no {file} in {folder}.")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


@contextmanager
def diffrax_ways(
    python: Path | None, names: Mapping[str, str], field: MLPField, x: Tensor, *, tolerance: float
) -> Iterator[dict[str, Way]]:
    """The ways of diffrax, by jit, to the log-density of our field; none without a `python`.

    Raises:
        ValueError: If its process ends; what it said stands above.
    """
    if python is None:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(path, x=x.numpy(), tolerance=tolerance, **_arrays(field))
        command = [str(python), str(_SCRIPT), str(path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes, env=_one_thread()) as process:  # noqa: S603
            yield {name: _diffrax_way(process, theirs) for name, theirs in names.items()}


def _arrays(field: MLPField) -> dict[str, np.ndarray]:
    """The weights of concatsquash layers, by name and place."""
    return {
        f"{name}{i}": tensor.detach().numpy()
        for i, layer in enumerate(field.layers)
        for name, tensor in (
            ("weight", layer.linear.weight),
            ("bias", layer.linear.bias),
            ("gate", layer.gate.weight[:, 0]),
            ("gate_bias", layer.gate.bias),
            ("shift", layer.shift.weight[:, 0]),
        )
    }


def _one_thread() -> dict[str, str]:
    """An environment in which XLA computes on the CPU, on one thread."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags}


def _diffrax_way(process: "subprocess.Popen[str]", name: str) -> Way:
    """A way whose calls are made over there."""

    def ask(calls: int) -> dict[str, Any]:
        with suppress(BrokenPipeError):
            print(name, calls, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise ValueError("diffrax_python must be a Python with jax and diffrax; it stopped.")
        return json.loads(answer)

    first = ask(1)
    return Way(
        block=lambda calls: ask(calls)["milliseconds"],
        evaluations=first["evaluations"],
        log_likelihood=first["log_likelihood"],
        first_call=first["seconds"],
    )
