"""Speed-ups with their uncertainty: the pictures of a comparison are few, and their times vary."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEAST = 3
"""Pairs of times from which an interval is given."""

STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t distribution with 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class SpeedUp:
    """Ratio of times, unaccelerated over accelerated, with its 95 % interval."""

    value: float  # geometric mean over the pairs
    low: float
    high: float
    pairs: int

    @property
    def shown(self) -> bool:
        """Whether the pairs show a difference: the interval lies on one side of 1."""
        return self.low > 1 or self.high < 1

    @classmethod
    def of(cls, exact: Sequence[float], other: Sequence[float]) -> "SpeedUp | None":
        """The speed-up for the times (in seconds) of the same pictures drawn in turns; None for fewer than `LEAST`.

        Student's t interval of the mean of the ratios' logarithms.
        """
        if len(exact) < LEAST:
            return None
        logs = [math.log(a / b) for a, b in zip(exact, other, strict=True)]
        n = len(logs)
        mean = statistics.fmean(logs)
        half = STUDENT[min(n - 1, len(STUDENT)) - 1] * statistics.stdev(logs) / math.sqrt(n)
        return cls(math.exp(mean), math.exp(mean - half), math.exp(mean + half), n)

    def __str__(self) -> str:
        """ "1.17× (1.05–1.31)", or that no difference is shown, with the interval."""
        span = f"{self.low:.2f}–{self.high:.2f}"
        return f"{self.value:.2f}× ({span})" if self.shown else f"no difference shown ({span}×)"
