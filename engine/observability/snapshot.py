"""What an engine holds at one moment, for whoever watches it.

`take_snapshot` runs on the step thread, between two steps and only when somebody asks, so it copies
and works nothing out. What the copies come to is the reader's, on a thread of its own.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from ...scheduler.request import Request
from ...scheduler.scheduler import Scheduler
from .stats import EngineLoad, EngineStats, StepRecord

MAX_WAITING = 256  # of the queue's head

# What a block is in `runs`; from FIRST_REQUEST on it is the only request that has it, by its place
# among the snapshot's requests.
UNUSED, CACHED, SHARED, FIRST_REQUEST = 0, 1, 2, 3


@dataclass(frozen=True)
class RequestRow:
    """One answer of a request; the names are those that the engine has."""

    request_id: str
    status: str  # waiting, running, preempted
    awaits_media: bool  # pixels of it are still being made
    priority: int
    num_prompt_tokens: int
    num_cached_tokens: int  # of these, found in the prefix cache
    num_computed_tokens: int  # of prompt and output
    num_output_tokens: int
    max_tokens: int  # of output
    num_blocks: int


@dataclass(frozen=True)
class Snapshot:
    """At one moment, between two steps."""

    requests: tuple[RequestRow, ...]  # all that run, then the queue's head
    tables: tuple[array[int], ...]  # the blocks of each request that runs
    ref_counts: array[int]  # of each block
    evictable: array[int]  # blocks that are free, and whose content can be found
    block_size: int  # tokens
    load: EngineLoad
    steps: tuple[StepRecord, ...]  # the latest, the oldest first

    def runs(self) -> list[int]:
        """The blocks in order of their ids, run-length coded: what, how many, what, how many."""
        codes = np.zeros(len(self.ref_counts), np.int32)
        codes[np.asarray(self.evictable, np.int32)] = CACHED
        for index, table in enumerate(self.tables):
            codes[np.asarray(table, np.int32)] = FIRST_REQUEST + index
        codes[np.asarray(self.ref_counts, np.int32) > 1] = SHARED
        if not len(codes):
            return []
        starts = np.flatnonzero(np.diff(codes, prepend=codes[0] - 1))
        lengths = np.diff(starts, append=len(codes))
        return np.column_stack((codes[starts], lengths)).reshape(-1).tolist()


def take_snapshot(scheduler: Scheduler, stats: EngineStats) -> Snapshot:
    """On the step thread."""
    running, waiting = scheduler.running, scheduler.waiting[:MAX_WAITING]
    ref_counts, evictable = scheduler.blocks.copy_states()
    return Snapshot(
        requests=tuple(_row(request) for request in (*running, *waiting)),
        tables=tuple(request.block_table[:] for request in running),
        ref_counts=ref_counts,
        evictable=evictable,
        block_size=scheduler.config.block_size,
        load=stats.load(),
        steps=tuple(stats.latest_steps),
    )


def _row(request: Request) -> RequestRow:
    return RequestRow(
        request_id=request.request_id,
        status=request.status.value,
        awaits_media=request.awaits_media,
        priority=request.priority,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=request.num_cached_tokens,
        num_computed_tokens=request.num_computed_tokens,
        num_output_tokens=request.num_output_tokens,
        max_tokens=request.max_tokens,
        num_blocks=len(request.block_table),
    )
