r"""Checkpointed gradients of a solve: the backward pass recomputes one step at a time.

Step i of a solver maps the state, :math:`s_{i+1} = F_i(s_i)`. Backprop keeps the graphs of all
steps. Here the solve runs without a graph and keeps the :math:`s_i` alone. The backward pass goes
from the last step to the first: it recomputes :math:`F_i(s_i)` with a graph, through which it takes

.. math::
    \bar s_i = (\partial F_i / \partial s_i)^\top \bar s_{i+1}
    \qquad\text{and}\qquad
    \bar\theta \mathrel{+}= (\partial F_i / \partial \theta)^\top \bar s_{i+1},

and drops the graph. So the gradient is exact for the discrete solution, as with backprop, but
memory holds the graph of one step, and only the states of the others.

An embedded Runge-Kutta method carries its last rates over to the next step as first stage, and so
they are part of :math:`s` too. Step sizes of an adaptive method are constants: each step keeps its
relative position between two times.

References:
    Gholami, Keutzer and Biros (2019), ANODE: Unconditionally Accurate Memory-Efficient Gradients
    for Neural ODEs. https://arxiv.org/abs/1902.10298
    Zhuang et al. (2020), Adaptive Checkpoint Adjoint Method for Gradient Estimation in Neural ODE,
    for adaptive methods. https://arxiv.org/abs/2006.02493
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cnf.ode.monitor import State, SteppingMonitor

Step = Callable[[Tensor, Tensor, State, State], tuple[State, State]]
"""Takes the times of a step's start and end, the state at its start, and the rates carried over to
it, if any; returns the state at its end and the rates to carry over, if any."""


@dataclass(frozen=True)
class Start:
    """Start of a step."""

    t: Tensor
    """The time."""
    state: State
    """The state."""
    rates: State
    """Rates that the method carried over from the step before; else empty."""


@dataclass(eq=False, kw_only=True)
class RecordingMonitor(SteppingMonitor):
    """`SteppingMonitor` that records the start of each step of the forward solve."""

    starts: list[Start] = field(default_factory=list)

    def callback_step(self, t: Tensor, state: Any, dt: Tensor) -> None:
        """Record the start of the step, unless it repeats a rejected one."""
        super().callback_step(t, state, dt)
        if self.in_backward or (self.starts and t == self.starts[-1].t):
            return
        rates: State = ()
        if self.kind == "adaptive" and self.starts and self.last is not None:
            rates = self.last[len(state) :]
        self.starts.append(Start(t, tuple(state), rates))


def solve_by_steps(
    monitor: RecordingMonitor,
    solve: Callable[[], State],
    step: Step,
    state: State,
    times: Tensor,
    parameters: Sequence[Tensor],
) -> State:
    """Return the result of `solve`, with a backward pass that recomputes one `step` at a time.

    Args:
        monitor: The monitored right-hand side.
        solve: Solves from `state` through `times`, with a step that ends at each; called without
            gradient.
        step: One step of the same method.
        state: The state at the first time.
        times: The times.
        parameters: Every other tensor of the right-hand side that requires a gradient.
    """
    device = state[0].device.type
    autocast = functools.partial(
        torch.autocast,
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,  # a cache would outlive the graph of a step
    )
    steps = _Steps(monitor, step, times, parameters, autocast)
    solution: State = _SolveBySteps.apply(  # type: ignore[no-untyped-call]
        steps, solve, times, *state, *parameters
    )
    return monitor.backward_once(solution)


class _SolveBySteps(torch.autograd.Function):
    """Solve without a graph; the backward pass is `_Steps.gradients`."""

    @staticmethod
    def forward(ctx: Any, steps: "_Steps", solve: Callable[[], State], *inputs: Tensor) -> State:
        del inputs
        ctx.steps = steps
        return tuple(part.clone() for part in solve())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.steps.gradients(gradients)


@dataclass(frozen=True)
class _Steps:
    """Steps of a finished solve."""

    monitor: RecordingMonitor
    step: Step
    times: Tensor
    parameters: Sequence[Tensor]
    autocast: Callable[[], torch.autocast]
    """Autocast with the settings of the solve."""

    def gradients(self, gradients: State) -> tuple[Tensor | None, ...]:
        """Return the gradients in the times, the first state and the parameters.

        `gradients` are the gradients in the state at each time, ``(times, *shape)``.
        """
        moves_times = self.times.requires_grad
        in_times = torch.zeros_like(self.times) if moves_times else None
        in_parameters: list[Tensor | None] = [None] * len(self.parameters)
        in_state: State = tuple(part[-1] for part in gradients)
        in_rates: State = ()
        stop, end = len(self.times) - 1, self.times[-1].detach()
        for start in reversed(self.monitor.starts):
            found = iter(self._redo(start, end, (*in_state, *in_rates)))
            if in_times is not None:
                self._move_times(in_times, stop, start.t, next(found))
                self._move_times(in_times, stop, end, next(found))
            in_state = tuple(_or_zeros(next(found), part) for part in start.state)
            in_rates = tuple(_or_zeros(next(found), part) for part in start.rates)
            in_parameters = [_added(*pair) for pair in zip(in_parameters, found, strict=True)]
            end = start.t
            if end == self.times[stop - 1]:
                stop -= 1
                here = (part[stop] for part in gradients)
                in_state = tuple(map(torch.add, in_state, here))
        return in_times, *in_state, *in_parameters

    def _redo(self, start: Start, end: Tensor, gradients: State) -> Sequence[Tensor | None]:
        """Return the gradients in the times of a step, if needed, state, rates and parameters.

        `gradients` are the gradients in the state at its `end` and, except after the last step, in
        the carried rates.
        """
        t0, t1 = start.t.detach(), end.detach()
        state, rates = _leaves(start.state), _leaves(start.rates)
        inputs: State = (*state, *rates, *self.parameters)
        with torch.enable_grad(), self.autocast():
            if self.times.requires_grad:
                t0, t1 = _leaves((t0, t1))
                inputs = (t0, t1, *inputs)
            moved, carried = self.step(t0, t1, state, rates)
            pairs = [
                (value, gradient)
                for value, gradient in zip((*moved, *carried), gradients, strict=False)
                if value.requires_grad
            ]
        values, seeds = zip(*pairs, strict=True)
        found: Sequence[Tensor | None] = torch.autograd.grad(
            values, inputs, seeds, allow_unused=True
        )
        return found

    def _move_times(self, in_times: Tensor, stop: int, t: Tensor, gradient: Tensor | None) -> None:
        """Distribute the gradient in `t` to the two times between which its position is fixed."""
        if gradient is None:
            return
        before, after = self.times[stop - 1 : stop + 1].detach().to(t.dtype)
        position = (t - before) / (after - before)
        in_times[stop - 1] += (1 - position) * gradient
        in_times[stop] += position * gradient


def _leaves(parts: State) -> State:
    return tuple(part.detach().requires_grad_() for part in parts)


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
