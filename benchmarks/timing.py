"""CPU time of several ways to do a thing, measured in turns, and the report of it."""

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.files import write_text

RARELY = 10
"""In how many rounds a rare way takes part once."""
Block: TypeAlias = Callable[[int], list[float]]
"""Makes so many calls of a way in a row, and returns the CPU time of each, in milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """CPU time of one way, in milliseconds."""

    median: float
    quartiles: tuple[float, float]
    """Below the lower one lies a quarter of the calls, above the upper one another."""
    calls: int


def measure(
    ways: Mapping[str, Callable[[], object]], rounds: int, *, rare: Collection[str] = ()
) -> dict[str, Timing]:
    """Time each way on one thread, in rounds of one call each.

    The order within a round is drawn anew, so that what drifts on the machine, and what one way
    leaves in its caches, falls on all alike. Those in `rare` take part in every tenth round.
    """
    order = random.Random(0)  # noqa: S311 - nothing secret
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    with one_thread():
        for way in ways.values():
            way()
        for turn in range(rounds):
            names = [name for name in ways if turn % RARELY == 0 or name not in rare]
            order.shuffle(names)
            for name in names:
                milliseconds[name].append(_milliseconds(ways[name]))
    return {name: summarise(values) for name, values in milliseconds.items()}


def measure_hot(
    ways: Mapping[str, Block], rounds: int, *, calls: int, rare: Collection[str] = ()
) -> dict[str, Timing]:
    """Time each way in its own hot loop: in rounds, of as many calls in a row of each.

    The first call of a row warms the caches and does not count. Rows of the ways take turns, in an
    order drawn anew each round, so that what drifts on the machine falls on all alike. Those in
    `rare` take part in every tenth round, with one call, which counts.
    """
    order = random.Random(0)  # noqa: S311 - nothing secret
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        names = [name for name in ways if turn % RARELY == 0 or name not in rare]
        order.shuffle(names)
        for name in names:
            row = ways[name](1) if name in rare else ways[name](1 + calls)[1:]
            milliseconds[name] += row
    return {name: summarise(values) for name, values in milliseconds.items()}


def hot(call: Callable[[], object]) -> Block:
    """Calls in a row on one thread of this process, timed each."""

    def block(calls: int) -> list[float]:
        with one_thread():
            return [_milliseconds(call) for _ in range(calls)]

    return block


def measure_alone(block: Block, *, seconds: float, most: int) -> Timing:
    """Time calls of one way in a row until so many CPU-seconds are spent, or `most` calls made."""
    milliseconds = block(1)
    while len(milliseconds) < most and sum(milliseconds) < 1e3 * seconds:
        milliseconds += block(1)
    return summarise(milliseconds)


def summarise(milliseconds: Sequence[float]) -> Timing:
    """Median and quartiles."""
    if len(milliseconds) == 1:
        quartiles = (milliseconds[0],) * 2
    else:
        low, _, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
        quartiles = (low, high)
    return Timing(
        median=statistics.median(milliseconds), quartiles=quartiles, calls=len(milliseconds)
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def training_step(
    evaluate: Callable[[], tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> Callable[[], None]:
    """One evaluation and its gradient in `inputs`, as a training step takes it."""
    cotangents = [torch.randn_like(output) for output in evaluate()]

    def step() -> None:
        torch.autograd.grad(evaluate(), inputs, cotangents)

    return step


def machine() -> dict[str, Any]:
    """What the times depend on beside the code."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": 1,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "dtype": str(torch.get_default_dtype()),
    }


def report(folder: Path, content: Mapping[str, Any], table: str) -> None:
    """Write ``results.json`` and ``table.md``, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps(content, indent=2, default=str))
    write_text(folder / "table.md", table)
    print(table)
    print(f"results in {folder}")


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def describe(facts: Mapping[str, Any]) -> str:
    """The machine in a sentence, to stand below a table."""
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} thread, load average "
        f"{facts['load_average']} at the start; torch {facts['torch']}, {facts['dtype']}, Python "
        f"{facts['python']}, {facts['system']}.\n"
    )


def _milliseconds(call: Callable[[], object]) -> float:
    """CPU time of a call."""
    started = time.process_time()
    call()
    return 1e3 * (time.process_time() - started)


def _cpu_model() -> str:
    """As Linux names it, or as Python does elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
