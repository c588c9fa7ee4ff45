"""Keeps the workers busy: the next step is planned and sent while one runs.

    engine   plan 1, send │ plan 2, send │ wait 1, take in │ plan 3, send │ wait 2, take in │ ...
    workers               │ step 1 ......................... │ step 2 ...................... │ ...

So what the engine does between two steps costs no time as long as a step takes longer. A row whose
token is drawn by the step that runs awaits it: the workers fill it in from their own memory.
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
    """Drives a group with a scheduler's plans: at most two steps are on their way at once."""

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
        """`pixels_of` a request by its id; without `overlap` each step is waited for at once."""
        self._scheduler, self._group, self._trace = scheduler, group, trace
        self._stats, self._matchers = stats, matchers
        self._pixels_of = pixels_of
        self._most_ahead = 1 if overlap else 0  # steps on their way when `step` returns
        self._on_way: deque[StepPlan] = deque()
        self._slots = SamplingSlots()
        self._was_empty = False
        self._taken_in: tuple[float, float] | None = None  # when the latest step was done, and
        # seconds that taking it in took

    @property
    def is_idle(self) -> bool:
        return not self._on_way

    @property
    def is_starved(self) -> bool:
        """Nothing is on its way, and the latest plan had nothing for the workers to do."""
        return self.is_idle and self._was_empty

    def step(self) -> list[RequestUpdate]:
        """Sends the next step, where there is one, and takes in the result of the one before it.

        Raises `WorkerGroupError` when the workers fail, or a step does here;
        `reset_after_worker_restart` must follow.
        """
        try:
            sent = self._send()
            if self._on_way and (not sent or len(self._on_way) > self._most_ahead):
                return self._receive()
        except WorkerGroupError:
            raise
        except Exception as error:  # a fault of ours: whose request it is comes out as for workers
            log.exception("a step failed in the engine")
            raise WorkerGroupError(f"a step failed in the engine: {error!r}") from error
        return []

    def reset_after_worker_restart(self) -> list[RequestUpdate]:
        """The workers are new: what was on its way is lost, and what ran starts over."""
        self._on_way.clear()
        self._slots.reset()
        if self._trace is not None:
            self._trace.reset_after_worker_restart()
        return self._scheduler.reset_after_worker_restart()

    def _send(self) -> bool:
        """Plans a step and has the workers run it. False when there is nothing to plan yet."""
        before = time.monotonic()
        plan = self._scheduler.schedule()
        if plan is None:
            return False
        planned = time.monotonic()
        if self._trace is not None:
            self._trace.plan(plan, before, planned)
        self._stats.plan(plan, planned)
        self._on_way.append(plan)
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
        """Waits for the oldest step on its way and takes in what it did."""
        plan = self._on_way.popleft()
        result, ran, encode_s = StepResult(plan.step_id, ()), time.monotonic(), 0.0
        if not plan.is_empty:
            found = self._group.receive()
            result = step_result(plan, found, self._scheduler.requests)
            ran, encode_s = self._group.done_at, found.encode_seconds
        self._stats.done(ran, encode_s)
        failpoint("engine.stepped")
        received = time.monotonic()
        updates = self._matchers.read(self._scheduler.update(result), self._scheduler)
        self._taken_in = (ran, time.monotonic() - received)
        return updates

    def settle(self) -> None:
        """All that `step` gave has been told: requests that it ended belong to its trace."""
        if self._trace is not None and self._taken_in is not None:
            self._trace.done(*self._taken_in)
        self._taken_in = None
