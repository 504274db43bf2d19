"""Checks of users' arguments, with one format of messages."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributions.constraints import Constraint

from cnf._row_names import name_rows

_LONGEST = 60
LARGEST_INDEX = 2**63 - 1
"""Largest number of entries, and seed, that torch can take."""
_STEPS_OF_A_SPREAD = 32
"""Rounding steps that a standard deviation must span, so that a flow does not learn rounding."""

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
"""Whether `torch.export` is running; False in old versions of torch."""


def functions_are_transformed() -> bool:
    """Return whether `torch.func` or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_hidden(x: Tensor) -> bool:
    """Return whether no branch may depend on `x`: within `torch.vmap` or `torch.export`."""
    if is_exporting():
        return True
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def holds(condition: Tensor) -> bool:
    """Return whether a condition on numbers is true; False where they are hidden."""
    return not is_hidden(condition) and bool(condition)


class NotFiniteError(ValueError):
    """Finite inputs give NaN or inf."""


def all_finite(parts: Sequence[Tensor]) -> bool:
    """Return whether every entry is finite, by one sum; by each entry if the sum overflows."""
    total = sum(part.detach().sum() for part in parts)
    if isinstance(total, Tensor) and is_hidden(total):
        return True
    return math.isfinite(float(total)) or all(bool(part.isfinite().all()) for part in parts)


def refuse_overflow(name: str, bad: Tensor, what: str, dtype: torch.dtype) -> None:
    """Raise a NotFiniteError for the true rows of a mask ``(*batch,)``, if there are any.

    `name` is the argument, and `what` names the quantity that is not finite in `dtype`.
    """
    if holds(bad.any()):
        raise NotFiniteError(
            f"{name} must be where {what} is finite in {dtype}; got NaN or inf in "
            f"{name_rows(bad)}. These numbers or the parameters are too large: "
            "standardise or drop such rows, use float64, or train with a lower learning rate."
        )


def non_finite_rows(x: Tensor, event_dim: int = 1) -> Tensor:
    """Return the mask ``(*batch,)`` of the rows of ``(*batch, *event)`` with NaN or inf."""
    bad = ~x.isfinite()
    return bad.flatten(bad.ndim - event_dim).any(-1) if event_dim else bad


def check_vectors(name: str, x: Tensor, features: int, *, like: Tensor) -> None:
    """Refuse anything but a finite floating tensor ``(*batch, features)``; see `check_events`."""
    check_events(name, x, (features,), like=like)


def check_events(name: str, x: Tensor, event_shape: Sequence[int], *, like: Tensor) -> None:
    """Refuse anything but a finite floating tensor of shape ``(*batch, *event_shape)``.

    `x` must have the dtype and device of `like`, a tensor of the model.
    """
    if not isinstance(x, Tensor):
        remedy = _how_to_convert(name, x, like)
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}.{remedy}")
    check_dense(name, x)
    if not x.is_floating_point():
        raise ValueError(
            f"{name} must have a floating dtype; got {x.dtype}. "
            f"Convert it with {name}.to({like.dtype})."
        )
    event_dim = len(event_shape)
    if x.ndim < event_dim or x.shape[x.ndim - event_dim :] != torch.Size(event_shape):
        expected = ", ".join(map(str, ("*batch", *event_shape)))
        raise ValueError(f"{name} must have shape ({expected}); got {tuple(x.shape)}.")
    if x.device != like.device or x.dtype != like.dtype:
        raise _unlike(name, x, like)
    if not all_finite((x,)):
        bad = name_rows(non_finite_rows(x.detach(), event_dim))
        raise ValueError(
            f"{name} must be finite; got NaN or inf in {bad}. Drop or mend these rows."
        )


