"""What each regularisation buys: likelihood against the evaluations that a solve takes.

Run as ``python -m experiments.ablation``; ``--help`` lists the settings. Trains one flow for each
data set, variant and seed, in parallel processes, and writes one table (CSV and Markdown) and one
figure. A run that was measured before with the same settings is not repeated, so that the
experiment resumes where it was stopped.
"""

import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from benchmarks.files import write_text
from cnf import (
    Exact,
    Flow,
    MaximumLikelihood,
    MLPField,
    ODEError,
    ODESolver,
    Standardize,
    TrainingConfig,
    TrainingError,
    count_evaluations,
    fit,
)
from cnf.data.toy import TOY_NAMES, toy_density
from cnf.regularizers import hjb_residual, jacobian_frobenius, kinetic_energy
from cnf.transforms import ContinuousTransform
from cnf.vector_fields import PotentialField
from experiments import ablation_report

_REGULARIZERS = {part.name: part for part in (kinetic_energy, jacobian_frobenius, hjb_residual)}
_EVALUATION = ODESolver(rtol=1e-5, atol=1e-5, error_norm="points_and_ladj")
_COST_ROWS = 2000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What each regularisation buys: likelihood against the evaluations that a solve takes."""

    data: tuple[str, ...] = TOY_NAMES
    """Toy sets."""
    table: Path | None = None
    """A table to train on too: an .npz file with the arrays x_train and x_test."""
    weights: tuple[float, ...] = (0.01, 0.1)
    """Weights of the kinetic energy, of the Frobenius norm, and of both."""
    hjb_weights: tuple[float, ...] = (0.0, 0.1)
    """Weights of the HJB residual for a potential field."""
    random_end_times: tuple[float, ...] = (0.25,)
    """Half-widths of STEER's random end time."""
    seeds: int = 2
    """Number of seeds."""
    steps: int = 500
    """Training steps."""
    batch_size: int = 256
    """Rows of a minibatch."""
    rows: int = 20_000
    """Rows to train on; of a table, all."""
    held_out: int = 10_000
    """Rows to measure on; of a table, at most."""
    processes: int = 2
    """Runs at a time, each on one thread."""
    out: Path = Path("runs/ablation")
    """Folder of the results."""
    quick: bool = False
    """Only see that everything works, on one set with little in all else."""
    progress: bool = True
    """Whether to show a progress bar."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train."""

    name: str
    """What is done, without the weight."""
    weight: float = 0.0
    """Weight of each of the regularizers, or half-width of the random end time."""
    regularizers: tuple[str, ...] = ()
    """Names of the regularizers."""
    potential: bool = False
    """Whether the field is a gradient."""

    @property
    def label(self) -> str:
        """Name and weight."""
        return f"{self.name} {self.weight:g}" if self.weight else self.name


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training, and everything that its result depends on."""

    data: str
    variant: Variant
    seed: int
    steps: int
    batch_size: int
    rows: int
    held_out: int


def main(settings: Settings) -> list[dict[str, Any]]:
    """Train what is missing, then write table and figure; returns the rows of the table."""
    if settings.quick:
        settings = replace(
            settings,
            data=settings.data[:1],
            weights=settings.weights[:1],
            hjb_weights=settings.hjb_weights[-1:],
            seeds=2,
            steps=2,
            batch_size=32,
            rows=200,
            held_out=50,
            out=settings.out / "quick",
        )
    runs = settings.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    todo = plan(settings)
    missing = [run for run in todo if read(runs, run) is None]
    print(f"{len(todo)} runs, of which {len(todo) - len(missing)} are done")
    context = multiprocessing.get_context("spawn")  # threads and forks do not mix
    with ProcessPoolExecutor(settings.processes, mp_context=context) as pool:
        jobs = [pool.submit(measure_and_write, run, runs) for run in missing]
        bar = tqdm(as_completed(jobs), total=len(jobs), disable=not settings.progress)
        try:
            for job in bar:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    records = [record for run in todo if (record := read(runs, run)) is not None]
    rows = ablation_report.write(records, settings.out)
    print(f"table and figure in {settings.out}")
    return rows


def variants(settings: Settings) -> list[Variant]:
    """Every way to train, in the order of the table."""
    kinetic, frobenius = "kinetic_energy", "jacobian_frobenius"
    penalties = {"kinetic": (kinetic,), "Frobenius": (frobenius,), "both": (kinetic, frobenius)}
    return [
        Variant(name="none"),
        *(
            Variant(name=name, weight=weight, regularizers=regularizers)
            for name, regularizers in penalties.items()
            for weight in settings.weights
        ),
        *(
            Variant(name="random end time", weight=half_width)
            for half_width in settings.random_end_times
        ),
        *(
            Variant(
                name="potential + HJB" if weight else "potential",
                weight=weight,
                regularizers=("hjb_residual",) if weight else (),
                potential=True,
            )
            for weight in settings.hjb_weights
        ),
    ]


def plan(settings: Settings) -> list[Run]:
    """Every run: seeds outermost, so that an early stop leaves a whole table of fewer seeds."""
    data = [*settings.data, *([str(settings.table)] if settings.table else [])]
    return [
        Run(
            data=name,
            variant=variant,
            seed=seed,
            steps=settings.steps,
            batch_size=settings.batch_size,
            rows=settings.rows,
            held_out=settings.held_out,
        )
        for seed, name, variant in itertools.product(
            range(settings.seeds), data, variants(settings)
        )
    ]


def path_of(folder: Path, run: Run) -> Path:
    """Where the record of a run is."""
    return folder / f"{Path(run.data).stem}-{run.variant.label}-{run.seed}.json".replace(" ", "_")


def read(folder: Path, run: Run) -> dict[str, Any] | None:
    """The record of a run; None if there is none of these settings."""
    path = path_of(folder, run)
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if record["run"] == json.loads(json.dumps(asdict(run))) else None


def measure_and_write(run: Run, folder: Path) -> None:
    """Train and measure one flow, on one thread, and keep the record."""
    torch.set_num_threads(1)
    try:
        measured: dict[str, Any] = measure(run)
    except (ODEError, TrainingError) as error:
        measured = {"failure": str(error)}  # a result too, and no reason to stop the others
    record = {"run": asdict(run), **measured}
    write_text(path_of(folder, run), json.dumps(record, indent=2))


def measure(run: Run) -> dict[str, float]:
    """Train one flow and measure it at a tolerance of 1e-5; densities in nats."""
    train, test, entropy = data_of(run)
    torch.manual_seed(run.seed)
    features = train.shape[-1]
    field = (
        PotentialField(features)
        if run.variant.potential
        else MLPField(features, layer="concatsquash", time_features=0)
    )
    transform = ContinuousTransform(field, solver=_EVALUATION)
    flow = Flow([Standardize.from_data(train), transform])
    objective = MaximumLikelihood(
        flow,
        {_REGULARIZERS[name]: run.variant.weight for name in run.variant.regularizers},
        random_end_time=run.variant.weight if run.variant.name == "random end time" else 0.0,
    )
    config = TrainingConfig(
        steps=run.steps, batch_size=run.batch_size, seed=run.seed, progress=False
    )
    started = time.process_time()
    fit(objective, train, config, validation=None)
    seconds = (time.process_time() - started) / run.steps
    with torch.no_grad():
        with count_evaluations(flow) as nfe:
            nll = -float(flow.log_prob(test).double().mean())
        costs = path_costs(transform, flow.chain[0].to_base(test[:_COST_ROWS]))
    return {
        "nll": nll,
        "kl_gap": nll - entropy,
        "nfe_forward": nfe.value,
        "nfe_backward": backward_evaluations(flow, test[: run.batch_size]),
        "seconds_per_step": seconds,
        **costs,
    }


@torch.no_grad()
def path_costs(transform: ContinuousTransform, x: Tensor) -> dict[str, float]:
    """What the paths cost on average, how straight they are, and the error of a round trip.

    Straightness is the squared distance moved over the kinetic energy: 1 for straight paths of
    constant speed, less for all others.
    """
    exact = transform.using(divergence=Exact())
    z, _, costs = exact.to_base_with_costs(x, regularizers=[kinetic_energy, jacobian_frobenius])
    kinetic, frobenius = costs.mean(-1).tolist()
    return {
        "kinetic_energy": kinetic,
        "jacobian_frobenius": frobenius,
        "straightness": float((z - x).square().sum(-1).mean()) / kinetic,
        "round_trip_error": float((transform.to_data(z) - x).square().sum(-1).mean().sqrt()),
    }


def backward_evaluations(flow: Flow, x: Tensor) -> int:
    """Evaluations of the adjoint's backward solve for the mean log-density of one minibatch."""
    with count_evaluations(flow) as nfe:
        loss = flow.log_prob(x).mean()
        forward = nfe.value
        loss.backward()
    return nfe.value - forward


