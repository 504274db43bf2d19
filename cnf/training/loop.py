"""The training loop, written once."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from cnf.flow import Flow
from cnf.objectives import MaximumLikelihood
from cnf.ode import ODEError
from cnf.training.config import TrainingConfig
from cnf.training.history import History
from cnf.training.rows import Data, as_tensors, minibatches, warn_if_far_from_standard
from cnf.vector_fields import count_evaluations

_VALIDATION_ROWS = 8192
_WARM_UP = 0.02


class TrainingError(RuntimeError):
    """Training stopped because a loss or gradient was not finite, or a solve failed.

    The flow holds the weights of the best validation or, without one, the last good weights, those
    that last gave a finite loss and gradient; `history` holds the steps before the one that failed.
    """

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message, history)  # all arguments, so that it can be pickled
        self.history = history

    def __str__(self) -> str:
        return str(self.args[0])


def fit(
    objective: nn.Module,
    data: Data,
    config: TrainingConfig = TrainingConfig(),  # noqa: B008 - frozen
    *,
    validation: Data | None = None,
) -> History:
    """Train a flow in place.

    Args:
        objective: A flow, trained by `MaximumLikelihood`, or an objective: a module with a `flow`,
            whose ``forward(x, context, generator=...)`` returns the loss. Its own parameters are
            trained too.
        data: Rows ``(rows, *event_shape)``, or rows and contexts ``(rows, context_features)``.
        config: Settings.
        validation: Held-out data of the same form. The flow ends with the weights whose
            negative log-likelihood of them, as `log_prob` gives it, is lowest, also when training
            is interrupted from the keyboard.

    Returns:
        The record of the run.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the data do not fit the flow, or hold NaN or inf.
        TrainingError: If training cannot go on; the flow keeps the best or last good weights.

    Example:
        >>> from cnf import CNF
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> history = fit(CNF(2), x, TrainingConfig(steps=3, progress=False))
        >>> len(history.loss)
        3
    """
    if isinstance(objective, Flow):
        objective = MaximumLikelihood(objective)
    flow = getattr(objective, "flow", None)
    if not isinstance(flow, Flow):
        raise TypeError(
            "objective must be a cnf.Flow or an objective with a flow; "
            f"got {type(objective).__name__}."
        )
    if not isinstance(config, TrainingConfig):
        raise TypeError(f"config must be a TrainingConfig; got {type(config).__name__}.")
    if not any(parameter.requires_grad for parameter in objective.parameters()):
        raise ValueError("objective must have parameters to train; got none.")
    rows = as_tensors("data", data, flow)
    warn_if_far_from_standard(flow, *rows)
    held_out = None if validation is None else as_tensors("validation", validation, flow)
    with torch.inference_mode(False), torch.enable_grad():
        run = _Run(objective, flow, rows, config)
        run.go(held_out)
    return run.history


class _Run:
    """One call of `fit`."""

    def __init__(
        self, objective: nn.Module, flow: Flow, data: tuple[Tensor, ...], config: TrainingConfig
    ) -> None:
        # Fabric takes longer to import than torch, and `import cnf` must not wait for it.
        from lightning_fabric import Fabric

        self.flow = flow
        self.config = config
        self.history = History()
        device = data[0].device
        self.fabric = Fabric(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
        )
        optimizer = torch.optim.Adam(objective.parameters(), lr=config.learning_rate)
        self.best: dict[str, Tensor] | None = None
        self.good = _snapshot(objective)
        self.bare = objective
        self.objective, self.optimizer = self.fabric.setup(objective, optimizer)
        self.scheduler = LambdaLR(optimizer, _schedule(config))
        self.averaged = _average(flow, config.ema)
        self.probes = torch.Generator(device).manual_seed(config.seed)
        self.batches = minibatches(data, config)

    @property
    def result(self) -> Flow:
        """What is validated and kept: the averaged flow if there is one."""
        return self.flow if self.averaged is None else cast(Flow, self.averaged.module)

    def go(self, validation: tuple[Tensor, ...] | None) -> None:
        try:
            self._train(validation)
        except TrainingError:
            self.averaged = None  # it may hold a share of the weights that failed
            raise
        finally:
            _restore(self.flow, self.best or _snapshot(self.result))
            self.optimizer.zero_grad()

    def _train(self, validation: tuple[Tensor, ...] | None) -> None:
        started = time.perf_counter()
        best_nll = math.inf
        with tqdm(total=self.config.steps, disable=not self.config.progress, unit="step") as bar:
            for step in range(1, self.config.steps + 1):
                with self._keeping(step):
                    entry = self._step(step)
                    nll = math.nan
                    if validation is not None and self._is_due(step):
                        nll = negative_log_likelihood(self.result, *validation)
                        self._check_finite("validation loss", nll, step)
                        bar.set_postfix_str(f"validation {nll:.4f}", refresh=False)
                if nll < best_nll:
                    self.best, best_nll = _snapshot(self.result), nll
                seconds = time.perf_counter() - started
                self.history.append(step=step, **entry, seconds=seconds, validation=nll)
                bar.set_description(f"loss {entry['loss']:.4f}, nfe {entry['nfe']}", refresh=False)
                bar.update()

    def _is_due(self, step: int) -> bool:
        return step % self.config.validate_every == 0 or step == self.config.steps

    def _step(self, step: int) -> dict[str, Any]:
        """Take one step; the weights that it starts from are good if they get through it."""
        with count_evaluations(self.flow) as nfe:
            loss = self.objective(*next(self.batches), generator=self.probes)
            self._check_finite("loss", loss.item(), step)
            self.optimizer.zero_grad()
            self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.objective,
            self.optimizer,
            max_norm=self.config.gradient_clip or math.inf,
            error_if_nonfinite=False,
        )
        self._check_finite("norm of the gradient", cast(Tensor, norm).item(), step)
        for name, value in self.bare.state_dict().items():
            self.good[name].copy_(value)
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.flow)
        return {"loss": loss.item(), "learning_rate": rate, "nfe": nfe.value}

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise self._error(f"the {name} is {value}", step)

    def _error(self, what: str, step: int) -> TrainingError:
        return TrainingError(
            f"training stopped at step {step} of {self.config.steps}: {what}. The flow keeps its "
            f"best or last good weights. Settings: {self.config}. Try a lower learning_rate, a "
            "smaller gradient_clip or a tighter tolerance, and look for outliers in the data.",
            self.history,
        )

    @contextlib.contextmanager
    def _keeping(self, step: int) -> Iterator[None]:
        """Leave the last good weights in the flow if the step fails."""
        try:
            yield
        except TrainingError:
            _restore(self.bare, self.good)
            raise
        except ODEError as error:
            _restore(self.bare, self.good)
            raise self._error(str(error).rstrip("."), step) from error


@torch.no_grad()
def negative_log_likelihood(flow: Flow, x: Tensor, context: Tensor | None = None) -> float:
    """Mean of ``-flow.log_prob(x, context)`` over the rows, in nats, in chunks."""
    total = 0.0
    generator = torch.Generator(x.device).manual_seed(0)  # the same probes at each validation
    for start in range(0, len(x), _VALIDATION_ROWS):
        rows = slice(start, start + _VALIDATION_ROWS)
        chunk = None if context is None else context[rows]
        total -= flow.log_prob(x[rows], chunk, generator=generator).double().sum().item()
    return total / len(x)


def _schedule(config: TrainingConfig) -> Callable[[int], float]:
    """Factor of the learning rate at each step."""
    warm_up = max(1, round(_WARM_UP * config.steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        if config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, config.steps - warm_up)))

    return factor


def _average(flow: Flow, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    return AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(decay))


def _snapshot(flow: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in flow.state_dict().items()}


def _restore(flow: nn.Module, weights: dict[str, Tensor]) -> None:
    flow.load_state_dict(weights)