def _how_to_convert(name: str, x: Any, like: Tensor) -> str:
    """Return a remedy that converts a value to a tensor, or an empty text."""
    given, make = name, "as_tensor"
    if hasattr(x, "to_numpy"):  # of pandas, polars or the like; the array may be read-only
        given, x, make = f"{name}.to_numpy()", x.to_numpy(), "tensor"
    if isinstance(x, list | tuple) and x and all(isinstance(row, Tensor) for row in x):
        return f" Try torch.stack(list({given}))."
    if not isinstance(x, Sequence | np.ndarray) or isinstance(x, str):
        return ""
    if isinstance(x, np.ndarray) and (np.ma.isMA(x) or x.dtype.kind not in "biuf"):
        return _why_no_conversion(name, x)
    try:
        rows = torch.as_tensor(np.asarray(x, dtype=np.float64))
    except (TypeError, ValueError):  # text, or rows of different lengths
        return " Its rows must hold numbers, the same count in each."
    dtype = like.dtype if isinstance(like, Tensor) else torch.get_default_dtype()
    if _loses_digits(rows, dtype):
        return (
            f" Try torch.{make}({given}, dtype=torch.float64), with model.to(torch.float64): "
            f"{dtype} would round most of its digits away."
        )
    return f" Try torch.{make}({given}, dtype={dtype})."


def _why_no_conversion(name: str, x: np.ndarray) -> str:
    """Return the reason why an array cannot become a tensor: its mask, or its dtype."""
    if np.ma.isMA(x):
        return f" A tensor has no mask: leave masked rows out, or fill them: {name}.filled(value)."
    return f" It must hold real numbers; got {x.dtype}."


def check_dense(name: str, x: Tensor) -> None:
    """Refuse a tensor that is sparse, nested, quantized or without numbers."""
    if x.is_nested or x.layout != torch.strided or x.is_quantized:
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout)
        how = f"{name}.dequantize()" if x.is_quantized else f"{name}.to_dense()"
        raise ValueError(f"{name} must be a dense tensor; got one that is {kind}. Try {how}.")
    if x.is_meta:
        raise ValueError(f"{name} must hold numbers; got a tensor on the device meta.")


def _unlike(name: str, x: Tensor, like: Tensor) -> ValueError:
    """Return an error for a tensor on another device than the model, or of another dtype."""
    if x.device != like.device:
        return ValueError(
            f"{name} must be on the model's device {like.device}; got {x.device}. "
            f"Move it with {name}.to({str(like.device)!r})."
        )
    # Not the model to half precision, in which adaptive solves and training fail.
    or_model = f", or the model with model.to({x.dtype})" if x.element_size() > 2 else ""
    remedy = f"Convert it with {name}.to({like.dtype}){or_model}."
    if _loses_digits(x.detach(), like.dtype):
        remedy = (
            f"{like.dtype} would round most of its digits away: convert the model with "
            f"model.to({x.dtype})."
        )
    elif _loses_digits(x.detach(), x.dtype):
        remedy = f"{x.dtype} has rounded most of its digits away: make it in {like.dtype}."
    return ValueError(f"{name} must have the model's dtype {like.dtype}; got {x.dtype}. {remedy}")


