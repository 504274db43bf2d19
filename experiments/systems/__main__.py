"""Show what the systems of the literature are for.

Run as ``python -m experiments.systems NAME``; ``--help`` lists the names and the settings.
"""

import importlib
import pkgutil
from dataclasses import replace
from typing import Annotated

import tyro

import experiments.systems
from benchmarks.files import write_text
from benchmarks.timing import describe, machine, one_thread
from experiments.systems.settings import Settings

NAMES = sorted(
    module.name
    for module in pkgutil.iter_modules(experiments.systems.__path__)
    if module.name not in ("__main__", "settings")
)
"""Names of the shows; each is a module with ``show(settings)``, which returns its table."""

Names = Annotated[tuple[str, ...], tyro.conf.Positional]


def main(names: Names = (), *, settings: tyro.conf.OmitArgPrefixes[Settings]) -> None:
    """Show what the systems of the literature are for.

    Args:
        names: Names of the systems; none for all.
        settings: Settings of all shows.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise SystemExit(f"names must be among {', '.join(NAMES)}; got {', '.join(unknown)}.")
    if settings.quick:
        settings = replace(settings, out=settings.out / "quick")
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in names or NAMES:
        with one_thread():
            table = importlib.import_module(f"experiments.systems.{name}").show(settings)
        write_text(settings.out / f"{name}.md", f"{table}\n\n{describe(machine())}\n")
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
