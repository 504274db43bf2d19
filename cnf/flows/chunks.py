"""Log-densities and samples of more rows than fit in memory: some rows at a time."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from tqdm import tqdm

from cnf._checks import check_count, check_dense, check_generator, check_type, reference_tensor
from cnf._memory import LiveBytes, bytes_in, check_fits, in_words
from cnf._row_names import counted_from, rows_of_caller
from cnf.flows.flow import Flow
from cnf.ode import ODEError

CHUNK = "32 MiB"
"""What a chunk takes where nothing is said; on a CPU, larger ones leave the caches."""

_MOST_GROWTH = 16
_REAL = "biuf"


@torch.no_grad()
def log_prob_in_chunks(
    flow: Flow,
    x: Float[Tensor, "rows *event"] | Shaped[np.ndarray, "rows *event"],
    context: Float[Tensor, "*rows context_features"] | Shaped[np.ndarray, "*rows c"] | None = None,
    *,
    chunk_size: int | str = CHUNK,
    importance_samples: int = 1,
    generator: torch.Generator | None = None,
    out: Float[Tensor, " rows"] | Float[np.ndarray, " rows"] | None = None,
    progress: bool = False,
) -> Float[Tensor, " rows"]:
    """`Flow.log_prob` of many rows, without gradient, a chunk of them at a time.

    With `x`, and perhaps `out`, on the disk, memory does not grow with the number of rows.

    A memory limit is kept by trial: the first chunk has one row, and each one after it up to 16
    times as many, in powers of 2, as what the one before took allows. What operations allocate is
    counted, rather than what the process holds, and so chunks are the same each time. Not counted
    are the parameters, the rows and the result; nor that later rows may take more than the first,
    as where those are outside of the support.

    Where `log_prob` draws nothing, a row's number depends on its chunk by rounding alone, if the
    flow has no ODE or solves it in fixed steps. An adaptive method takes the steps that the worst
    row of a chunk needs, so that the number depends on the rows beside it, by about the tolerance;
    ``flow.using(solver=ODESolver(method="rk4", steps=100))`` avoids that. What is drawn is the
    same for the same state of the generator and the same chunks.

    Args:
        flow: The flow.
        x: Rows. Of an array, such as ``np.load(path, mmap_mode="r")``, each chunk is read when its
            turn comes, and put into the dtype of the flow; both kinds are moved to its device.
        context: What the density is conditioned on: one for each row, or a single one for all.
        chunk_size: Number of rows of a chunk, or the memory that its evaluation may take, such as
            ``"1 GiB"`` or ``"500 MB"``.
        importance_samples: Number of weights of a lower bound.
        generator: Source of what is drawn.
        out: Where to write, such as ``np.lib.format.open_memmap(path, "w+", shape=(rows,))``;
            None for a new tensor where `x` is.
        progress: Whether to show a progress bar.

    Returns:
        The log-densities in nats; if `out` is given, a tensor that shares its memory.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong shape, dtype or value, or a single row takes more
            than `chunk_size`. NaN and the like are found, and the row is named, when its turn
            comes; what was written to `out` by then is right.
        ODEError: If a solve fails.

    Example:
        >>> from cnf import CNF
        >>> x = np.zeros((1000, 2), dtype=np.float32)
        >>> log_prob_in_chunks(CNF(2), x, chunk_size="2 MiB").shape
        torch.Size([1000])
    """
    _check_flow(flow, generator)
    _check_x(flow, x)
    _check_context(flow, context, len(x))
    like = reference_tensor(flow)
    where = x.device if isinstance(x, Tensor) else torch.device("cpu")
    result = _result(out, (len(x),), torch.empty(0, dtype=like.dtype, device=where))

    def of_chunk(rows: slice) -> Tensor:
        return flow.log_prob(
            _chunk(x, rows, like),
            None if context is None else _contexts(context, rows, like),
            importance_samples=importance_samples,
            generator=generator,
        )

    return in_chunks(of_chunk, result, chunk_size=chunk_size, progress=progress)


def sample_in_chunks(
    flow: Flow,
    count: int,
    context: Float[Tensor, "*count context_features"]
    | Shaped[np.ndarray, "*count c"]
    | None = None,
    *,
    chunk_size: int | str = CHUNK,
    generator: torch.Generator | None = None,
    out: Float[Tensor, "count *event"] | Float[np.ndarray, "count *event"] | None = None,
    progress: bool = False,
) -> Float[Tensor, "count *event"]:
    """`Flow.sample` of many rows, a chunk of them at a time; see `log_prob_in_chunks`.

    The same generator and the same chunks give the same draws, and other chunks other draws.

    Args:
        flow: The flow.
        count: Number of draws.
        context: What the density is conditioned on: one for each draw, or a single one for all.
        chunk_size: Number of draws of a chunk, or the memory that it may take.
        generator: Source of the draws.
        out: Where to write, of shape ``(count, *event_shape)``; None for a new tensor on the
            device of the flow.
        progress: Whether to show a progress bar.

    Returns:
        The draws; if `out` is given, a tensor that shares its memory.

    Raises:
        TypeError: As for `log_prob_in_chunks`.
        ValueError: As for `log_prob_in_chunks`.
        ODEError: If a solve fails.

    Example:
        >>> from cnf import CNF
        >>> sample_in_chunks(CNF(2), 1000, chunk_size=256).shape
        torch.Size([1000, 2])
    """
    _check_flow(flow, generator)
    count = check_count("count", count, least=0)
    _check_context(flow, context, count)
    like = reference_tensor(flow)
    if out is None:
        numbers, remedy = count * math.prod(flow.event_shape), "Give out=, an array on the disk."
        check_fits("count", count, numbers, like=like, remedy=remedy)
    result = _result(out, (count, *flow.event_shape), like)

    def of_chunk(rows: slice) -> Tensor:
        given = None if context is None else _contexts(context, rows, like)
        one_each = given is not None and given.ndim == 2
        shape = () if one_each else rows.stop - rows.start
        return flow.sample(shape, given, generator=generator)

    return in_chunks(of_chunk, result, chunk_size=chunk_size, progress=progress)


def in_chunks(
    of_chunk: Callable[[slice], Tensor], out: Tensor, *, chunk_size: int | str, progress: bool
) -> Tensor:
    """Fill `out`, which is returned, with what `of_chunk` makes of one slice of rows at a time.

    Without rows it is called once nevertheless, so that it may refuse what does not fit.

    Raises:
        TypeError: If `chunk_size` is neither an int nor a text.
        ValueError: If it is too small, or no size; or what `of_chunk` raises, with its place.
        ODEError: Likewise.

    Example:
        >>> x = torch.arange(5.0)
        >>> in_chunks(lambda rows: x[rows] ** 2, x.new_empty(5), chunk_size=2, progress=False)
        tensor([ 0.,  1.,  4.,  9., 16.])
    """
    size, memory = _checked(chunk_size)
    start = 0
    with tqdm(total=len(out), disable=not progress, unit="row", unit_scale=True) as bar:
        while True:
            rows = slice(start, min(start + size, len(out)))
            if memory is None:
                out[rows] = _placed(of_chunk, rows)
            else:
                with LiveBytes() as live:
                    out[rows] = _placed(of_chunk, rows)
                size, memory = _next_size(size, live.peak, memory)
            bar.update(rows.stop - rows.start)
            start = rows.stop
            if start == len(out):
                return out


def _next_size(size: int, peak: int, memory: int) -> tuple[int, int | None]:
    """Rows of the next chunk, and the limit that it has to be measured for; None if it has not."""
    if peak > memory:
        if size == 1:
            raise ValueError(
                f"chunk_size must be at least what a single row takes, {in_words(peak)}; got "
                f"{in_words(memory)}."
            )
        return size // 2, memory
    growth = min(_MOST_GROWTH, memory // max(peak, 1))
    power = growth.bit_length() - 1
    return size << power, memory if power else None


def _placed(of_chunk: Callable[[slice], Tensor], rows: slice) -> Tensor:
    """What `of_chunk` makes of the rows; where it fails, the message says which they were."""
    try:
        with rows_of_caller(counted_from(rows.start)):
            return of_chunk(rows)
    except (ValueError, ODEError) as error:
        if rows.start == 0:
            raise
        kind = ODEError if isinstance(error, ODEError) else ValueError
        raise kind(f"in rows {rows.start} to {rows.stop - 1}: {error}") from error


def _checked(chunk_size: int | str) -> tuple[int, int | None]:
    """Rows of the first chunk, and the limit of memory if there is one."""
    if not isinstance(chunk_size, str):
        return check_count("chunk_size", chunk_size), None
    memory = bytes_in(chunk_size)
    if memory is None:
        raise ValueError(
            "chunk_size must be a number of rows, such as 4096, or a size of memory, such as "
            f"'1 GiB' or '500 MB'; got {chunk_size!r}."
        )
    return 1, memory


def _check_flow(flow: Flow, generator: torch.Generator | None) -> None:
    check_type("flow", flow, Flow, "wrap the transforms in Flow([...])")
    check_generator(generator, like=reference_tensor(flow))


def _check_array(name: str, values: object) -> None:
    if not isinstance(values, Tensor | np.ndarray):
        raise TypeError(
            f"{name} must be a torch.Tensor or a numpy array; got {type(values).__name__}. "
            f"Perhaps np.asarray({name}), or np.load(path, mmap_mode='r')."
        )
    if isinstance(values, Tensor):
        check_dense(name, values)
    elif values.dtype.kind not in _REAL:
        raise ValueError(f"{name} must hold real numbers; got {values.dtype}.")


def _check_x(flow: Flow, x: Tensor | np.ndarray) -> None:
    _check_array("x", x)
    if x.ndim == 0 or tuple(x.shape[1:]) != tuple(flow.event_shape):
        expected = ", ".join(map(str, ("rows", *flow.event_shape)))
        raise ValueError(f"x must have shape ({expected}); got {tuple(x.shape)}.")


def _check_context(flow: Flow, context: Tensor | np.ndarray | None, rows: int) -> None:
    """Refuse what is neither one context nor one for each row; of one too many the flow tells."""
    if context is None:
        return
    _check_array("context", context)
    size = flow.context_features
    if size and tuple(context.shape) not in ((size,), (rows, size)):
        raise ValueError(
            f"context must have shape ({rows}, {size}), or ({size},) for one that all rows share; "
            f"got {tuple(context.shape)}."
        )


def _result(
    out: Tensor | np.ndarray | None, shape: Sequence[int], like: Tensor
) -> Float[Tensor, "rows *event"]:
    """Where to write: `out` as a tensor, or a new one."""
    if out is None:
        return like.new_empty(shape)
    if not isinstance(out, Tensor | np.ndarray):
        raise TypeError(f"out must be a torch.Tensor or a numpy array; got {type(out).__name__}.")
    if isinstance(out, np.ndarray):
        if out.dtype.kind != "f" or not out.flags.writeable:
            state = "writable" if out.flags.writeable else "read-only"
            raise ValueError(
                f"out must be writable and hold floating numbers; got {out.dtype}, {state}. Open "
                "it with mode='w+' or 'r+'."
            )
        out = torch.from_numpy(out)
    if tuple(out.shape) != tuple(shape) or not out.is_floating_point():
        raise ValueError(
            f"out must hold floating numbers of shape {tuple(shape)}; got {out.dtype} of shape "
            f"{tuple(out.shape)}."
        )
    return out


def _chunk(values: Tensor | np.ndarray, rows: slice, like: Tensor) -> Tensor:
    """Some of the rows, where the flow is; of an array, in its dtype."""
    if isinstance(values, Tensor):
        return values[rows].to(like.device)
    return torch.from_numpy(np.array(values[rows], dtype=np.float64)).to(like)


def _contexts(context: Tensor | np.ndarray, rows: slice, like: Tensor) -> Tensor:
    """The contexts of some of the rows, or the one of all."""
    return _chunk(context, rows if context.ndim == 2 else slice(None), like)
