"""The step thread: runs steps while the engine has requests, and delivers their deltas."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from ...scheduler.params import SamplingParams
from ...scheduler.request import Request
from ..errors import EngineDead
from ..input.processor import ProcessedInput
from ..observability.snapshot import Snapshot, take_snapshot
from ..outputs import OutputDelta
from .engine import Engine
from .request_builder import Deadline

IDLE_CHECK = 0.5  # seconds between worker health checks while idle

log = logging.getLogger("octavo.engine")


@dataclass(frozen=True)
class Admitted:
    """Result of `add`: the error that rejected the request, or the admitted request."""

    request_id: str
    error: Exception | None
    request: Request | None = None  # the first answer's request; read-only


@dataclass(frozen=True)
class _Add:
    request_id: str
    prompt: ProcessedInput
    params: SamplingParams | None
    clock: Deadline


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _TakeSnapshot:
    snapshot: Future[Snapshot] = field(default_factory=Future)


Event = Admitted | OutputDelta


class StepLoop:
    """Runs an engine's steps on a dedicated thread.

    `deliver` is called with each step's events on that thread; `on_death` with the cause when the
    engine has failed.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[Event]], None],
        on_death: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[_Add | _Abort | _TakeSnapshot | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step", daemon=True)
        self._thread.start()

    def add(
        self,
        request_id: str,
        prompt: ProcessedInput,
        params: SamplingParams | None,
        clock: Deadline,
    ) -> None:
        self._inbox.put(_Add(request_id, prompt, params, clock))

    def abort(self, request_id: str) -> None:
        self._inbox.put(_Abort(request_id))

    def look(self) -> Future[Snapshot]:
        """Request a snapshot between two steps. The future never completes after `close`."""
        item = _TakeSnapshot()
        self._inbox.put(item)
        return item.snapshot

    def close(self) -> None:
        """Stop the thread after the step in progress, without waiting for dead workers.

        Remaining requests are dropped.
        """
        self._engine.group.give_up()
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (events := self._take_inbox()) is not None:
                if self._is_busy:
                    events.extend(self._engine.step())
                if events:
                    self._deliver(events)
        except EngineDead:
            self._die(self._engine.failed)
        except Exception as error:
            log.exception("the step thread failed")
            self._engine.failed = f"internal error: {type(error).__name__}"
            self._die(self._engine.failed)

    @property
    def _is_busy(self) -> bool:
        return self._engine.has_requests or self._engine.has_steps

    def _die(self, cause: str) -> None:
        self._engine.group.close()
        self._on_death(cause)

    def _take_inbox(self) -> list[Event] | None:
        """Handle queued commands; wait for one if idle. None: end the thread."""
        events: list[Event] = []
        idle = not self._is_busy
        while idle or not self._inbox.empty():
            try:
                item = self._inbox.get(timeout=IDLE_CHECK)
            except queue.Empty:
                self._engine.check_workers()
                continue
            if item is None:
                return None
            events.extend(self._handle(item))
            idle = False
        return events

    def _handle(self, item: _Add | _Abort | _TakeSnapshot) -> list[Event]:
        if isinstance(item, _TakeSnapshot):
            self._take_snapshot(item.snapshot)
            return []
        if isinstance(item, _Abort):
            return list(self._engine.abort(item.request_id))
        try:
            options = vars(item.clock.left)
            self._engine.add_request(item.request_id, item.prompt, item.params, **options)
            request = self._engine.scheduler.requests.get(item.request_id)
        except EngineDead:
            raise
        except ValueError as error:
            return [Admitted(item.request_id, error)]
        except Exception as error:  # internal error: fail only this request
            log.exception("request %r was not admitted", item.request_id)
            return [Admitted(item.request_id, error)]
        return [Admitted(item.request_id, None, request)]

    def _take_snapshot(self, future: Future[Snapshot]) -> None:
        """Take a snapshot. A failure affects no request; it goes to the caller of `look`."""
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(take_snapshot(self._engine.scheduler, self._engine.stats))
        except Exception as error:
            future.set_exception(error)
