"""What a training step costs in a loop that is not ours, beside the CNF of zuko.

Run as ``python -m benchmarks.foreign_loop``; ``--help`` lists the settings. The loop is the one of
sbi, lampe and Pyro: ``loss = -flow(context).log_prob(x).mean()``, its gradient, a step of Adam.
Both flows have the defaults of their library; ours also has the widths of zuko's network. Claim: at
the start, and after training, a step of ours costs at most as much, as a ratio of medians of CPU
time on one thread. Steps of all flows take turns in one process.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from benchmarks.mixture import Mixture
from benchmarks.settings import check_counts
from benchmarks.timing import describe, machine, markdown, measure, report
from cnf import CNF

ZUKO, OURS, NARROW = "zuko's CNF", "ours", "ours, widths of zuko"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training step costs in a loop that is not ours, beside the CNF of zuko."""

    batch: tuple[int, ...] = (256, 1000)
    """Rows of a minibatch."""
    features: tuple[int, ...] = (2, 10)
    """Sizes of x."""
    context: tuple[int, ...] = (0, 3)
    """Sizes of the context; 0 for none."""
    training_steps: int = 300
    """Steps that each flow takes before it is measured again."""
    rounds: int = 10
    """Steps of each flow that are measured, at the start and after training."""
    learning_rate: float = 1e-3
    """Learning rate of Adam."""
    seed: int = 0
    """Seed of weights and rows."""
    out: Path = Path("runs/benchmarks/foreign_loop")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "batch", "features", "training_steps", "rounds")
        check_counts(self, "context", least=0)


class Simulator:
    """Rows of a mixture, moved and stretched by their context if there is one."""

    def __init__(self, features: int, context: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.mixture = Mixture(features, self.generator)
        self.weight = torch.randn(context, features, generator=self.generator)

    def __call__(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Draw rows and their contexts."""
        x = self.mixture.sample(rows)
        if len(self.weight) == 0:
            return x, None
        context = torch.randn(rows, len(self.weight), generator=self.generator)
        return x * (0.3 * context[:, :1]).exp() + context @ self.weight, context


class Loop:
    """The loop of others: fresh rows, the loss, its gradient and a step of Adam."""

    def __init__(self, flow: nn.Module, simulator: Simulator, batch: int, rate: float) -> None:
        self.flow, self.simulator, self.batch = flow, simulator, batch
        self.optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
        self.loss = float("nan")

    def step(self) -> None:
        """Take one step."""
        x, context = self.simulator(self.batch)
        loss = -self.flow(context).log_prob(x).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = loss.item()


def flows(features: int, context: int, simulator: Simulator) -> dict[str, nn.Module]:
    """The flows to compare, by name."""
    import zuko  # noqa: PLC0415 - the package of a peer

    ours = {OURS: CNF(features, context), NARROW: CNF(features, context, hidden_features=(64, 64))}
    for flow in ours.values():
        flow.initialize(*simulator(1000))
    return {ZUKO: zuko.flows.CNF(features, context), **ours}


def compare(features: int, context: int, batch: int, settings: Settings) -> list[dict[str, Any]]:
    """Measure the steps of each flow, at the start and after training."""
    torch.manual_seed(settings.seed)
    simulator = Simulator(features, context, settings.seed)
    loops = {
        name: Loop(flow, Simulator(features, context, settings.seed), batch, settings.learning_rate)
        for name, flow in flows(features, context, simulator).items()
    }
    steps: dict[str, Callable[[], object]] = {name: loop.step for name, loop in loops.items()}
    records = []
    for trained in (0, settings.training_steps):
        for loop in loops.values():
            for _ in range(trained):
                loop.step()
        times = measure(steps, settings.rounds)
        ratios = (f"{name} {times[name].median / times[ZUKO].median:.2f}" for name in loops)
        print(features, context, batch, trained, *ratios, sep=", ", flush=True)
        records += [
            {
                "features": features,
                "context": context,
                "batch": batch,
                "trained": trained,
                "flow": name,
                "milliseconds": asdict(times[name]),
                "ratio": times[name].median / times[ZUKO].median,
                "loss": loop.loss,
            }
            for name, loop in loops.items()
        ]
    return records


def main(settings: Settings) -> dict[str, Any]:
    """Measure, print the table, and write it; returns what was written."""
    if settings.quick:
        settings = replace(
            settings, batch=(8,), features=(2,), context=(0, 1), training_steps=1, rounds=1
        )
    facts = machine()
    records = [
        record
        for features in settings.features
        for context in settings.context
        for batch in settings.batch
        for record in compare(features, context, batch, settings)
    ]
    content = {"machine": facts, "settings": asdict(settings), "records": records}
    report(settings.out, content, "\n".join([table(records), describe(facts)]))
    return content


def table(records: list[dict[str, Any]]) -> str:
    """A row for each flow, setting and time of measurement."""
    headings = ["features", "context", "rows", "after steps", "flow", "ms", "quartiles"]
    rows = []
    for record in records:
        times = record["milliseconds"]
        low, high = times["quartiles"]
        rows.append(
            [
                *(str(record[name]) for name in ("features", "context", "batch", "trained")),
                record["flow"],
                f"{times['median']:.3g}",
                f"{low:.3g} to {high:.3g}",
                f"{record['ratio']:.2f}",
                f"{record['loss']:.2f}",
            ]
        )
    return markdown([*headings, f"flow / {ZUKO}", "loss (nats)"], rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        sys.exit(f"foreign_loop: {error}")
