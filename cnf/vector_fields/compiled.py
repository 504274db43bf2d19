"""Compilation of vector fields by `torch.compile`.

An evaluation is dozens of small operations, each with a Python call and a pass through memory. The
compiler fuses them, and the operations of their gradient, into a few loops: the same numbers up to
rounding. The evaluation is compiled, not the solve, so that every solver method, gradient method
and error message stays the same. Fixed steps may be compiled as a whole: see
`cnf.ode.compiled_steps`.

A compiled field holds a `Compilation`, which runs the hooks of its final methods.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cnf._warnings import warn

VELOCITY = "_velocity"
"""Name of the hook that every field has."""

Result = TypeVar("Result")
_REMEDY = (
    "On a CPU, torch.compile needs a C++ compiler: install g++ (Debian: apt install g++), clang "
    "(macOS: xcode-select --install) or the build tools of Visual Studio, or name one in the "
    "environment variable CXX. On a GPU it needs Triton (pip install triton) and a C compiler."
)


class Compilation:
    """Compiled programs of vector fields: one for each class of fields and method.

    Args:
        backend: Argument of `torch.compile`.
        mode: Argument of `torch.compile`.

    Raises:
        RuntimeError: If torch knows no such backend or mode.
    """

    def __init__(self, *, backend: str | Callable[..., Any], mode: str | None) -> None:
        self.options: dict[str, Any] = {"backend": backend, "mode": mode}
        self.evaluations: dict[tuple[type, str], Callable[..., Any]] = {}
        self.steps: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.failed = False
        self.steps_failed = False
        torch.compile(_let_graphs_be_kept, **self.options)  # refuses an unknown backend at once

    def run(self, hook: Callable[..., Result], *inputs: Tensor | None) -> Result:
        """Return the result of a hook of a field, by a program if one can be compiled and run."""
        field, name = hook.__self__, hook.__name__  # type: ignore[attr-defined]
        if not self.is_active() or not (name == VELOCITY or field.has_programs):
            return hook(*inputs)
        key = type(field), name
        if key not in self.evaluations:
            self.evaluations[key] = self._program(getattr(*key))
        try:
            result: Result = self.evaluations[key](
                field, *_uniform(field, inputs, is_velocity=name == VELOCITY)
            )
        except Exception as error:
            result = hook(*inputs)  # which raises if the inputs are at fault
            self.failed = True
            warn(
                f"torch.compile failed ({reason(error)}). The flow goes on without "
                f"it: the same numbers, more slowly. {_REMEDY}"
            )
        return result

    def is_active(self) -> bool:
        """Whether programs run in the present context, rather than uncompiled functions."""
        return not (torch.compiler.is_compiling() or self.failed or _in_functional_transform())

    def step(
        self, key: tuple[Any, ...], make: Callable[[], Callable[..., Any]]
    ) -> Callable[..., Any]:
        """Return the program of a solver step: see `cnf.ode.compiled_steps`."""
        if torch.is_grad_enabled():
            _let_graphs_be_kept()
        if key not in self.steps:
            self.steps[key] = self._program(make())
        return self.steps[key]

    def _program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Dynamic: one program for batches of every size.
        return torch.compile(_with_its_own_code(function), dynamic=True, **self.options)


def reason(error: Exception) -> str:
    """Return, in one line, why compilation failed."""
    lines = str(error).strip().splitlines()[:2]  # the second is the backend's own
    return f"{type(error).__name__}: {' '.join(lines)}"


def compile_alike(copy: nn.Module, original: nn.Module) -> None:
    """Let a copy of a module share the programs of the original, which copying drops."""
    for part, model in zip(copy.modules(), original.modules(), strict=True):
        compilation = getattr(model, "compilation", None)
        if isinstance(compilation, Compilation):
            vars(part)["compilation"] = compilation


def _with_its_own_code(method: Callable[..., Any]) -> FunctionType:
    """Return a function with a code object of its own that calls `method`.

    torch stores at most eight programs with a code object (for gradients on and off, dtypes,
    numbers of axes, …), and compiles no more beyond. All fields of a class share the code of its
    methods.
    """

    def evaluate(field, *inputs):  # type: ignore[no-untyped-def]
        return method(field, *inputs)

    code = evaluate.__code__.replace()
    return FunctionType(code, evaluate.__globals__, method.__name__, None, evaluate.__closure__)


def _uniform(
    field: nn.Module, inputs: tuple[Tensor | None, ...], *, is_velocity: bool
) -> tuple[Tensor | None, ...]:
    """Return the inputs, made alike in all evaluations of a solve, to compile few programs.

    With gradients of parameters, x requires a gradient in all evaluations but the first.
    """
    if not torch.is_grad_enabled():
        return tuple(None if tensor is None else tensor.detach() for tensor in inputs)
    _let_graphs_be_kept()
    t, x, *rest = inputs
    assert x is not None  # noqa: S101 - for mypy
    if not (is_velocity or x.requires_grad) and any(p.requires_grad for p in field.parameters()):
        x = x.detach().requires_grad_()
    return t, x, *rest


def _let_graphs_be_kept() -> None:
    """Allow backward passes with ``retain_graph=True``, which torchdiffeq's adjoint uses.

    By default a compiled backward pass may overwrite tensors that the forward pass saved. The
    setting is local to a thread, and off in the thread of backward passes on a GPU.
    """
    from torch._functorch import config  # noqa: PLC0415 - private: only where it is needed

    if getattr(config, "donated_buffer", False):
        config.donated_buffer = False


def _in_functional_transform() -> bool:
    """Return whether `torch.func.grad`, `vmap` or the like is active: they take no program."""
    return torch._C._functorch.peek_interpreter_stack() is not None
