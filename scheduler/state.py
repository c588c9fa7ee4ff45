"""Who is where: the queues, the blocks and the embeddings, and the moves between them.

    add → WAITING → run → RUNNING → end
                     ↑        ↓
                    PREEMPTED ← preempt

Each move keeps the counts right; who moves, and when, is the planner's and the scheduler's.
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
from .request import Request, RequestStatus, UnitKey, overlapping
from .step import StepPlan


@dataclass
class InFlight:
    """A step that was sent, and whose result has not come."""

    plan: StepPlan
    rows: list[Request | None]  # whose each row is; None once nothing of it counts


class SchedulerState:
    """All requests from admission to their end, and what they hold."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.encoder_cache = EncoderCache(config.encoder_cache_tokens)
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []  # both in order of urgency
        self.running: list[Request] = []
        self.num_queued = 0  # waiting requests, n answers to one prompt counted once
        self.num_queued_tokens = 0
        self.suspects: list[Request] = []  # to run alone, since a step with them ended the workers
        self.in_flight: deque[InFlight] = deque()  # steps on their way, the oldest first
        self._deadlines: list[tuple[float, str]] = []  # a heap; it may name requests long gone

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
        """Takes a request's blocks; when it resumes, what is not found again is computed anew."""
        _remove(self.running, request)
        self._release(request)  # goes by num_computed_tokens, so before that is reset
        request.num_computed_tokens = request.num_sent_tokens = request.num_awaited_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self._wait(request)

    def rewind(self, request: Request) -> None:
        """Its latest report came to nothing: what it has in later steps is void, and the next plan
        goes on from what is computed."""
        request.num_sent_tokens, request.num_awaited_tokens = request.num_computed_tokens, 0
        for step in self.in_flight:
            step.rows = [None if row is request else row for row in step.rows]

    def append(self, request: Request, token: int) -> None:
        request.token_ids.append(token)
        if request.status is RequestStatus.RUNNING:
            request.num_awaited_tokens -= 1
        else:  # it was preempted since its step was sent
            self.num_queued_tokens += 1

    def lose_embedding(self, key: UnitKey) -> None:
        """Workers lack a unit; unless a step on its way encodes it anew, the next plan does."""
        if not any(key == each.unit.key for step in self.in_flight for each in step.plan.encode):
            self.encoder_cache.lose(key)

    def reset_after_worker_restart(self) -> list[Request]:
        """The workers are gone, with all blocks and embeddings. What ran is to be computed anew;
        the requests of the steps that were on their way are suspects: they are returned."""
        rows = [row for step in self.in_flight for row in step.rows]
        blamed = [row for row in dict.fromkeys(rows) if row and not row.status.is_finished]
        self.in_flight.clear()
        for request in reversed(tuple(self.running)):
            self.preempt(request)
        self.blocks.reset()
        self.encoder_cache.reset()
        for request in blamed:
            request.num_kills += 1
            if request not in self.suspects:
                self.suspects.append(request)
        return blamed

    def clear(self, request: Request) -> None:
        """It ran well alone: it did not end the workers."""
        request.num_kills = 0
        self.suspects.remove(request)

    def end(self, request: Request, status: RequestStatus, error: str) -> None:
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
        # What lies before is released already: `update` lets go of each unit that is done.
        for unit in overlapping(request.units, request.num_computed_tokens, request.media_end):
            self.encoder_cache.release(unit.key, request.request_id)

    def take_expired(self, now: float) -> Iterator[Request]:
        """Requests whose deadline has passed; each is told of once."""
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            request = self.requests.get(request_id)
            if request is not None and request.deadline == deadline:
                yield request  # else it ended in time, and its name may be another's
        if len(self._deadlines) > 2 * len(self.requests) + 64:  # most are of requests long gone
            left = [r for r in self.requests.values() if r.deadline < math.inf]
            self._deadlines = [(r.deadline, r.request_id) for r in left]
            heapq.heapify(self._deadlines)

    def check_integrity(self) -> None:
        """Every block and every held embedding belongs to a running request."""
        self.blocks.check_integrity(request.block_table for request in self.running)
        held = {
            request.request_id: {
                unit.key for unit in request.units if unit.end > request.num_computed_tokens
            }
            for request in self.running
        }
        self.encoder_cache.check_integrity(held)
        assert all(request.request_id in self.requests for request in self.suspects)
        everyone = {request.request_id for request in (*self.running, *self.waiting)}
        assert everyone == self.requests.keys()
        assert not any(request.block_table for request in self.waiting)
        queued = [request.num_tokens for request in self.waiting if request.parent is None]
        assert (self.num_queued, self.num_queued_tokens) == (len(queued), sum(queued))
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=urgency_of)


def urgency_of(request: Request) -> tuple[float, int]:
    return request.urgency


def _remove(queue: list[Request], request: Request) -> None:
    """Takes a request out of a list that is in order of urgency."""
    index = bisect_left(queue, request.urgency, key=urgency_of)
    assert queue[index] is request
    del queue[index]
