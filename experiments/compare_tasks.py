"""What `experiments.compare` trains flows on: toy sets, a table, and digits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cnf import Flow, Standardize
from cnf.data.toy import toy_density
from cnf.metrics import bits_per_dim
from cnf.transforms import Dequantize, Flatten, Logit, Transform
from experiments.digits_data import LEVELS, SIDE, read_scikit_learn
from experiments.tabular_data import read

_PIXELS = SIDE * SIDE


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to learn from."""

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    transforms: Callable[[], list[Transform]]
    """From the data to what a flow of vectors is to learn."""
    log_truth: Tensor | None = None
    """True log-densities of the test rows, in nats."""
    dimensions: int = 0
    """Of an image, whose likelihood is told in bits for each; 0 to tell nats."""

    @property
    def unit(self) -> str:
        """What a loss is told in."""
        if self.dimensions:
            return "bits/dim"
        return "nats" if self.log_truth is None else "nats from the truth"

    def loss(self, log_prob: Tensor) -> Tensor:
        """What log-likelihoods of the test rows, in nats, are told as; the lower, the better."""
        if self.dimensions:
            return bits_per_dim(log_prob.double(), self.dimensions)
        truth = 0.0 if self.log_truth is None else self.log_truth.double()
        return truth - log_prob.double()


def toy_tasks(names: Sequence[str], rows: int, held_out: int, seed: int) -> Iterable[Task]:
    """Toy sets, whose truth is known."""
    for name in names:
        truth = toy_density(name)
        generator = torch.Generator().manual_seed(seed)
        train, validation, test = (
            truth.sample(count, generator=generator) for count in (rows, held_out // 10, held_out)
        )
        yield Task(
            name=name,
            train=train,
            validation=validation,
            test=test,
            transforms=lambda train=train: [Standardize.from_data(train)],
            log_truth=truth.log_prob(test),
        )


def table_task(path: Path, rows: int, held_out: int) -> Task:
    """A table of real numbers, standardised.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not as it must be.
    """
    parts = read(path, None).standardized()
    train, validation, test = (torch.as_tensor(part, dtype=torch.float32) for part in parts)
    return Task(
        name=path.stem,
        train=train[:rows],
        validation=validation[: held_out // 10],
        test=test[:held_out],
        transforms=list,
    )


def digits_task(rows: int, held_out: int) -> Task:
    """Digits of 8 x 8 pixels, whose likelihood is a bound of that of the integers.

    Raises:
        ModuleNotFoundError: If scikit-learn, which carries them, is not installed.
    """
    train, validation, test = read_scikit_learn()
    logits = Flow(_pixels_as_reals()).to_base(train, generator=torch.Generator().manual_seed(0))
    return Task(
        name="digits",
        train=train[:rows],
        validation=validation[:held_out],
        test=test[:held_out],
        transforms=lambda: [*_pixels_as_reals(), Standardize.from_data(logits)],
        dimensions=_PIXELS,
    )


def _pixels_as_reals() -> list[Transform]:
    return [Flatten((1, SIDE, SIDE)), Dequantize(_PIXELS, LEVELS), Logit(_PIXELS, alpha=0.01)]
