"""Engine counters and histograms behind `/metrics`, `GetLoad` and log lines.

The step thread updates counters; derived values are computed when read. Other threads may read at
any time, and may see a step partially counted.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ...scheduler.request import Request
from ...scheduler.scheduler import Scheduler
from ...scheduler.step import StepPlan
from ..input.processor import InputTimes, ProcessedInput
from ..outputs import OutputDelta, RequestTimes
from ..worker.group import WorkerGroup
from .histogram import LONG, MIDDLE, SHORT, Histogram

RATE_WINDOW = 10  # seconds of the average of tokens per second
MAX_STEPS = 512  # latest steps that are kept


@dataclass(frozen=True)
class EngineLoad:
    """Current load of an engine."""

    num_running: int  # requests
    num_waiting: int  # waiting or preempted requests; each of n answers counts
    num_preparing: int  # requests being preprocessed or not yet admitted
    num_blocks: int  # KV cache blocks on each rank
    num_free_blocks: int  # including cached blocks
    num_cached_blocks: int  # free blocks with a cached prefix
    prefix_hit_ratio: float  # fraction of prompt tokens found in the cache since the start
    encoder_hit_ratio: float  # fraction of media units found in the cache since the start
    tokens_per_second: float  # output tokens, over the last RATE_WINDOW seconds


class StepRecord(NamedTuple):
    """Duration and token counts of one step."""

    step_id: int
    done_at: float  # monotonic time
    seconds: float
    num_encode_tokens: int
    num_prefill_tokens: int
    num_decode_tokens: int


@dataclass(eq=False, slots=True)
class _Clock:
    """Monotonic times at which a request reached each stage; 0: not yet."""

    requests: Sequence[Request]  # one per answer
    arrived_at: float
    ready_at: float  # preprocessed
    started_at: float = 0.0  # first scheduled
    first_at: list[float] = field(default_factory=list)  # first token of each answer
    last_at: list[float] = field(default_factory=list)  # latest token of each answer
    encode_s: float = 0.0  # seconds of encode stages that included its media

    def times(self, now: float) -> RequestTimes:
        first = min((at for at in self.first_at if at), default=0.0)
        started = self.started_at
        return RequestTimes(
            preprocess_s=self.ready_at - self.arrived_at,
            queue_s=(started or now) - self.ready_at,
            prefill_s=(first or now) - started if started else None,
            encode_s=self.encode_s or None,
            decode_s=now - first if first else None,
            ttft_s=first - self.arrived_at if first else None,
            total_s=now - self.arrived_at,
        )


class EngineStats:
    """Counters and histograms of one engine since its start.

    Public attributes and `load` may be read on any thread. Methods that update are for the step
    thread, unless they say otherwise.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        group: WorkerGroup,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler, self.group, self._now = scheduler, group, clock
        self.preparing: set[str] = set()  # keys of requests in preprocessing, set by the caller
        self.num_restarts = 0
        self._clocks: dict[str, _Clock] = {}  # by request_id
        self._in_flight: deque[tuple[StepPlan, float]] = deque()  # (plan, time of planning)
        self._free_at = 0.0  # time at which the latest step was done
        self._lock = threading.Lock()  # guards `ends` and `errors`, updated by several threads
        self.start_over()

    def start_over(self) -> None:
        """Reset all counters, such as after a warm-up. The engine must be idle."""
        self.num_prompt_tokens = self.num_cached_tokens = self.num_output_tokens = 0
        self.num_prefill_tokens = self.num_decode_tokens = 0  # including recomputation
        self.num_encode_tokens = self.num_preemptions = 0
        self.ends: Counter[str] = Counter()  # requests by finish reason, or "refused"
        self.errors: Counter[str] = Counter()  # by status code
        self.closed_connections: Counter[str] = Counter()  # by reason
        self.ttft, self.e2e = Histogram(MIDDLE), Histogram(LONG)
        self.tpot, self.itl = Histogram(SHORT), Histogram(SHORT)
        self.input_queue, self.preprocess = Histogram(SHORT), Histogram(SHORT)
        self.queue, self.prefill = Histogram(MIDDLE), Histogram(MIDDLE)
        self.decode = Histogram(LONG)
        self.encode_stage = Histogram(SHORT)  # encode stage of steps that have one
        # Steps by their most expensive stage.
        self.steps = {stage: Histogram(SHORT) for stage in ("encode", "prefill", "decode")}
        self.latest_steps: deque[StepRecord] = deque(maxlen=MAX_STEPS)  # step thread only
        self._seconds: deque[list[int]] = deque(maxlen=RATE_WINDOW + 2)  # [second, output tokens]

    def add(
        self,
        request_id: str,
        requests: Sequence[Request],
        ready: ProcessedInput,
        asked_at: float,
    ) -> None:
        """Count an admitted request.

        `asked_at`: time of the call to admit it, which counts as its arrival if `ready` has no
        times.
        """
        times, arrived_at = ready.times, ready.arrived_at
        if times is None or arrived_at is None:
            times, arrived_at = InputTimes(0.0, self._now() - asked_at), asked_at
        none = [0.0] * len(requests)
        ready_at = arrived_at + times.queued_s + times.spent_s
        self._clocks[request_id] = _Clock(requests, arrived_at, ready_at, 0.0, none, [*none])
        self.input_queue.add(times.queued_s)
        self.preprocess.add(times.spent_s)

    def refuse(self, reason: str, code: str = "") -> None:
        """Count a request that ended before admission. Thread-safe.

        `reason`: "abort", or "refused" or "error" with a status code.
        """
        with self._lock:
            self.ends[reason] += 1
            if code:
                self.errors[code] += 1

    def count_error(self, code: str) -> None:
        """Count a call that was rejected before it became a request. Thread-safe."""
        with self._lock:
            self.errors[code] += 1

    def count_closed_connection(self, reason: str) -> None:
        """Count a connection that the HTTP or metrics server closed. Thread-safe."""
        with self._lock:
            self.closed_connections[reason] += 1

    def plan(self, plan: StepPlan, planned_at: float) -> None:
        """Count a planned step."""
        self._in_flight.append((plan, planned_at))
        self.num_preemptions += len(plan.preempted)
        for name in plan.started:
            clock = self._clocks.get(name)  # None for the second and later answers of a request
            if clock is not None and not clock.started_at:
                clock.started_at = planned_at
                self.queue.add(planned_at - clock.ready_at)
                self.num_prompt_tokens += clock.requests[0].num_prompt_tokens
                self.num_cached_tokens += clock.requests[0].num_cached_tokens

    def done(self, ran_at: float, encode_s: float = 0.0) -> None:
        """Count the oldest step in flight, done at `ran_at`, with `encode_s` of encoding."""
        plan, planned_at = self._in_flight.popleft()
        start, self._free_at = max(planned_at, self._free_at), ran_at
        if plan.is_empty:
            return
        num_decode = plan.num_decode_tokens
        num_prefill = plan.num_tokens - num_decode
        num_encode = sum(each.unit.num_tokens for each in plan.encode)
        stage = "encode" if plan.encode else "prefill" if num_prefill else "decode"
        seconds = max(0.0, ran_at - start)
        self.steps[stage].add(seconds)
        if plan.encode:
            self.encode_stage.add(encode_s)
        for name in {each.request_id for each in plan.encode}:
            if clock := self._clocks.get(name):
                clock.encode_s += encode_s
        self.num_prefill_tokens += num_prefill
        self.num_decode_tokens += num_decode
        self.num_encode_tokens += num_encode
        counts = (num_encode, num_prefill, num_decode)
        self.latest_steps.append(StepRecord(plan.step_id, ran_at, seconds, *counts))

    def reset_after_worker_restart(self, num_restarts: int) -> None:
        """Drop in-flight steps and record the total number of restarts."""
        self._in_flight.clear()
        self.num_restarts = num_restarts

    def take(self, deltas: list[OutputDelta]) -> list[OutputDelta]:
        """Count a step's deltas, and add the times to each request's last delta."""
        now = self._now()
        # Requests whose previous token came at the same time are added to the histogram together.
        num_tokens, since, weight = 0, 0.0, 0
        for index, delta in enumerate(deltas):
            if delta.token_ids:
                num_tokens += len(delta.token_ids)
                last_at = self._clocks[delta.request_id].last_at
                before, last_at[delta.index] = last_at[delta.index], now
                if before == since:
                    weight += 1
                else:
                    self._add_gaps(now - since, weight)
                    since, weight = before, 1
                if not before:
                    self._begin(delta, now)
                    weight = 0
            if delta.finish_reason is not None:
                deltas[index] = self._end(delta, now)
        self._add_gaps(now - since, weight)
        if num_tokens:
            self._count(num_tokens, now)
        return deltas

    def _add_gaps(self, seconds: float, weight: int) -> None:
        if weight:
            self.itl.add(seconds, weight)

    def _count(self, num_tokens: int, now: float) -> None:
        self.num_output_tokens += num_tokens
        second = int(now)
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0])
        self._seconds[-1][1] += num_tokens

    def _begin(self, delta: OutputDelta, now: float) -> None:
        """Count an answer's first token."""
        clock = self._clocks[delta.request_id]
        if not any(clock.first_at):
            self.ttft.add(now - clock.arrived_at)
            self.prefill.add(now - clock.started_at)
        clock.first_at[delta.index] = now

    def _end(self, delta: OutputDelta, now: float) -> OutputDelta:
        """Count a finished answer, and its request if that was the last one."""
        clock = self._clocks[delta.request_id]
        first, last = clock.first_at[delta.index], clock.last_at[delta.index]
        later = clock.requests[delta.index].num_output_tokens - 1
        if first and later > 0:
            self.tpot.add((last - first) / later)
        if delta.usage is None:
            return delta
        del self._clocks[delta.request_id]
        times = clock.times(now)
        self.e2e.add(times.total_s)
        if times.decode_s is not None:
            self.decode.add(times.decode_s)
        self.refuse(delta.finish_reason or "", delta.failure.code if delta.failure else "")
        return replace(delta, times=times)

    def load(self) -> EngineLoad:
        """Return the current load."""
        state = self.scheduler.state
        blocks, cache = state.blocks, state.encoder_cache
        return EngineLoad(
            num_running=len(state.running),
            num_waiting=len(state.waiting),
            num_preparing=len(self.preparing),
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free,
            num_cached_blocks=blocks.num_evictable,
            prefix_hit_ratio=_ratio(self.num_cached_tokens, self.num_prompt_tokens),
            encoder_hit_ratio=_ratio(cache.num_found, cache.num_found + cache.num_added),
            tokens_per_second=self._rate(),
        )

    def _rate(self) -> float:
        end = int(self._now())
        seconds = tuple(self._seconds)
        return sum(n for at, n in seconds if end - RATE_WINDOW <= at < end) / RATE_WINDOW


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
