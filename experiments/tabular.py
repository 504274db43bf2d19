"""A CNF on a table of real numbers, beside a Gaussian and a mixture of Gaussians.

Run as ``python -m experiments.tabular --data PATH``; ``--help`` lists the settings. PATH is an .npz
file with x_train, x_val and x_test, or any table (CSV, .npy, Parquet), which is then split; or the
folder of the original files of POWER, GAS, HEPMASS, MINIBOONE and BSDS300, with ``--name``. Only
results on those whole tables can be set beside the published ones.

Log-likelihoods are means over the test rows, in nats, of standardised data; the error given is two
standard errors over the rows.

Claim: the flow's is higher than that of a mixture of Gaussians with full covariances, whose number
is chosen on validation rows.
"""

import json
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.files import write_text
from benchmarks.settings import check_counts
from cnf import CNF, Flow, History, fit, recipe, save
from cnf.data.splits import Splits
from cnf.metrics import gaussian_log_prob
from experiments.tabular_data import PAPERS, PUBLISHED, check_rows, read

ROWS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train a CNF on a table, and compare its likelihood with simpler densities."""

    data: Path
    """A table, .npz file of three tables, or folder of the benchmark files."""
    name: str | None = None
    """Which benchmark it is: power, gas, hepmass, miniboone or bsds300; None for another table."""
    standardize: bool = True
    """Whether rows are standardised by the mean and standard deviation of train and validation.
    The benchmarks are so, or as their authors chose, in any case."""
    hidden_features: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    matching_steps: int = 10_000
    """Steps of flow matching."""
    likelihood_steps: int = 300
    """Steps of maximum likelihood after them."""
    batch_size: int = 1024
    """Rows of a minibatch."""
    learning_rate: float = 0.01
    """Peak learning rate of matching."""
    patience: int = 2
    """Validations without a new best after which each of the two phases ends."""
    validation_rows: int = 2000
    """Validation rows on which the weights to keep are chosen; the mixture's size on all."""
    seconds: float = 300.0
    """CPU-seconds after which training ends, validation included."""
    components: tuple[int, ...] = (5, 10, 20, 40)
    """Sizes of the mixture to choose from."""
    seed: int = 0
    """Seed of weights, mixtures and training."""
    out: Path = Path("runs/tabular")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, with little of everything."""
    progress: bool = True
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "patience", "validation_rows")
        if not self.components:
            raise ValueError("components must be one or more sizes; got ().")
        check_counts(self, "components")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be more than 0; got {self.seconds}.")


@dataclass(frozen=True)
class LogLikelihood:
    """Mean log-likelihood of the test rows, in nats."""

    mean: float
    two_standard_errors: float

    @classmethod
    def of(cls, log_prob: NDArray[np.float64]) -> "LogLikelihood":
        """That of the log-likelihoods of single rows."""
        error = float(log_prob.std(ddof=1)) / math.sqrt(len(log_prob))
        return cls(float(log_prob.mean()), 2 * error)

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.two_standard_errors:.2f}"


@dataclass(frozen=True, kw_only=True)
class Results:
    """What is measured on the test rows."""

    data: str
    rows: tuple[int, int, int]
    """Of train, validation and test."""
    features: int
    likelihood: str
    flow: LogLikelihood
    gaussian: LogLikelihood | None
    """None if columns depend on each other, or rows are too few."""
    mixture: LogLikelihood
    components: int
    """Of the mixture, chosen on validation rows."""
    published: dict[str, float]
    """By others, on the same table; none if it is no whole benchmark."""
    steps: int
    training_cpu_seconds: float
    """Of the flow, validation included."""
    mixture_cpu_seconds: float
    """Of all mixtures."""
    cpu_seconds: float
    """In all."""
    seed: int


def main(settings: Settings) -> Results:
    """Read, train, measure, print, and write the results."""
    started = time.process_time()
    splits, published = read_rows(settings)
    if settings.quick:
        settings = made_quick(settings)
    folder = settings.out / (settings.name or settings.data.stem)
    folder.mkdir(parents=True, exist_ok=True)

    gaussian = gaussian_of(splits)
    before = time.process_time()
    mixture, components = mixture_log_prob(splits, settings)
    after = time.process_time()
    torch.manual_seed(settings.seed)
    flow = build(splits, settings)
    history = train(flow, splits, settings)
    trained = time.process_time()

    save(flow, folder / "model.safetensors")
    history.save(folder / "history.csv")
    results = Results(
        data=str(settings.data),
        rows=(len(splits.train), len(splits.validation), len(splits.test)),
        features=splits.train.shape[1],
        likelihood=flow.likelihood,
        flow=LogLikelihood.of(flow_log_prob(flow, as_tensor(splits.test))),
        gaussian=gaussian,
        mixture=LogLikelihood.of(mixture),
        components=components,
        published=published,
        steps=len(history.loss),
        training_cpu_seconds=trained - after,
        mixture_cpu_seconds=after - before,
        cpu_seconds=time.process_time() - started,
        seed=settings.seed,
    )
    write_text(folder / "results.json", json.dumps(asdict(results), indent=2))
    print(table(results))
    print(f"results in {folder}")
    return results


def read_rows(settings: Settings) -> tuple[Splits, dict[str, float]]:
    """The rows, and what others reached on them."""
    splits = read(settings.data, settings.name)
    published: dict[str, float] = {}
    if settings.data.is_dir():
        published = PUBLISHED.get(str(settings.name).lower(), {})
    elif settings.standardize:
        splits = splits.standardized()
    if settings.quick:
        splits = Splits(*(part[:1000] for part in splits))
    check_rows(splits)
    return splits, published


def made_quick(settings: Settings) -> Settings:
    """The settings with little of everything, in a folder of their own."""
    return replace(
        settings,
        hidden_features=(16, 16),
        matching_steps=30,
        likelihood_steps=3,
        components=(1, 2),
        out=settings.out / "quick",
    )


def build(splits: Splits, settings: Settings) -> Flow:
    """The flow, before training; its data come standardised."""
    return CNF(splits.train.shape[1], hidden_features=settings.hidden_features)


def train(flow: Flow, splits: Splits, settings: Settings) -> History:
    """Train the flow in place; it ends with the weights that are best on the validation rows."""
    started = time.process_time()
    phases = recipe(
        matching_steps=settings.matching_steps,
        likelihood_steps=settings.likelihood_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        patience=settings.patience,
        seed=settings.seed,
        progress=settings.progress,
    )
    return fit(
        flow,
        as_tensor(splits.train),
        phases,
        validation=as_tensor(splits.validation[: settings.validation_rows]),
        callbacks=[lambda _: time.process_time() - started > settings.seconds],
    )


@torch.no_grad()
def flow_log_prob(flow: Flow, x: Tensor) -> NDArray[np.float64]:
    """Log-likelihoods of rows by the flow, in nats."""
    return torch.cat([flow.log_prob(rows) for rows in x.split(ROWS_AT_ONCE)]).double().numpy()


def gaussian_of(splits: Splits) -> LogLikelihood | None:
    """That of the test rows by the Gaussian of the train rows; None if that has no density."""
    test, train = (
        torch.as_tensor(part, dtype=torch.float64) for part in (splits.test, splits.train)
    )
    log_prob = gaussian_log_prob(test, train)
    return None if log_prob is None else LogLikelihood.of(log_prob.numpy())


def mixture_log_prob(splits: Splits, settings: Settings) -> tuple[NDArray[np.float64], int]:
    """Log-likelihoods of the test rows, in nats, by the best mixture, and its size.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415 - needed for this alone
        from sklearn.mixture import GaussianMixture  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "mixtures come from scikit-learn, which is not installed: pip install scikit-learn."
        ) from error
    sizes = [size for size in settings.components if size <= len(splits.train)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # validation judges them anyway
        mixtures = [
            GaussianMixture(size, random_state=settings.seed).fit(splits.train) for size in sizes
        ]
    best = max(mixtures, key=lambda mixture: mixture.score(splits.validation))
    return best.score_samples(splits.test), best.n_components


def as_tensor(rows: NDArray[np.floating]) -> Tensor:
    """Rows in single precision."""
    return torch.as_tensor(rows, dtype=torch.float32)


def table(results: Results) -> str:
    """The results as a table for people."""
    train_rows, validation_rows, test_rows = results.rows
    lines = [
        f"{results.data}: {results.features} columns; {train_rows} rows to train on, "
        f"{validation_rows} for validation, {test_rows} for test",
        "test log-likelihood in nats, with two standard errors",
        f"  {'flow':<20}{results.flow!s:<20}{results.likelihood}, {results.steps} steps in "
        f"{results.training_cpu_seconds:.0f} CPU-seconds",
        f"  {'Gaussian':<20}{results.gaussian or 'no density'}",
        f"  {'mixture':<20}{results.mixture!s:<20}{results.components} Gaussians",
    ]
    if results.published:
        lines.append("as published")
    lines += [f"  {name:<20}{value:<20}{PAPERS[name]}" for name, value in results.published.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"tabular: {error}")
