"""A lightweight histogram: adding a value is one binary search and two additions."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

# Bucket bounds in seconds for a step or a token, for waiting times, and for a whole request.
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
MIDDLE = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Histogram:
    """Histogram with inclusive upper bounds. One thread may add while others read."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """Create an empty histogram.

        `bounds` are ascending; a last bucket counts values above all of them.
        """
        self.bounds = bounds
        self.total = 0.0  # sum of all values
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        """Count `value` the given number of times."""
        self._counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self._counts)

    def cumulative(self) -> list[tuple[float, int]]:
        """Return (bound, number of values up to it) for each bound; the last bound is infinity."""
        counts = accumulate(tuple(self._counts))
        return list(zip((*self.bounds, float("inf")), counts, strict=True))
