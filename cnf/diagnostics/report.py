"""What a certification found."""

import math
from dataclasses import dataclass
from typing import Literal

from cnf.transforms import Likelihood


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number, and what to think of it."""

    name: str
    """Name of the check."""
    value: float = math.nan
    """What was measured; NaN if nothing was."""
    limit: float = math.nan
    """The largest value that passes."""
    verdict: Literal["pass", "fail", "skip"] = "skip"
    """Whether the value is within the limit; "skip" if it could not be measured."""
    meaning: str
    """What the value is, or why there is none."""
    remedy: str = ""
    """What to do if it fails."""

    def __str__(self) -> str:
        numbers = "" if self.verdict == "skip" else f"{self.value:.3g} (limit {self.limit:.3g})"
        line = f"{self.verdict:<5}{self.name:<20}{numbers:<28}{self.meaning}"
        return f"{line}\n     -> {self.remedy}" if self.verdict == "fail" else line


@dataclass(frozen=True, kw_only=True)
class LikelihoodReport:
    """What `certify` found."""

    likelihood: Likelihood
    """What `log_prob` of the flow is: "exact", "estimate", "lower_bound" or "biased_estimate"."""
    rows: int
    """Number of rows that it was measured on."""
    checks: tuple[Check, ...]
    """The checks, in a fixed order."""

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != "fail" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """The check of this name.

        Raises:
            KeyError: If there is none.
        """
        return {check.name: check for check in self.checks}[name]

    def __str__(self) -> str:
        title = f"likelihood: {self.likelihood}, on {self.rows} rows; in nats where not said"
        return "\n".join([title, *map(str, self.checks)])
