"""Scheduler state: queues, blocks, embeddings and the transitions between request states.

    add → WAITING → run → RUNNING → end
                     ↑        ↓
                    PREEMPTED ← preempt

Each transition keeps the counters consistent. The planner and the scheduler decide which requests
to move.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from .admission import SchedulerConfig
from .block_manager import BlockManager
from .encoder_cache import EncoderCache
from .errors import RequestError
from .request import Request, RequestStatus, UnitKey, overlapping
from .step import StepPlan


@dataclass
class InFlight:
    """A step that was sent and has no result yet."""

    plan: StepPlan
    rows: list[Request | None]  # the request of each row; None if its result is void


class SchedulerState:
    """All unfinished requests and the resources they hold."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.encoder_cache = EncoderCache(config.encoder_cache_tokens)
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []  # both sorted by urgency
        self.running: list[Request] = []
        self.num_queued = 0  # waiting requests, counted once per prompt
        self.num_queued_tokens = 0
        self.suspects: list[Request] = []  # crash suspects, run one at a time
        self.in_flight: deque[InFlight] = deque()  # oldest first
        self._deadlines: list[tuple[float, str]] = []  # heap; may contain finished requests

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self._wait(request)
        if request.deadline < math.inf:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))

    def run(self, request: Request) -> None:
        self._unwait(request)
        insort(self.running, request, key=urgency_of)
        request.status = RequestStatus.RUNNING

    def preempt(self, request: Request) -> None:
        """Release a running request's blocks and queue it for recomputation."""
        _remove(self.running, request)
        self._release(request)  # reads num_computed_tokens, which is reset below
        request.num_computed_tokens = request.num_sent_tokens = request.num_awaited_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self._wait(request)

    def rewind(self, request: Request) -> None:
        """Discard a request's rows in steps in flight, after a step computed nothing for it.

        The next plan continues after its computed tokens.
        """
        request.num_sent_tokens, request.num_awaited_tokens = request.num_computed_tokens, 0
        for step in self.in_flight:
            step.rows = [None if row is request else row for row in step.rows]

    def append(self, request: Request, token: int) -> None:
        """Append a sampled token to a request."""
        request.token_ids.append(token)
        if request.status is RequestStatus.RUNNING:
            request.num_awaited_tokens -= 1
        else:  # preempted after its step was sent
            self.num_queued_tokens += 1

    def lose_embedding(self, key: UnitKey) -> None:
        """Encode a unit that the workers lack again in the next plan.

        Does nothing if a step in flight encodes it.
        """
        if not any(key == each.unit.key for step in self.in_flight for each in step.plan.encode):
            self.encoder_cache.lose(key)

    def reset_after_worker_restart(self) -> list[Request]:
        """Preempt all running requests: the workers lost all blocks and embeddings.

        Returns the crash suspects, i.e. the requests of the steps in flight.
        """
        rows = [row for step in self.in_flight for row in step.rows]
        suspects = [row for row in dict.fromkeys(rows) if row and not row.status.is_finished]
        self.in_flight.clear()
        for request in reversed(tuple(self.running)):
            self.preempt(request)
        self.blocks.reset()
        self.encoder_cache.reset()
        for request in suspects:
            request.num_kills += 1
            if request not in self.suspects:
                self.suspects.append(request)
        return suspects

    def clear(self, request: Request) -> None:
        """Clear a crash suspect after it ran alone without a crash."""
        request.num_kills = 0
        self.suspects.remove(request)

    def end(self, request: Request, status: RequestStatus, error: RequestError | None) -> None:
        """Remove a request and release its resources; `status` is a finished state."""
        del self.requests[request.request_id]
        if request in self.suspects:
            self.suspects.remove(request)
        if request.status is RequestStatus.RUNNING:
            _remove(self.running, request)
        else:
            self._unwait(request)
        self._release(request)
        request.status, request.error = status, error

    def _wait(self, request: Request) -> None:
        insort(self.waiting, request, key=urgency_of)
        self._count(request, 1)

    def _unwait(self, request: Request) -> None:
        _remove(self.waiting, request)
        self._count(request, -1)

    def _count(self, request: Request, sign: int) -> None:
        if request.parent is None:
            self.num_queued += sign
            self.num_queued_tokens += sign * request.num_tokens

    def _release(self, request: Request) -> None:
        self.blocks.free(request.block_table)
        # `update` has released the units before num_computed_tokens.
        for unit in overlapping(request.units, request.num_computed_tokens, request.media_end):
            self.encoder_cache.release(unit.key, request.request_id)

    def take_expired(self, now: float) -> Iterator[Request]:
        """Yield each request whose deadline has passed, once."""
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            request = self.requests.get(request_id)
            if request is not None and request.deadline == deadline:
                yield request  # else it has finished, and its id may be reused
        if len(self._deadlines) > 2 * len(self.requests) + 64:  # most belong to finished requests
            left = [r for r in self.requests.values() if r.deadline < math.inf]
            self._deadlines = [(r.deadline, r.request_id) for r in left]
            heapq.heapify(self._deadlines)

    def check_integrity(self) -> None:
        """Assert that blocks and embeddings are held by running requests only."""
        self.blocks.check_integrity(request.block_table for request in self.running)
        held = {
            request.request_id: {
                unit.key for unit in request.units if unit.end > request.num_computed_tokens
            }
            for request in self.running
        }
        self.encoder_cache.check_integrity(held)
        assert all(request.request_id in self.requests for request in self.suspects)
        names = {request.request_id for request in (*self.running, *self.waiting)}
        assert names == self.requests.keys()
        assert not any(request.block_table for request in self.waiting)
        queued = [request.num_tokens for request in self.waiting if request.parent is None]
        assert (self.num_queued, self.num_queued_tokens) == (len(queued), sum(queued))
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=urgency_of)


def urgency_of(request: Request) -> tuple[float, int]:
    return request.urgency


def _remove(queue: list[Request], request: Request) -> None:
    """Remove a request from a list sorted by urgency."""
    index = bisect_left(queue, request.urgency, key=urgency_of)
    assert queue[index] is request
    del queue[index]
