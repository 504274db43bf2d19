"""How far one has to walk through the code: ``python tests/house.py`` prints the table.

``python tests/house.py --walk`` prints the way of a log-density, function by function.

A walk is one call, followed through the functions of `cnf`: how many there are, in how many files,
and how many of their frames stand on each other at the deepest.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import cnf
from cnf import CNF, TrainingConfig, fit
from cnf.objectives import Objective

ROOT = Path(cnf.__file__).parent
MOST_MODULES = 14
COMPREHENSIONS = ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>")
"""No functions: later versions of Python have no frame for some of them."""


class Walk(NamedTuple):
    """What one call passes through."""

    seen: list[tuple[str, int, str]]
    """File, line and name of each function, in the order of the first calls."""
    frames: int
    """Frames on each other at the deepest."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """Functions, files and frames."""
        return len(self.seen), len({file for file, _, _ in self.seen}), self.frames


def walk(call: Callable[[], object], stop: type[BaseException] = StopIteration) -> Walk:
    """Follow a call through the functions of the package, to its end or to the exception `stop`."""
    seen: dict[tuple[str, int, str], None] = {}
    depth = deepest = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth, deepest
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(str(ROOT)):
            return
        if code.co_name in COMPREHENSIONS:
            return
        depth += 1 if event == "call" else -1
        deepest = max(deepest, depth)
        file = str(Path(code.co_filename).relative_to(ROOT.parent))
        seen[file, code.co_firstlineno, getattr(code, "co_qualname", code.co_name)] = None

    sys.setprofile(profile)
    try:
        call()
    except stop:
        pass
    finally:
        sys.setprofile(None)
    return Walk(list(seen), deepest)


def log_prob_walk() -> Walk:
    """The way of ``CNF(2).log_prob(x)``."""
    flow, x = CNF(2), torch.zeros(4, 2)
    with torch.no_grad():
        flow.log_prob(x)  # what happens once in a process is not on the way
        return walk(lambda: flow.log_prob(x))


def evaluation_walk() -> Walk:
    """The way of one evaluation of the default field, with its divergence."""
    field, t, x = CNF(2).transforms[-1].vector_field, torch.tensor(0.5), torch.zeros(4, 2)
    with torch.no_grad():
        field.velocity_and_divergence(t, x)
        return walk(lambda: field.velocity_and_divergence(t, x))


class FirstStepError(Exception):
    """Training has come to its first step."""


class Stopping(Objective):
    """An objective that ends the walk when it is asked for a loss."""

    def _loss(self, x, context, weight, draws, generator):  # type: ignore[no-untyped-def]
        sys.setprofile(None)
        raise FirstStepError


def fit_walk() -> Walk:
    """The way of ``fit(flow, x)`` to its first step."""

    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    config = TrainingConfig(objective=Stopping, steps=1, progress=False)
    walk(lambda: fit(CNF(2), x, config), FirstStepError)
    flow = CNF(2)
    return walk(lambda: fit(flow, x, config), FirstStepError)


def modules() -> dict[str, Path]:
    """Every module of the package, by name."""
    paths = sorted(ROOT.rglob("*.py"))
    names = ["cnf." + ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return dict(zip([name.removesuffix(".__init__") for name in names], paths, strict=True))


def signature_share() -> float:
    """Lines of the signatures of functions, for each line of their bodies, docstrings aside."""
    signature = body = 0
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            signature += first.lineno - node.lineno
            start = first.end_lineno if documented else first.lineno - 1
            body += (node.end_lineno or 0) - (start or 0)
    return signature / body


def lines() -> int:
    """Lines of the package."""
    return sum(len(path.read_text().splitlines()) for path in modules().values())


def modules_by_folder() -> dict[str, int]:
    """Number of modules in each folder, ``__init__`` aside."""
    counts: dict[str, int] = {}
    for path in modules().values():
        if path.name != "__init__.py":
            folder = str(path.parent.relative_to(ROOT.parent))
            counts[folder] = counts.get(folder, 0) + 1
    return counts


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imports() -> dict[str, set[str]]:
    """The modules that each module imports; packages stand for what they offer."""
    known = modules()
    return {
        name: {each if each in known else each.rpartition(".")[0] for each in imported(path)}
        & known.keys()
        for name, path in known.items()
    }


def circles() -> list[list[str]]:
    """Modules that import each other, in the order of the imports."""
    graph, done, found = imports(), set[str](), list[list[str]]()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    return found


def table() -> Iterator[tuple[str, str, str]]:
    """What is measured, its value, and the goal."""
    goals = {log_prob_walk: (50, 14, 12), evaluation_walk: (12, 7, None), fit_walk: (90, 24, None)}
    for measure, goal in goals.items():
        wanted = " / ".join(str(number) for number in goal if number)
        taken = " / ".join(str(n) for n, g in zip(measure().counts, goal, strict=True) if g)
        yield f"{(measure.__doc__ or '').rstrip('.')}: functions / files / frames", taken, wanted
    yield "lines of signatures for each line of a body", f"{signature_share():.2f}", "0.30"
    yield "lines", str(lines()), "19000"
    folder, most = max(modules_by_folder().items(), key=lambda pair: pair[1])
    yield f"most modules in a folder ({folder})", str(most), str(MOST_MODULES)
    yield "circles of imports", str(len(circles())), "0"


if __name__ == "__main__":
    if sys.argv[1:] == ["--walk"]:
        for file, line, name in log_prob_walk().seen:
            print(f"{file}:{line} {name}")  # noqa: T201 - a report
    else:
        for what, value, goal in table():
            print(f"{what}: {value}, at most {goal}")  # noqa: T201 - a report
