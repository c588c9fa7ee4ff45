"""Snapshots of an engine's requests, block ownership and recent steps, for the dashboard.

`take_snapshot` runs on the step thread between two steps, only on request, and just copies state.
Readers derive values from the copies on their own thread.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from ...scheduler.request import Request
from ...scheduler.scheduler import Scheduler
from .stats import EngineLoad, EngineStats, StepRecord

MAX_WAITING = 256  # first requests of the queue

# Codes of blocks in `Snapshot.runs`. FIRST_REQUEST + i: used only by request i of the snapshot.
UNUSED, CACHED, SHARED, FIRST_REQUEST = 0, 1, 2, 3


@dataclass(frozen=True)
class RequestRow:
    """One answer of a request, with the scheduler's request id."""

    request_id: str
    status: str  # waiting, running, preempted
    awaits_media: bool  # media is still being decoded
    priority: int
    num_prompt_tokens: int
    num_cached_tokens: int  # prompt tokens found in the prefix cache
    num_computed_tokens: int  # prompt and output
    num_output_tokens: int
    max_tokens: int  # limit of output tokens
    num_blocks: int


@dataclass(frozen=True)
class Snapshot:
    """State of an engine between two steps."""

    requests: tuple[RequestRow, ...]  # running requests, then the first of the queue
    tables: tuple[array[int], ...]  # block table of each running request
    ref_counts: array[int]  # per block
    evictable: array[int]  # free blocks with a cached prefix
    block_size: int  # tokens
    load: EngineLoad
    steps: tuple[StepRecord, ...]  # latest steps, oldest first

    def runs(self) -> list[int]:
        """Return run-length encoded states of all blocks: [code, count, code, count, ...]."""
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
    """Copy the engine's state. Call it on the step thread."""
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