def is_rounded_away(std: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask of the columns whose standard deviation is lost to rounding in `dtype`."""
    return (std > 0) & (std < _STEPS_OF_A_SPREAD * torch.finfo(dtype).eps * largest)


def _loses_digits(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the variation of a column of x is lost to rounding in `dtype`."""
    rows = x.flatten(0, -2) if x.ndim > 1 else x.reshape(1, -1)
    if len(rows) < 2 or rows.numel() == 0:
        return False
    return bool(is_rounded_away(rows.std(0), rows.abs().amax(0), dtype).any())


def check_support(name: str, x: Tensor, support: Constraint) -> None:
    """Refuse rows of `x` that are not in `support`, a constraint of whole events."""
    outside = ~rows_inside(x, support)
    if holds(outside.any()):
        refuse_rows(name, outside, _describe(support, x.detach()))


def rows_inside(x: Tensor, support: Constraint) -> Tensor:
    """Return the mask ``(*batch,)`` of the rows of x in `support`, a constraint of whole events."""
    if x.numel() == 0:  # torch cannot check empty tensors
        return x.new_ones(x.shape[: x.ndim - support.event_dim], dtype=torch.bool)
    inside: Tensor = support.check(x.detach())
    return inside


def refuse_rows(name: str, bad: Tensor, expected: str) -> None:
    """Raise a ValueError that names the true rows of a mask ``(*batch,)``, if there are any."""
    if holds(bad.any()):
        raise ValueError(
            f"{name} must be {expected}; got other values in {name_rows(bad)}. "
            "Rescale, mend or drop these rows."
        )


def _describe(support: Constraint, x: Tensor) -> str:
    """Describe a support; for a support by columns, the columns where x is outside."""
    if hasattr(support, "manifold"):
        return f"on {support.manifold}"
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if hasattr(support, "cseq"):
        columns = [
            f"{_describe(part, values)} in column {i}"
            for i, (part, values) in enumerate(zip(support.cseq, x.unbind(-1), strict=True))
            if not part.check(values).all()
        ]
        return ", ".join(columns)
    low, high = (getattr(support, f"{side}_bound", None) for side in ("lower", "upper"))
    word = "integers" if support.is_discrete else "numbers"
    if low is None:
        return word
    if high is None:
        return f"{word} greater than {low:.6g}"
    if getattr(support, "is_open", False):
        return f"strictly between {low:.6g} and {high:.6g}"
    return f"{word} from {low:.6g} to {high:.6g}"


def reference_tensor(module: nn.Module) -> Tensor:
    """Return a floating tensor of the module, with the dtype and device of its inputs."""
    floating = (tensor for tensor in tensors_of(module) if tensor.is_floating_point())
    return next(floating, torch.empty(0))


def check_trainable(name: str, module: nn.Module) -> None:
    """Refuse a module made in inference mode, which cannot be trained or differentiated."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    if any(tensor.is_inference() for tensor in tensors_of(module)):
        raise ValueError(
            f"{name} must be made outside of torch.inference_mode(), whose tensors torch cannot "
            f"train or differentiate. Make it, or copy.deepcopy({name}), outside; or evaluate it "
            "with torch.no_grad()."
        )


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return parameters, then buffers: torch's own walk takes as long as a small evaluation."""
    parts = [module]
    for part in parts:
        parts += [inner for inner in part._modules.values() if inner is not None]
    held = [part._parameters for part in parts] + [part._buffers for part in parts]
    return [tensor for each in held for tensor in each.values() if tensor is not None]


def check_context(context: Tensor | None, context_features: int, *, like: Tensor) -> None:
    """Refuse a context that is missing, superfluous, or not ``(*batch, context_features)``."""
    if context_features == 0:
        if context is not None:
            raise ValueError(
                "context must be None, because the model has context_features=0; "
                f"got a context of shape {_shape(context)}."
            )
    elif context is None:
        raise ValueError(
            f"context must have shape (*batch, {context_features}), because the model is "
            "conditional; got None."
        )
    else:
        check_vectors("context", context, context_features, like=like)


def joint_batch_shape(x: Tensor, context: Tensor | None, event_dim: int = 1) -> torch.Size:
    """Return the joint batch shape of `x`, whose last `event_dim` axes are events, and `context`.

    Raises:
        ValueError: If the two do not broadcast.
    """
    batch = x.shape[: x.ndim - event_dim]
    if context is None:
        return batch
    try:
        return torch.Size(torch.broadcast_shapes(batch, context.shape[:-1]))
    except RuntimeError:
        raise ValueError(
            "the batch shapes of x and context must broadcast; "
            f"got x {tuple(x.shape)} and context {tuple(context.shape)}."
        ) from None


def check_sample_shape(sample_shape: int | Sequence[int], name: str = "sample_shape") -> torch.Size:
    """Convert an int or a shape of ints, none negative, to a shape."""
    sizes = tuple(sample_shape) if isinstance(sample_shape, Sequence) else (sample_shape,)
    if not all(_is_integer(size) for size in sizes):
        raise TypeError(f"{name} must be an int or a shape of ints; got {_shown(sample_shape)}.")
    if any(size < 0 for size in sizes):
        raise ValueError(f"{name} must not be negative; got {_shown(sample_shape)}.")
    sizes = tuple(map(operator.index, sizes))
    if math.prod(sizes) > LARGEST_INDEX:
        raise ValueError(
            f"{name} must be of at most {LARGEST_INDEX} entries; got {_shown(sample_shape)}."
        )
    return torch.Size(sizes)


def check_type(name: str, value: object, expected: type, remedy: str) -> None:
    """Raise a TypeError with a remedy for anything but an instance of `expected`."""
    if not isinstance(value, expected):
        raise TypeError(
            f"{name} must be a {expected.__name__}; got {type(value).__name__}. Perhaps {remedy}."
        )


def check_count(name: str, value: int, *, least: int = 1, most: int = 2**31 - 1) -> int:
    """Refuse anything but an integer, also of NumPy, within bounds; return a Python int."""
    if not _is_integer(value):
        raise TypeError(f"{name} must be an int; got {_shown(value)}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")
    if value > most:
        raise ValueError(f"{name} must be at most {most}; got {_shown(value)}.")
    return operator.index(value)


def check_seed(name: str, value: int) -> int:
    """Refuse anything but a seed of a torch generator, of at most 63 bits; return a Python int."""
    return check_count(name, value, least=0, most=LARGEST_INDEX)


def check_number(
    name: str, value: Any, expected: str, is_valid: Callable[[float], bool], remedy: str = ""
) -> float:
    """Refuse anything but a real number, also of NumPy or 0-dim, in bounds; return a Python float.

    `expected` describes the bounds, such as "positive and finite", and `is_valid` checks them.
    """
    number = value
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        number = value.item()
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name} must be a number; got {_shown(value)}.")
    if not is_valid(float(number)):
        raise ValueError(f"{name} must be {expected}; got {value}. {remedy}".rstrip())
    return float(number)


