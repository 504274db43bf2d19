"""Report of a certification."""

import math
from dataclasses import dataclass
from typing import Literal

from cnf.transforms import Likelihood


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check."""

    name: str
    """Name of the check."""
    value: float = math.nan
    """Measured value; NaN for none."""
    limit: float = math.nan
    """The largest value that passes."""
    verdict: Literal["pass", "fail", "skip"] = "skip"
    """Whether the value is within the limit; "skip" if it could not be measured."""
    meaning: str
    """Meaning of the value, or the reason why there is none."""
    remedy: str = ""
    """Remedy if it fails."""

    def __str__(self) -> str:
        numbers = "" if self.verdict == "skip" else f"{self.value:.3g} (limit {self.limit:.3g})"
        line = f"{self.verdict:<5}{self.name:<20}{numbers:<28}{self.meaning}"
        return f"{line}\n     -> {self.remedy}" if self.verdict == "fail" else line


@dataclass(frozen=True, kw_only=True)
class LikelihoodReport:
    """Report of `certify`."""

    likelihood: Likelihood
    """Kind of likelihood of the flow."""
    rows: int
    """Number of rows."""
    checks: tuple[Check, ...]
    """The checks, in a fixed order."""

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != "fail" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """Return the check of this name; raise a KeyError if there is none."""
        return {check.name: check for check in self.checks}[name]

    def __str__(self) -> str:
        title = f"likelihood: {self.likelihood}, on {self.rows} rows; in nats where not said"
        return "\n".join([title, *map(str, self.checks)])
