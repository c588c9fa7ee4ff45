"""What the engine is at, in numbers that any thread may ask for.

The step thread writes plain numbers and others read them as they are: no lock, so that whoever asks
never holds a step up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..scheduler.scheduler import Scheduler

WINDOW = 10  # seconds that the rate is taken over


@dataclass(frozen=True)
class Load:
    """At one moment; n answers to one prompt are n of them. Sums are since the engine's start."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    prefix_hit_rate: float  # share of prompt tokens, of requests that ended, found in the cache
    encoder_hit_rate: float  # share of encode units whose embedding was there already
    tokens_per_second: float  # of output, over the last `WINDOW` seconds
    num_output_tokens: int


class LoadCounter:
    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler, self._clock = scheduler, clock
        self._start = clock()
        # A second's tokens are at its number modulo the size; each entry is replaced whole.
        self._seconds: list[tuple[int, int]] = [(-WINDOW, 0)] * (WINDOW + 1)
        self._num_output = self._num_prompt = self._num_cached = 0

    def add_output(self, num_tokens: int) -> None:
        """On the step thread: what a step made."""
        self._num_output += num_tokens
        second = int(self._clock())
        at = second % len(self._seconds)
        last, count = self._seconds[at]
        self._seconds[at] = (second, num_tokens + (count if last == second else 0))

    def add_prompt(self, num_tokens: int, num_cached: int) -> None:
        """On the step thread: a request that ended."""
        self._num_prompt += num_tokens
        self._num_cached += num_cached

    def load(self) -> Load:
        """On any thread."""
        state, cache = self._scheduler, self._scheduler.encoder_cache
        return Load(
            num_running=len(state.running),
            num_waiting=len(state.waiting),
            num_free_blocks=state.blocks.num_free,
            num_blocks=state.blocks.num_blocks,
            prefix_hit_rate=self._num_cached / max(1, self._num_prompt),
            encoder_hit_rate=cache.num_found / max(1, cache.num_found + cache.num_added),
            tokens_per_second=self._rate(),
            num_output_tokens=self._num_output,
        )

    def _rate(self) -> float:
        now = self._clock()
        tokens = sum(count for second, count in tuple(self._seconds) if second > now - WINDOW)
        return tokens / min(WINDOW, max(1.0, now - self._start))