def is_positive(number: float) -> bool:
    """Return whether the number is positive and finite."""
    return 0 < number < math.inf


def check_fraction(name: str, value: float) -> float:
    """Refuse anything but a number strictly between 0 and 1; return a Python float."""
    return check_number(name, value, "between 0 and 1", lambda number: 0 < number < 1)


def check_flag(name: str, value: Any) -> bool:
    """Refuse anything but True and False, also of NumPy; return a Python bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {_shown(value)}.")
    return bool(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Raise a ValueError for anything but one of the names in `choices`."""
    names = tuple(choices)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}; got {_shown(value)}.")
    return value


def check_generator(generator: Any, *, like: Tensor) -> None:
    """Refuse anything but None or a generator on the device of `like`."""
    if generator is None:
        return
    device = repr(like.device.type)
    if not isinstance(generator, torch.Generator):
        seed = generator if isinstance(generator, int) else 0
        raise TypeError(
            f"generator must be a torch.Generator or None; got {_shown(generator)}. "
            f"Try torch.Generator({device}).manual_seed({seed})."
        )
    if generator.device.type != like.device.type:
        raise ValueError(
            f"generator must be on the model's device {like.device}; got one on "
            f"{generator.device}. Try torch.Generator({device})."
        )


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Refuse anything but a shape of one or more positive ints; return Python ints."""
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be sizes such as (3, 32, 32); got {shape!r}.")
    if not shape:
        raise ValueError("shape must have at least one size; got ().")
    return tuple(check_count("each of shape", size) for size in shape)


def check_image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Refuse anything but a shape ``(channels, height, width)``; return Python ints."""
    sizes = check_shape(shape)
    if len(sizes) != 3:
        raise ValueError(f"shape must be (channels, height, width); got {shape!r}.")
    return sizes[0], sizes[1], sizes[2]


def check_vector_or_image_shape(shape: int | Sequence[int]) -> tuple[int, int, int]:
    """Return the shape of an image, or ``(features, 1, 1)`` for the number of features."""
    if isinstance(shape, Sequence):
        return check_image_shape(shape)
    return check_count("shape", shape), 1, 1


def _shown(value: object) -> str:
    """Return the repr of a value for a message, truncated if long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({type(value).__name__})"


def _is_integer(value: object) -> bool:
    if type(value) is int:  # the usual case; the check of a protocol takes microseconds
        return True
    others = bool | Tensor | np.ndarray | type
    return isinstance(value, SupportsIndex) and not isinstance(value, others)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def check_widths(name: str, widths: Sequence[int], *, least: int = 1) -> tuple[int, ...]:
    """Refuse anything but a sequence of at least `least` positive ints; return Python ints."""
    if not isinstance(widths, Sequence):
        raise TypeError(f"{name} must be widths such as (128, 128); got {widths!r}.")
    if len(widths) < least:
        raise ValueError(f"{name} must name at least one hidden layer; got ().")
    return tuple(check_count(f"each of {name}", width) for width in widths)


def refuse_overrides(cls: type, parent: type, hooks: Mapping[str, str]) -> None:
    """Raise a TypeError for a class that overrides a final method of its parent.

    `hooks` maps each final method to the hook to write in its place.
    """
    for method, hook in hooks.items():
        if getattr(cls, method) is not getattr(parent, method):
            raise TypeError(
                f"{cls.__name__} must not override {method}, which is final; write {hook}."
            )
