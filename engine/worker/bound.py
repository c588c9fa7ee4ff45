"""How long a step may take before the ranks are taken to wait for each other for ever."""

from __future__ import annotations

import math

from ..runner.batch import InputBatch

LEAST_BOUND, BOUND_FACTOR = 30.0, 20.0  # seconds, and times what a step should take


class StepBound:
    """How long a step may take, from its work and from what steps have taken.

    Far more than it should: a first step compiles, pages weights in, or encodes for seconds.
    """

    def __init__(self) -> None:
        self._rate = 0.05  # seconds for a unit of work, of the slowest steps lately

    def seconds(self, work: float) -> float:
        return LEAST_BOUND + BOUND_FACTOR * self._rate * work

    def learn(self, work: float, seconds: float) -> None:
        self._rate = max(0.9 * self._rate, seconds / work)


def work_of(batch: InputBatch) -> float:
    """Tokens computed, patches encoded, and tokens read."""
    patches = sum(math.prod(task.grid_thw) for task in batch.encode if task.embeds is None)
    return 1 + batch.token_ids.size + patches + int(batch.context_lens.sum()) / 64
