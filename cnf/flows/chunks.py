"""Log-densities and samples of more rows than fit in memory, chunk by chunk."""

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
"""Default memory of a chunk; on a CPU, larger ones leave the caches."""

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
    """Evaluate `Flow.log_prob` of many rows, without gradient, chunk by chunk.

    If `x` and `out` are files, memory does not grow with the number of rows.

    A memory limit is kept by trial: the first chunk has one row, and each later chunk up to 16
    times as many, by a power of 2, as the memory of the chunk before allows. The memory that
    operations allocate is counted, so chunks are the same in each call. The parameters, the rows
    and the result are not counted; later rows may take more memory than the first ones, for
    instance where the first are outside of the support.

    If `log_prob` draws nothing, and the flow has no ODE or solves it in fixed steps, a row's
    log-density depends on its chunk by rounding alone. An adaptive method chooses its steps by the
    mean square error of the rows of a chunk, so the log-density depends on the other rows, and an
    outlier among many rows may be far off; `Flow.calibrate` avoids this. The same generator and
    the same chunks give the same random numbers.

    Args:
        flow: The flow.
        x: Rows: a tensor, or an array such as ``np.load(path, mmap_mode="r")``, read chunk by chunk
            and converted to the dtype of the flow. Chunks are moved to its device.
        context: One context for each row, or a single one for all rows.
        chunk_size: Number of rows of a chunk, or the memory that its evaluation may take, such as
            ``"1 GiB"`` or ``"500 MB"``.
        importance_samples: Number of importance weights of a lower bound.
        generator: Source of random numbers.
        out: Output, such as ``np.lib.format.open_memmap(path, "w+", shape=(rows,))``; None for a
            new tensor on the device of `x`.
        progress: Whether to show a progress bar.

    Returns:
        The log-densities in nats; if `out` is given, a tensor that shares its memory.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong shape, dtype or value, or a single row takes more
            than `chunk_size`. A wrong row is named when its chunk is evaluated; earlier entries of
            `out` are valid.
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

    def evaluate(rows: slice) -> Tensor:
        return flow.log_prob(
            _chunk(x, rows, like),
            _contexts(context, rows, like),
            importance_samples=importance_samples,
            generator=generator,
        )

    return in_chunks(evaluate, result, chunk_size=chunk_size, progress=progress)


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
    """Draw many rows by `Flow.sample`, chunk by chunk; see `log_prob_in_chunks`.

    Draws depend on the generator and on the chunks. Errors are as in `log_prob_in_chunks`.

    Args:
        flow: The flow.
        count: Number of draws.
        context: One context for each draw, or a single one for all draws.
        chunk_size: Number of draws of a chunk, or the memory that it may take.
        generator: Source of the draws.
        out: Output of shape ``(count, *event_shape)``; None for a new tensor on the device of the
            flow.
        progress: Whether to show a progress bar.

    Returns:
        The draws; if `out` is given, a tensor that shares its memory.

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

    def draw(rows: slice) -> Tensor:
        contexts = _contexts(context, rows, like)
        one_each = contexts is not None and contexts.ndim == 2
        shape = () if one_each else rows.stop - rows.start
        return flow.sample(shape, contexts, generator=generator)

    return in_chunks(draw, result, chunk_size=chunk_size, progress=progress)


def in_chunks(
    evaluate: Callable[[slice], Tensor], out: Tensor, *, chunk_size: int | str, progress: bool
) -> Tensor:
    """Fill and return `out`, chunk by chunk, with the results of `evaluate` for slices of rows.

    Without rows, `evaluate` is still called once, to check its arguments.

    Raises:
        TypeError: If `chunk_size` is neither an int nor a text.
        ValueError: If `chunk_size` is too small or no size, or, with the rows, from `evaluate`.
        ODEError: From `evaluate`, with the rows.

    Example:
        >>> x = torch.arange(5.0)
        >>> in_chunks(lambda rows: x[rows] ** 2, x.new_empty(5), chunk_size=2, progress=False)
        tensor([ 0.,  1.,  4.,  9., 16.])
    """
    size, memory = _first_size(chunk_size)
    start = 0
    with tqdm(total=len(out), disable=not progress, unit="row", unit_scale=True) as bar:
        while True:
            rows = slice(start, min(start + size, len(out)))
            if memory is None:
                out[rows] = _evaluate_naming_rows(evaluate, rows)
            else:
                with LiveBytes() as live:
                    out[rows] = _evaluate_naming_rows(evaluate, rows)
                size, memory = _next_size(size, live.peak, memory)
            bar.update(rows.stop - rows.start)
            start = rows.stop
            if start == len(out):
                return out


def _next_size(size: int, peak: int, memory: int) -> tuple[int, int | None]:
    """Return the rows of the next chunk, and the memory limit; None if it need not be measured."""
    if peak > memory:
        if size == 1:
            raise ValueError(
                f"chunk_size must be at least the memory of a single row, {in_words(peak)}; got "
                f"{in_words(memory)}."
            )
        return size // 2, memory
    growth = min(_MOST_GROWTH, memory // max(peak, 1))
    power = growth.bit_length() - 1
    return size << power, memory if power else None


def _evaluate_naming_rows(evaluate: Callable[[slice], Tensor], rows: slice) -> Tensor:
    """Call `evaluate`, whose errors then name the rows."""
    try:
        with rows_of_caller(counted_from(rows.start)):
            return evaluate(rows)
    except (ValueError, ODEError) as error:
        if rows.start == 0:
            raise
        kind = ODEError if isinstance(error, ODEError) else ValueError
        raise kind(f"in rows {rows.start} to {rows.stop - 1}: {error}") from error


def _first_size(chunk_size: int | str) -> tuple[int, int | None]:
    """Return the rows of the first chunk, and the memory limit if there is one."""
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
    if context is None:
        return
    _check_array("context", context)
    size = flow.context_features
    # The flow itself refuses a context that it does not take.
    if size and tuple(context.shape) not in ((size,), (rows, size)):
        raise ValueError(
            f"context must have shape ({rows}, {size}), or ({size},) for one that all rows share; "
            f"got {tuple(context.shape)}."
        )


def _result(
    out: Tensor | np.ndarray | None, shape: Sequence[int], like: Tensor
) -> Float[Tensor, "rows *event"]:
    """Return `out` as a tensor, or a new tensor."""
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
    """Return some of the rows on the device of the flow; of an array, in its dtype."""
    if isinstance(values, Tensor):
        return values[rows].to(like.device)
    return torch.from_numpy(np.array(values[rows], dtype=np.float64)).to(like)


def _contexts(context: Tensor | np.ndarray | None, rows: slice, like: Tensor) -> Tensor | None:
    """Return the contexts of some of the rows, or the single context of all."""
    if context is None:
        return None
    return _chunk(context, rows if context.ndim == 2 else slice(None), like)
