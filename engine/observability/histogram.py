"""A histogram of plain numbers: adding to it is a search and an addition."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

# Seconds: of a step or a token; of what a request waits for; of a whole request.
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
MIDDLE = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Histogram:
    """Counts values by upper bounds, each of which belongs to its bucket. One thread adds; others
    may read meanwhile."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """`bounds`: rising; what is above the last is counted too."""
        self.bounds = bounds
        self.total = 0.0  # the sum of all values
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        """`value` was seen so many times."""
        self._counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        """Values seen."""
        return sum(self._counts)

    def cumulative(self) -> list[tuple[float, int]]:
        """(bound, values up to it) for each bound; at last infinity and all values."""
        counts = accumulate(tuple(self._counts))
        return list(zip((*self.bounds, float("inf")), counts, strict=True))
