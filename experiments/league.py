"""`fit` without settings on small tables, beside a Gaussian and a mixture of Gaussians.

Run as ``python -m experiments.league PATH ...``; ``--help`` lists the settings. Each PATH is a
table as `experiments.tabular` reads it; scikit-learn's own tables are always there. From each table
and each split, some rows are drawn to fit to, and the log-likelihoods are means over others, in
nats of the table's own units, and then over the splits.

The Gaussian has Ledoit and Wolf's covariance; the mixture has full covariances, and as many
components, up to ten, as the Bayesian information criterion says.

Claim: on none is the flow more than 0.1 nats below the better of the two, and on most it is above.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_linnerud, load_wine
from sklearn.mixture import GaussianMixture

from benchmarks.files import write_text
from benchmarks.settings import check_counts
from benchmarks.timing import markdown
from cnf import CNF, fit
from cnf.bases import GaussianMixtureBase
from experiments.tabular_data import read

Table = NDArray[np.float64]

SMALL: dict[str, Callable[[], Table]] = {
    "iris": lambda: load_iris().data,
    "wine": lambda: load_wine().data,
    "breast cancer": lambda: load_breast_cancer().data,
    "diabetes": lambda: load_diabetes().data,
    "linnerud": lambda: np.hstack([load_linnerud().data, load_linnerud().target]),
}
"""Tables of scikit-learn."""
TOLERATED = 0.1
"""Nats by which the flow may be below the better of the others."""
_MOST_COMPONENTS = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fit a CNF without settings to small tables, beside a Gaussian and a mixture."""

    data: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Further tables."""
    rows: tuple[int, ...] = (50, 200, 1000)
    """Numbers of rows to fit to, at most four fifths of a table."""
    splits: int = 5
    """Number of splits."""
    held_out: int = 1000
    """Most rows to measure on."""
    out: Path = Path("runs/league")
    """Folder of the results; those that are there are not made again."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def __post_init__(self) -> None:
        check_counts(self, "rows", "splits", "held_out")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Mean log-likelihoods of held-out rows, in nats, over the splits of one table."""

    table: str
    rows: int
    features: int
    gaussian: float
    mixture: float
    flow: float
    mixtures_chosen: int
    """Splits in which the flow ended as a `GaussianMixtureBase`."""
    seconds: float
    """CPU time of a `fit`."""

    @property
    def gain(self) -> float:
        """Nats above the better of the others."""
        return self.flow - max(self.gaussian, self.mixture)


def main(settings: Settings) -> list[Result]:
    """Fit and measure where there is no result yet, print the table, and write it."""
    if settings.quick:
        settings = replace(settings, rows=(40,), splits=1, out=settings.out / "quick")
    settings.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name, rows, table in tasks(settings):
        file = settings.out / f"{name}_{rows}.json"
        if not file.exists():
            result = league(name, table, rows, settings)
            write_text(file, json.dumps(asdict(result), indent=2))
            print(name, rows, f"{result.gain:+.2f} nats", flush=True)
        results.append(Result(**json.loads(file.read_text())))
    text = report(results)
    write_text(settings.out / "league.md", text)
    print(text)
    return results


def tasks(settings: Settings) -> Iterator[tuple[str, int, Table]]:
    """Yield the name of each table, the number of rows to fit to, and the table."""
    tables = dict(SMALL)
    if settings.quick:
        tables = {"iris": tables["iris"]}
    for path in settings.data:
        tables[path.stem] = lambda path=path: np.concatenate(list(read(path, None)))
    for name, load in tables.items():
        table = np.asarray(load(), dtype=np.float64)
        most = len(table) * 4 // 5
        for rows in sorted({min(rows, most) for rows in settings.rows}):
            yield name, rows, table


def league(name: str, table: Table, rows: int, settings: Settings) -> Result:
    """Fit the three densities to rows of each split."""
    found = [measured(*split(table, rows, seed, settings)) for seed in range(settings.splits)]
    gaussian, mixture, flow, chosen, seconds = np.array(found, dtype=float).T
    return Result(
        table=name,
        rows=rows,
        features=table.shape[1],
        gaussian=float(gaussian.mean()),
        mixture=float(mixture.mean()),
        flow=float(flow.mean()),
        mixtures_chosen=int(chosen.sum()),
        seconds=float(seconds.mean()),
    )


def split(table: Table, rows: int, seed: int, settings: Settings) -> tuple[Table, Table, int]:
    """Return rows to fit to and others, without columns that are constant in the former."""
    order = np.random.RandomState(seed).permutation(len(table))
    training = table[order[:rows]]
    held_out = table[order[rows : rows + settings.held_out]]
    varied = training.std(0) > 0
    return training[:, varied], held_out[:, varied], seed


def measured(
    training: Table, held_out: Table, seed: int
) -> tuple[float, float, float, bool, float]:
    """Return the means of three log-likelihoods, whether a mixture was taken, and the time."""
    mean, std = training.mean(0), training.std(0)
    x, others, unit = (training - mean) / std, (held_out - mean) / std, -float(np.log(std).sum())
    shrunk = LedoitWolf().fit(x)
    gaussian = multivariate_normal(shrunk.location_, shrunk.covariance_)
    mixture = best_mixture(x, seed)
    torch.manual_seed(seed)
    flow = CNF(x.shape[1])
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of repeated values, which these tables have
        fit(flow, torch.from_numpy(x).float())
    seconds = time.process_time() - started
    with torch.no_grad():
        found = flow.log_prob(torch.from_numpy(others).float()).double()
    return (
        float(gaussian.logpdf(others).mean()) + unit,
        float(mixture.score(others)) + unit,
        float(found.mean()) + unit,
        isinstance(flow.base, GaussianMixtureBase),
        seconds,
    )


def best_mixture(x: Table, seed: int) -> GaussianMixture:
    """Return the mixture with the least Bayesian information criterion."""
    sizes = range(1, min(_MOST_COMPONENTS, len(x) // 2) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of expectation-maximisation that has not settled
        mixtures = [GaussianMixture(size, random_state=seed).fit(x) for size in sizes]
    return min(mixtures, key=lambda mixture: mixture.bic(x))


def report(results: list[Result]) -> str:
    """Return the table, and what the claim says of it, as markdown."""
    columns = (
        "table",
        "rows",
        "columns",
        "Gaussian",
        "mixture",
        "fit",
        "gain",
        "mixtures",
        "CPU-s",
    )
    lines = [
        (
            each.table,
            str(each.rows),
            str(each.features),
            nats(each.gaussian),
            nats(each.mixture),
            nats(each.flow),
            f"{each.gain:+.2f}",
            str(each.mixtures_chosen),
            f"{each.seconds:.1f}",
        )
        for each in results
    ]
    above = sum(each.gain > 0 for each in results)
    below = sum(each.gain < -TOLERATED for each in results)
    return (
        f"{markdown(columns, lines)}\nAbove the better of the others on {above} of "
        f"{len(results)}, more than {TOLERATED} nats below it on {below}.\n"
    )


def nats(value: float) -> str:
    """Return a log-likelihood as text; short where a mixture has collapsed."""
    return f"{value:.2f}" if value > -1e4 else f"{value:.0e}"


if __name__ == "__main__":
    main(tyro.cli(Settings))