def data_of(run: Run) -> tuple[Tensor, Tensor, float]:
    """Rows to train and to measure on, and the entropy of the truth (NaN if unknown)."""
    if run.data in TOY_NAMES:
        truth = toy_density(run.data)
        generator = torch.Generator().manual_seed(run.seed)
        train = truth.sample(run.rows, generator=generator)
        # The same rows for each seed and variant: differences of NLL are then those of the flows.
        test = truth.sample(run.held_out, generator=torch.Generator().manual_seed(1_000_000))
        return train, test, -float(truth.log_prob(test).mean())
    with np.load(run.data, allow_pickle=False) as arrays:
        train, test = (
            torch.as_tensor(arrays[name], dtype=torch.float32) for name in ("x_train", "x_test")
        )
    return train, test[: run.held_out], float("nan")


def check(settings: Settings) -> None:
    """Refuse settings that would fail in the middle of the experiment."""
    unknown = sorted(set(settings.data) - set(TOY_NAMES))
    if unknown:
        raise ValueError(f"data must be among {', '.join(TOY_NAMES)}; got {', '.join(unknown)}.")
    if settings.table is not None:
        with np.load(settings.table, allow_pickle=False) as arrays:
            absent = {"x_train", "x_test"} - set(arrays)
        if absent:
            raise ValueError(f"{str(settings.table)!r} has no array {', '.join(sorted(absent))}.")


def _command_line(arguments: Sequence[str] | None = None) -> None:
    settings = tyro.cli(Settings, args=arguments)
    check(settings)
    main(settings)


if __name__ == "__main__":
    try:
        _command_line()
    except (OSError, ValueError) as error:
        sys.exit(f"ablation: {error}")
