"""Axes of charts."""

import math
from collections.abc import Sequence


class Scale:
    """Maps values to positions on an axis, with ticks at round values.

    Args:
        values: all that are shown; with 0 among them the axis begins there, so that noise is not magnified.
        begin, end: positions of the ends.
        most: ticks.
    """

    def __init__(self, values: Sequence[float], begin: float, end: float, most: int = 6) -> None:
        low, high = min(values), max(values)
        room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        self.low, self.high, self.begin, self.end = low - room if low else 0.0, high + room, begin, end
        self._most = most

    def __call__(self, value: float) -> float:
        return self.begin + (self.end - self.begin) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten."""
        least = (self.high - self.low) / self._most
        power = 10.0 ** math.floor(math.log10(least))
        step = next(power * k for k in (1, 2, 5, 10) if power * k >= least)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [k * step for k in range(first, last + 1)]
