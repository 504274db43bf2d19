"""Everything random in training, as a function of the seed and the step alone.

No generator lives from one step to the next. So a run that resumes needs none of its state, and
processes that share a minibatch draw what one process draws that takes its parts in turn.
"""

import torch
from numpy.random import SeedSequence
from torch import Tensor

_ORDER, _DRAWS, _VALIDATION = range(3)


class MinibatchSampler:
    """Which rows make the minibatch of each step: all once in an epoch, then in a new order.

    Rows that fill no minibatch at the end of an epoch wait for the next one.

    Args:
        rows: Number of rows.
        batch_size: Rows of a minibatch; all rows if there are fewer.
        seed: Seed of the phase.
        phase: Number of the phase.
    """

    def __init__(self, rows: int, batch_size: int, *, seed: int, phase: int) -> None:
        self.rows = rows
        self.batch_size = min(batch_size, rows)
        self.seed = seed
        self.phase = phase
        self._epoch = (-1, torch.empty(0))

    def minibatch(self, step: int) -> Tensor:
        """Indices of the rows of a step, counted from 1."""
        epoch, position = divmod(step - 1, self.rows // self.batch_size)
        if self._epoch[0] != epoch:
            shuffle = _generator(self.seed, (_ORDER, self.phase, epoch))
            self._epoch = epoch, torch.randperm(self.rows, generator=shuffle)
        return self._epoch[1][position * self.batch_size :][: self.batch_size]


def draws(seed: int, *, phase: int, step: int, part: int, device: torch.device) -> torch.Generator:
    """What the objective draws from for one part of the minibatch of a step."""
    return _generator(seed, (_DRAWS, phase, step, part), device)


def validation_draws(chunk: int, device: torch.device) -> torch.Generator:
    """What is drawn from for a chunk of the rows at a validation: the same at each."""
    return _generator(0, (_VALIDATION, chunk), device)


def _generator(
    seed: int, key: tuple[int, ...], device: torch.device | str = "cpu"
) -> torch.Generator:
    mixed = SeedSequence(seed, spawn_key=key).generate_state(2)
    return torch.Generator(device).manual_seed(int(mixed[0]) | int(mixed[1]) << 32)
