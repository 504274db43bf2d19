"""Trajectories of a flow between base and data."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_dense, check_type
from cnf._shapes import Context
from cnf.transforms import Chain, ContinuousTransform

_STARTS = {0.0: "base", 1.0: "data"}


def check_times(
    times: Float[Tensor, " times"], *, like: Tensor, starts: Mapping[float, str] = _STARTS
) -> Float[Tensor, " times"]:
    """Return checked times, from one of the named `starts`, in the dtype and device of `like`."""
    check_type("times", times, Tensor, "use torch.linspace(0, 1, 10)")
    check_dense("times", times)
    times = times.to(like)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must be 1-D with at least 2 times; got {tuple(times.shape)}.")
    steps = times.diff()
    if not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(
            f"times must be strictly increasing or strictly decreasing in {times.dtype}."
        )
    first, last = float(times[0]), float(times[-1])
    if first not in starts or not 0 <= last <= 1:
        allowed = " or ".join(f"{start:g} ({name})" for start, name in starts.items())
        raise ValueError(
            f"times must start at {allowed}, and stay within [0, 1]; they go from {first} to "
            f"{last}."
        )
    return times


def follow(
    chain: Chain,
    start: Float[Tensor, "*start_batch_and_event"],
    times: Float[Tensor, " times"],
    context: Context | None,
    *,
    generator: torch.Generator | None,
) -> Float[Tensor, "times *batch_and_event"]:
    """Return the states at `times` along the chain, as `Flow.trajectory` documents."""
    blocks = [part for part in chain if isinstance(part, ContinuousTransform)]
    discrete = chain[: len(chain) - len(blocks)]
    if not blocks or any(isinstance(part, ContinuousTransform) for part in discrete.modules()):
        raise ValueError(
            "a trajectory needs a flow that ends, on its base side, in its continuous transforms; "
            f"got {[type(part).__name__ for part in chain]} from data to base."
        )
    if times[0] == 1:
        start = discrete.to_base(start, context, generator=generator)
    else:
        blocks = blocks[::-1]
    states = _follow_blocks(blocks, start, times, context)
    return discrete.to_data(states, context, generator=generator)


def _follow_blocks(
    blocks: Sequence[ContinuousTransform], state: Tensor, times: Tensor, context: Tensor | None
) -> Tensor:
    """Solve `blocks` in this order, each for an equal part of the time."""
    passed = [state.unsqueeze(0)]
    progress = (times[1:] - times[0]).abs() * len(blocks)
    for i, block in enumerate(blocks):
        inside = progress[(progress > i) & (progress <= i + 1)] - i
        stops = torch.cat([inside.new_zeros(1), inside])
        goes_on = bool((progress > i + 1).any())
        if goes_on and stops[-1] < 1:
            stops = torch.cat([stops, stops.new_ones(1)])
        here = stops if times[0] == 0 else 1 - stops
        states = block.trajectory(state, here, context if block.context_features else None)
        passed.append(states[1 : 1 + len(inside)])
        if not goes_on:
            break
        state = states[-1]
    return torch.cat(passed)
