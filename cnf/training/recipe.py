"""The phases in which `fit` trains a flow when it is told nothing else."""

from dataclasses import dataclass
from functools import partial

from cnf._checks import check_count, check_number, check_seed, is_positive
from cnf.objectives import FlowMatching, MaximumLikelihood
from cnf.training.config import TrainingConfig

_VALIDATIONS = 5
_MATCHING_STEPS = (50, 12_000)
_LIKELIHOOD_STEPS = (5, 200)
_ROWS_OF_A_LIKELIHOOD_STEP = 60


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Flow matching with an average of the weights, then maximum likelihood at a loose tolerance.

    A step of matching takes one evaluation of the network for each row, and so brings a flow near
    the data soon; likelihood then improves what is judged. Both rates decay to zero. Validation, if
    there are data for it, takes place five times in each phase.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a setting is out of range, or both phases are left out.

    References:
        Lipman et al. (2023), Flow Matching for Generative Modeling.
        https://arxiv.org/abs/2210.02747

    Example:
        >>> [phase.steps for phase in Recipe(likelihood_steps=100).phases(3000)]
        [3000, 100]
    """

    matching_steps: int | None = None
    """Steps of flow matching; 0 to leave it out; None for one for each row, but 50 at least and
    12 000 at most."""
    likelihood_steps: int | None = None
    """Steps of maximum likelihood after them, each of which takes as long as fifty of matching; 0
    to leave it out; None for one for each 60 rows, but 5 at least and 200 at most."""
    batch_size: int = TrainingConfig.batch_size
    """Rows of a minibatch; all rows if there are fewer."""
    learning_rate: float = TrainingConfig.learning_rate
    """Peak learning rate of matching; likelihood has a quarter of it."""
    seed: int = TrainingConfig.seed
    """Seed of the order of the rows and of everything that the objectives draw."""

    def __post_init__(self) -> None:
        for name in ("matching_steps", "likelihood_steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=0)
        if self.matching_steps == self.likelihood_steps == 0:
            raise ValueError("matching_steps and likelihood_steps must not both be 0.")
        check_count("batch_size", self.batch_size)
        check_number("learning_rate", self.learning_rate, "positive and finite", is_positive)
        check_seed("seed", self.seed)

    def phases(
        self, rows: int | None = None, *, patience: int | None = None, progress: bool = True
    ) -> tuple[TrainingConfig, ...]:
        """The phases of training on so many rows; `recipe` documents the arguments."""
        if rows is not None:
            check_count("rows", rows)
        matching, likelihood = self.matching_steps, self.likelihood_steps
        if matching is None:
            matching = _following(rows, _MATCHING_STEPS)
        if likelihood is None:
            likelihood = _following(rows, _LIKELIHOOD_STEPS, _ROWS_OF_A_LIKELIHOOD_STEP)
        phases = (
            (partial(FlowMatching, times="late"), matching, self.learning_rate, 0.999),
            (MaximumLikelihood, likelihood, self.learning_rate / 4, 0.99),
        )
        return tuple(
            TrainingConfig(
                objective=objective,
                steps=steps,
                batch_size=self.batch_size,
                learning_rate=rate,
                ema=ema,
                validate_every=max(1, steps // _VALIDATIONS),
                patience=patience,
                seed=self.seed,
                progress=progress,
            )
            for objective, steps, rate, ema in phases
            if steps
        )


def recipe(
    rows: int | None = None,
    *,
    matching_steps: int | None = Recipe.matching_steps,
    likelihood_steps: int | None = Recipe.likelihood_steps,
    batch_size: int = Recipe.batch_size,
    learning_rate: float = Recipe.learning_rate,
    patience: int | None = None,
    seed: int = Recipe.seed,
    progress: bool = True,
) -> tuple[TrainingConfig, ...]:
    """The phases of a `Recipe`, which documents the settings and errors.

    Args:
        rows: Number of rows to train on, which the numbers of steps follow, because few rows are
            soon learnt by heart; None for many.
        matching_steps: As in `Recipe`.
        likelihood_steps: As in `Recipe`.
        batch_size: As in `Recipe`.
        learning_rate: As in `Recipe`.
        patience: Validations without a new best after which a phase ends early.
        seed: As in `Recipe`.
        progress: Whether to show progress bars.

    Example:
        >>> [phase.steps for phase in recipe()]
        [12000, 200]
        >>> [phase.steps for phase in recipe(3000, likelihood_steps=100)]
        [3000, 100]
    """
    settings = Recipe(
        matching_steps=matching_steps,
        likelihood_steps=likelihood_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    return settings.phases(rows, patience=patience, progress=progress)


def _following(rows: int | None, bounds: tuple[int, int], rows_of_a_step: int = 1) -> int:
    """Steps for a number of rows, within bounds; the upper one if it is not known."""
    least, most = bounds
    return most if rows is None else min(most, max(least, rows // rows_of_a_step))
