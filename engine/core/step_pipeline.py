"""Overlaps planning with execution: the next step is planned and sent while one runs.

    engine   plan 1, send │ plan 2, send │ wait 1, update │ plan 3, send │ wait 2, update │ ...
    workers               │ step 1 ........................ │ step 2 ..................... │ ...

This hides the engine's work between two steps if a step takes longer. A row whose input token is
sampled by the step in flight awaits it: the workers fill it in from their own memory.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping

from ...scheduler.request import UnitKey
from ...scheduler.scheduler import Scheduler
from ...scheduler.step import RequestUpdate, StepPlan, StepResult
from ...scheduler.trace import TraceWriter
from ..media.item import UnitContent
from ..observability.stats import EngineStats
from ..structured_output.matchers import Matchers
from ..utils.failpoints import failpoint
from ..worker.group import WorkerGroup, WorkerGroupError
from .batch_builder import build_batch, step_result
from .penalty_slots import SamplingSlots

log = logging.getLogger("octavo.engine")


class StepPipeline:
    """Sends a scheduler's plans to a worker group, with at most two steps in flight."""

    def __init__(
        self,
        scheduler: Scheduler,
        group: WorkerGroup,
        pixels_of: Callable[[str], Mapping[UnitKey, UnitContent]],
        trace: TraceWriter | None,
        overlap: bool,
        stats: EngineStats,
        matchers: Matchers,
    ) -> None:
        """Create a pipeline.

        `pixels_of` returns a request's pixels. Without `overlap`, `step` waits for its own result.
        """
        self._scheduler, self._group, self._trace = scheduler, group, trace
        self._stats, self._matchers = stats, matchers
        self._pixels_of = pixels_of
        self._max_ahead = 1 if overlap else 0  # steps in flight when `step` returns
        self._in_flight: deque[StepPlan] = deque()
        self._slots = SamplingSlots()
        self._was_empty = False
        # Of the latest received step: time of completion, and seconds that the update took.
        self._received: tuple[float, float] | None = None

    @property
    def is_idle(self) -> bool:
        return not self._in_flight

    @property
    def is_starved(self) -> bool:
        """Whether no step is in flight and the latest plan had no work for the workers."""
        return self.is_idle and self._was_empty

    def step(self) -> list[RequestUpdate]:
        """Send the next step, if any, and return the updates of the previous one.

        Raises `WorkerGroupError` if the workers or the step's processing here fails;
        `reset_after_worker_restart` must follow.
        """
        try:
            sent = self._send()
            if self._in_flight and (not sent or len(self._in_flight) > self._max_ahead):
                return self._receive()
        except WorkerGroupError:
            raise
        except Exception as error:
            # Internal error: find the responsible request by isolation, as after a worker crash.
            log.exception("a step failed in the engine")
            raise WorkerGroupError(f"a step failed in the engine: {error!r}") from error
        return []

    def reset_after_worker_restart(self) -> list[RequestUpdate]:
        """Drop in-flight steps and requeue running requests after a worker restart."""
        self._in_flight.clear()
        self._slots.reset()
        if self._trace is not None:
            self._trace.reset_after_worker_restart()
        return self._scheduler.reset_after_worker_restart()

    def _send(self) -> bool:
        """Plan a step and send it to the workers. Return False if there is no plan yet."""
        before = time.monotonic()
        plan = self._scheduler.schedule()
        if plan is None:
            return False
        planned = time.monotonic()
        if self._trace is not None:
            self._trace.plan(plan, before, planned)
        self._stats.plan(plan, planned)
        self._in_flight.append(plan)
        self._was_empty = plan.is_empty
        if not plan.is_empty:
            pixels = {each.request_id: self._pixels_of(each.request_id) for each in plan.encode}
            requests = self._scheduler.requests
            batch = build_batch(
                plan, requests, pixels, self._slots, self._group.size, self._matchers
            )
            failpoint("engine.planned")
            self._group.send(batch, plan.step_id)
        return True

    def _receive(self) -> list[RequestUpdate]:
        """Wait for the oldest step in flight and return its updates."""
        plan = self._in_flight.popleft()
        result, ran, encode_s = StepResult(plan.step_id, ()), time.monotonic(), 0.0
        if not plan.is_empty:
            found = self._group.receive()
            result = step_result(plan, found, self._scheduler.requests)
            ran, encode_s = self._group.done_at, found.encode_seconds
        self._stats.done(ran, encode_s)
        failpoint("engine.stepped")
        received = time.monotonic()
        updates = self._matchers.read(self._scheduler.update(result), self._scheduler)
        self._received = (ran, time.monotonic() - received)
        return updates

    def settle(self) -> None:
        """Finish the step's trace record, now that its outputs have been delivered."""
        if self._trace is not None and self._received is not None:
            self._trace.done(*self._received)
        self._received = None
