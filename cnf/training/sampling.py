"""Random numbers of training, as functions of the seed and the step.

No generator lives from one step to the next. So a run resumes without its state, and several
processes draw the same numbers for the parts of a minibatch as one process.
"""

import torch
from numpy.random import SeedSequence
from torch import Tensor

_ORDER, _DRAWS, _VALIDATION = range(3)


class MinibatchSampler:
    """Sampler of minibatches without replacement, in a new order in each epoch.

    The last rows of an epoch, too few for a minibatch, are left out.
    """

    def __init__(self, rows: int, batch_size: int, *, seed: int, phase: int) -> None:
        self.rows = rows
        self.batch_size = min(batch_size, rows)
        self.seed = seed
        self.phase = phase
        self._epoch = (-1, torch.empty(0))

    def minibatch(self, step: int) -> Tensor:
        """Return the indices of the rows of a step, counted from 1."""
        epoch, position = divmod(step - 1, self.rows // self.batch_size)
        if self._epoch[0] != epoch:
            shuffle = _generator(self.seed, (_ORDER, self.phase, epoch))
            self._epoch = epoch, torch.randperm(self.rows, generator=shuffle)
        return self._epoch[1][position * self.batch_size :][: self.batch_size]


def draws(seed: int, *, phase: int, step: int, part: int, device: torch.device) -> torch.Generator:
    """Return the generator of the objective for one part of the minibatch of a step."""
    return _generator(seed, (_DRAWS, phase, step, part), device)


def validation_draws(chunk: int, device: torch.device) -> torch.Generator:
    """Return the generator for a chunk of the validation rows, the same in each validation."""
    return _generator(0, (_VALIDATION, chunk), device)


def _generator(
    seed: int, key: tuple[int, ...], device: torch.device | str = "cpu"
) -> torch.Generator:
    mixed = SeedSequence(seed, spawn_key=key).generate_state(2)
    return torch.Generator(device).manual_seed(int(mixed[0]) | int(mixed[1]) << 32)
