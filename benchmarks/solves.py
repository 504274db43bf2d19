"""Log-densities from the solve of an ODE, by whatever code: how they are timed and compared."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Block, hot, markdown, measure_hot, one_thread


@dataclass(frozen=True, kw_only=True)
class Density:
    """A log-density in torch."""

    log_prob: Callable[[Tensor], Tensor]
    """Of rows ``(rows, features)``."""
    network: nn.Module
    """Whose parameters are trained, and whose calls are the evaluations."""
    evaluations: int | None = None
    """Of a call, where the calls of the network cannot be seen."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to a log-density, ready to be timed, and what was seen when it was called first."""

    block: Block
    """Makes calls and times them."""
    evaluations: int
    """Of the network in a call, those of the backward pass included."""
    log_likelihood: float
    """Mean over the rows, in nats: equal where the velocity is."""
    first_call: float
    """Seconds of the first call by the clock on the wall, compilation included."""


def likelihood_step(density: Density, x: Tensor) -> Way:
    """A training step: the mean log-likelihood and its gradient in all parameters."""
    parameters = list(density.network.parameters())

    def step() -> Tensor:
        mean = density.log_prob(x).mean()
        torch.autograd.grad(mean, parameters, allow_unused=True)
        return mean.detach()

    return _here(step, density)


def evaluation(density: Density, x: Tensor) -> Way:
    """The log-likelihood alone, without gradient."""
    return _here(torch.no_grad()(lambda: density.log_prob(x).mean()), density)


def _here(call: Callable[[], Tensor], density: Density) -> Way:
    """A way in this process."""
    seen = 0

    def see(*_: object) -> None:
        nonlocal seen
        seen += 1

    handle = density.network.register_forward_pre_hook(see)
    started = time.perf_counter()
    with one_thread():
        log_likelihood = float(call())
    first_call = time.perf_counter() - started
    handle.remove()
    return Way(
        block=hot(call),
        evaluations=seen if density.evaluations is None else density.evaluations,
        log_likelihood=log_likelihood,
        first_call=first_call,
    )


def compare(
    ways: Mapping[str, Way], rounds: int, *, calls: int, rare: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Time the ways in turns, each in its own hot loop; a record of each."""
    times = measure_hot(
        {name: way.block for name, way in ways.items()}, rounds, calls=calls, rare=rare
    )
    return [
        {
            "way": name,
            "milliseconds": asdict(times[name]),
            "evaluations": way.evaluations,
            "log_likelihood": way.log_likelihood,
            "first_call_seconds": way.first_call,
        }
        for name, way in ways.items()
    ]


def table(records: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """A row for each way; the last column says how many times faster it is than the baseline."""
    headings = ["way", "ms", "quartiles", "evaluations", "log-likelihood", "first call (s)"]
    slow = fastest(records, baseline)
    rows = []
    for record in records:
        median = record["milliseconds"]["median"]
        low, high = record["milliseconds"]["quartiles"]
        rows.append(
            [
                record["way"],
                f"{median:.3g}",
                f"{low:.3g} to {high:.3g}",
                str(record["evaluations"]),
                f"{record['log_likelihood']:.4f}",
                f"{record['first_call_seconds']:.2g}",
                f"{slow / median:.2f}",
            ]
        )
    return markdown([*headings, f"{baseline} / way"], rows)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A bound on a ratio of medians: each that of the fastest way whose name starts so."""

    above: str | tuple[str, ...]
    """How the names above the line start."""
    below: str | tuple[str, ...]
    """And below."""
    text: str
    """Both in words."""
    bound: str
    """What is claimed, in words."""


def claims_table(claims: Sequence[Claim], records: Sequence[Mapping[str, Any]]) -> str:
    """What each claim says and what was measured; a dash where a side was not."""
    rows = []
    for claim in claims:
        above, below = (fastest(records, start) for start in (claim.above, claim.below))
        found = f"{above / below:.2f}" if above and below else "-"
        rows.append([claim.text, found, claim.bound])
    return markdown(["ratio of medians", "measured", "claim"], rows)


def fastest(records: Sequence[Mapping[str, Any]], start: str | tuple[str, ...]) -> float | None:
    """The least median among ways whose name starts so; None if there is none."""
    medians = (
        record["milliseconds"]["median"] for record in records if record["way"].startswith(start)
    )
    return min(medians, default=None)
