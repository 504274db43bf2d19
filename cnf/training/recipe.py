"""The phases in which `fit` trains a flow when it is told nothing else."""

from functools import partial

from cnf._checks import check_count, check_number, is_positive
from cnf.objectives import FlowMatching, MaximumLikelihood
from cnf.training.config import TrainingConfig

_VALIDATIONS = 5
_MATCHING_STEPS = (50, 12_000)
_LIKELIHOOD_STEPS = (5, 200)
_ROWS_OF_A_LIKELIHOOD_STEP = 60


def recipe(
    rows: int | None = None,
    *,
    matching_steps: int | None = None,
    likelihood_steps: int | None = None,
    batch_size: int = 512,
    learning_rate: float = 4e-3,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[TrainingConfig, ...]:
    """Flow matching with an average of the weights, then maximum likelihood at a loose tolerance.

    A step of matching takes one evaluation of the network for each row, and so brings a flow near
    the data soon; likelihood then improves what is judged. Both rates decay to zero. Validation, if
    there are data for it, takes place five times in each phase.

    Args:
        rows: Number of rows to train on, which the numbers of steps follow, because few rows are
            soon learnt by heart; None for many.
        matching_steps: Minibatches of flow matching; 0 to leave the phase out; None for one for
            each row, but 50 at least and 12 000 at most.
        likelihood_steps: Minibatches of maximum likelihood, a step of which takes about as long as
            fifty of matching; 0 to leave the phase out; None for one for each 60 rows, but 5 at
            least and 200 at most.
        batch_size: Rows of a minibatch.
        learning_rate: Peak learning rate of matching; likelihood has a quarter of it.
        patience: Validations without a new best after which a phase ends early.
        seed: Seed of the order of the rows and of everything that the objectives draw.
        progress: Whether to show progress bars.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a setting is out of range, or both phases are left out.

    References:
        Lipman et al. (2023), Flow Matching for Generative Modeling.
        https://arxiv.org/abs/2210.02747

    Example:
        >>> [phase.steps for phase in recipe()]
        [12000, 200]
        >>> [phase.steps for phase in recipe(3000, likelihood_steps=100)]
        [3000, 100]
    """
    if rows is not None:
        check_count("rows", rows)
    if matching_steps is None:
        matching_steps = _following(rows, _MATCHING_STEPS)
    if likelihood_steps is None:
        likelihood_steps = _following(rows, _LIKELIHOOD_STEPS, _ROWS_OF_A_LIKELIHOOD_STEP)
    check_number("learning_rate", learning_rate, "positive and finite", is_positive)
    check_count("matching_steps", matching_steps, least=0)
    check_count("likelihood_steps", likelihood_steps, least=0)
    if not (matching_steps or likelihood_steps):
        raise ValueError("matching_steps and likelihood_steps must not both be 0.")
    phases = (
        (partial(FlowMatching, times="late"), matching_steps, learning_rate, 0.999),
        (MaximumLikelihood, likelihood_steps, learning_rate / 4, 0.99),
    )
    return tuple(
        TrainingConfig(
            objective=objective,
            steps=steps,
            batch_size=batch_size,
            learning_rate=rate,
            ema=ema,
            validate_every=max(1, steps // _VALIDATIONS),
            patience=patience,
            seed=seed,
            progress=progress,
        )
        for objective, steps, rate, ema in phases
        if steps
    )


def _following(rows: int | None, bounds: tuple[int, int], rows_of_a_step: int = 1) -> int:
    """Steps for a number of rows, within bounds; the upper one if it is not known."""
    least, most = bounds
    return most if rows is None else min(most, max(least, rows // rows_of_a_step))
