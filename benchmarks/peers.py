"""Ways of training a density in the plane that `benchmarks.quality` compares.

Each builds a flow, trains it on rows, and shows it to a clock after every step until that says
stop. The peers follow their authors' settings, and see standardised rows as ours do.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.flows import solver_of
from cnf import (
    CNF,
    Exact,
    Flow,
    MaximumLikelihood,
    MLPField,
    Standardize,
    TrainingConfig,
    VectorField,
    fit,
)
from cnf.training.history import StepReport
from cnf.transforms import ContinuousTransform

OURS = "ours"
"""Name of the way that the claim is about."""
LogProb = Callable[[Tensor], Tensor]


class Clock(Protocol):
    """Counts CPU time, but for its own looks at the density; True once the time is over."""

    def __call__(self, log_prob: LogProb) -> bool:
        """Look at the density, if it is time to."""


Way = Callable[[Tensor, int, Clock], None]
"""Trains on rows ``(rows, 2)`` with a seed, and shows the clock a log-density after each step."""


def recipe(x: Tensor, seed: int, clock: Clock) -> None:
    """Ours: the default flow, and what `fit` does when it is told nothing else."""
    torch.manual_seed(seed)
    fit(CNF(2), x, callbacks=[_showing(clock)])


def ffjord(x: Tensor, seed: int, clock: Clock) -> None:
    """FFJORD's recipe for its toy sets, in our code.

    Likelihood with the exact trace; three layers of 64 units; the adjoint of dopri5 at tolerance
    1e-5; Adam with a rate of 1e-3 and batches of 100.
    """
    torch.manual_seed(seed)
    field = MLPField(
        2, hidden_features=(64, 64, 64), layer="concatsquash", activation="tanh", time_features=0
    )
    flow = Flow([Standardize.from_data(x), ContinuousTransform(field)])
    objective = MaximumLikelihood(flow, solver=solver_of(1e-5, "adjoint"), divergence=Exact())
    config = TrainingConfig(
        steps=_ENDLESS,
        batch_size=100,
        learning_rate=1e-3,
        schedule="constant",
        gradient_clip=None,
        seed=seed,
        progress=False,
    )
    fit(objective, x, config, validation=None, callbacks=[_showing(clock)])


def zuko_cnf(x: Tensor, seed: int, clock: Clock) -> None:
    """The CNF of zuko by likelihood: its defaults but for the exact trace and 3 x 64 units."""
    import zuko

    torch.manual_seed(seed)
    standardize = Standardize.from_data(x)
    flow = zuko.flows.CNF(2, hidden_features=(64, 64, 64), exact=True)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)

    def log_prob(x: Tensor) -> Tensor:
        z, ladj = standardize.to_base_and_ladj(x)
        return flow().log_prob(z) + ladj

    for rows in _minibatches(x, 512, seed):
        loss = -log_prob(rows).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if clock(log_prob):
            return


def torchcfm_matching(x: Tensor, seed: int, clock: Clock) -> None:
    """Conditional flow matching by torchcfm: its network of 3 x 64 units, Adam, batches of 256."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.models import MLP

    torch.manual_seed(seed)
    standardize = Standardize.from_data(x)
    network = MLP(dim=2, w=64, time_varying=True)
    flow = Flow([standardize, ContinuousTransform(_TorchCFMField(network))])
    matcher = ConditionalFlowMatcher(sigma=0.0)
    optimizer = torch.optim.Adam(network.parameters())
    for rows in _minibatches(standardize.to_base(x), 256, seed):
        t, state, velocity = matcher.sample_location_and_conditional_flow(
            torch.randn_like(rows), rows
        )
        loss = (network(torch.cat([state, t[:, None]], -1)) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if clock(flow.log_prob):
            return


class _TorchCFMField(VectorField):
    """torchcfm's network, which takes x and then t."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(2)
        self.network = network

    def _velocity(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        del context
        return self.network(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))


def ways() -> dict[str, Way]:
    """The ways whose libraries are installed, by name."""
    everything: dict[str, tuple[str, Way]] = {
        OURS: ("cnf", recipe),
        "FFJORD's recipe": ("cnf", ffjord),
        "zuko's CNF": ("zuko", zuko_cnf),
        "torchcfm": ("torchcfm", torchcfm_matching),
    }
    return {
        name: way
        for name, (library, way) in everything.items()
        if importlib.util.find_spec(library)
    }


_ENDLESS = 10**9


def _showing(clock: Clock) -> Callable[[StepReport], bool]:
    """A callback of `fit` that shows the flow to the clock."""
    return lambda report: clock(report.flow.log_prob)


def _minibatches(x: Tensor, size: int, seed: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        yield from x[order].split(size)
