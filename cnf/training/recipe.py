"""The phases in which `fit` trains a flow when it is told nothing else."""

from functools import partial

from cnf.training.config import TrainingConfig


def recipe(
    *,
    likelihood_steps: int = 2000,
    batch_size: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> tuple[TrainingConfig, ...]:
    """Maximum likelihood at a loose tolerance, with a decaying rate.

    Args:
        likelihood_steps: Number of minibatches.
        batch_size: Rows of a minibatch.
        seed: Seed of the order of the rows and of everything that the objective draws.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a setting is out of range.

    Example:
        >>> [phase.steps for phase in recipe(likelihood_steps=100)]
        [100]
    """
    common = partial(TrainingConfig, batch_size=batch_size, seed=seed, progress=progress)
    return (common(steps=likelihood_steps),)
