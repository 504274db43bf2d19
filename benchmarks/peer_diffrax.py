"""diffrax's side of the benchmarks, run by another Python: it needs jax, diffrax and numpy only.

Run as ``python peer_diffrax.py problem.npz``, where the file holds rows ``x``, a ``tolerance`` and
the weights of FFJORD's network. For each line ``WAY CALLS`` that comes in, one of JSON goes out:
the CPU time of each call, the time of all by the wall's clock, and what the last of them found.

Diffrax adapts the steps to all rows together, as torchdiffeq does; the trace is exact, by forward
mode over the basis.
"""

import json
import os
import sys
import time
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

_STAGES = 6
"""New evaluations in each step of dopri5, whose last is the first of the next step."""
_TO_START = 2
"""Evaluations before the first step: its own, and one to choose its length."""


def main(path: str) -> None:
    """Answer until the other side closes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    problem = np.load(path)
    layers = [
        tuple(
            jnp.asarray(problem[f"{name}{i}"])
            for name in ("weight", "bias", "gate", "gate_bias", "shift")
        )
        for i in range(sum(name.startswith("weight") for name in problem))
    ]
    x = jnp.asarray(problem["x"])
    mean = partial(mean_log_prob, tolerance=float(problem["tolerance"]))
    ways = {
        "evaluation": jax.jit(partial(mean, adjoint=diffrax.RecursiveCheckpointAdjoint())),
        "checkpointed": step(partial(mean, adjoint=diffrax.RecursiveCheckpointAdjoint())),
        "adjoint": step(partial(mean, adjoint=diffrax.BacksolveAdjoint())),
    }
    for line in sys.stdin:
        name, calls = line.split()
        answer, milliseconds = None, []
        opened = time.perf_counter()
        for _ in range(int(calls)):
            started = time.process_time()
            answer = jax.block_until_ready(ways[name](layers, x))
            milliseconds.append(1e3 * (time.process_time() - started))
        value, steps = answer[0] if name != "evaluation" else answer
        facts = {
            "milliseconds": milliseconds,
            "seconds": time.perf_counter() - opened,
            "evaluations": _TO_START + _STAGES * int(steps),
            "log_likelihood": float(value),
        }
        print(json.dumps(facts), flush=True)


def step(mean):
    """A training step: the mean log-likelihood and its gradient in all weights."""
    return jax.jit(jax.value_and_grad(mean, has_aux=True))


def mean_log_prob(layers, x, *, tolerance, adjoint):
    """Mean log-likelihood of the rows, and the number of steps."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        diffrax.Dopri5(),
        t0=1.0,
        t1=0.0,
        dt0=None,
        y0=(x, jnp.zeros(len(x))),
        args=layers,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        adjoint=adjoint,
    )
    z, ladj = (part[-1] for part in solution.ys)
    log_prob = jax.scipy.stats.norm.logpdf(z).sum(-1) + ladj
    return log_prob.mean(), solution.stats["num_steps"]


def rates(t, state, layers):
    """Velocity and divergence of each row."""
    x, _ = state
    value, along = jax.linearize(lambda x: velocity(layers, t, x), x)
    basis = jnp.eye(x.shape[-1])
    columns = jax.vmap(lambda direction: along(jnp.broadcast_to(direction, x.shape)))(basis)
    return value, jnp.einsum("iri->r", columns)


def velocity(layers, t, x):
    """FFJORD's concatsquash layers, with tanh between them."""
    for i, (weight, bias, gate, gate_bias, shift) in enumerate(layers):
        x = jnp.tanh(x) if i else x
        x = (x @ weight.T + bias) * jax.nn.sigmoid(gate * t + gate_bias) + shift * t
    return x


if __name__ == "__main__":
    main(sys.argv[1])
