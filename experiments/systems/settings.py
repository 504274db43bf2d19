"""Settings of all shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Show what a system is for."""

    data: Path | None = None
    """Folder or file of data, for the systems that say so; None for data of their own."""
    seed: int = 0
    """Seed of data, weights and draws."""
    out: Path = Path("runs/systems")
    """Folder of the tables and pictures, ``NAME.md`` and ``NAME.png``."""
    quick: bool = False
    """Only see that everything works, with little of everything."""

    def choose(self, full: Value, quick: Value) -> Value:
        """Return the first, or the second for a quick run."""
        return quick if self.quick else full
