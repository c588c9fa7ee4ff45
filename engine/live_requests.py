"""The requests that are here, and what becomes of them as steps' updates come in."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from ..scheduler.request import RequestStatus, UnitKey
from ..scheduler.scheduler import Scheduler
from ..scheduler.step import RequestUpdate
from ..scheduler.trace import TraceWriter
from .live import LiveRequest
from .matchers import Matchers
from .media.item import UnitContent
from .output import OutputDelta
from .stats import EngineStats

log = logging.getLogger("octavo.engine")


class LiveRequests:
    """By their ids, and their answers by the scheduler's names."""

    def __init__(
        self,
        scheduler: Scheduler,
        stats: EngineStats,
        matchers: Matchers,
        trace: TraceWriter | None,
    ) -> None:
        self._scheduler, self._stats = scheduler, stats
        self._matchers, self._trace = matchers, trace
        self._live: dict[str, LiveRequest] = {}
        self._answers: dict[str, tuple[LiveRequest, int]] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, name: str) -> bool:
        """Whether a request or an answer has the name."""
        return name in self._answers or name in self._live

    @property
    def await_media(self) -> bool:
        """Whether units of a request are still being made."""
        return any(live.stream for live in self._live.values())

    def pixels_of(self, name: str) -> Mapping[UnitKey, UnitContent]:
        """Those of an answer's request that were not encoded yet."""
        return self._answers[name][0].pixels

    def add(self, live: LiveRequest, names: Sequence[str]) -> None:
        """`names`: of its answers, which the scheduler has by now."""
        self._live[live.request_id] = live
        self._answers |= {name: (live, index) for index, name in enumerate(names)}

    def abort(self, request_id: str) -> list[OutputDelta]:
        """The last delta of each answer that was not done; none where the request is not here."""
        live = self._live.get(request_id)
        if live is None:
            return []
        status = RequestStatus.FINISHED_ABORTED
        return self.deltas(
            self._scheduler.finish(name, status) or RequestUpdate(name, (), status)
            for name in live.unfinished_names
        )

    def give_up(self, error: str) -> list[OutputDelta]:
        """Ends all of them."""
        return self.deltas(
            RequestUpdate(name, (), RequestStatus.FINISHED_ERROR, error)
            for name in tuple(self._answers)
        )

    def take_media(self) -> list[RequestUpdate]:
        """Hands on the units that were made since; the ends of requests whose media are broken."""
        failed = []
        for live in self._live.values():
            if live.stream is not None and (error := live.take_units()):
                failed += [
                    RequestUpdate(name, (), RequestStatus.FINISHED_ERROR, error)
                    for name in live.unfinished_names
                ]
        return failed

    def deltas(self, updates: Iterable[RequestUpdate]) -> list[OutputDelta]:
        """What updates come to as text. Those of a request that has ended before are dropped. An
        error of one answer ends the others, after what this step gave them."""
        deltas: list[OutputDelta] = []
        failed: list[tuple[LiveRequest, str]] = []
        for update in updates:
            if update.request_id in self._answers:
                live, index = self._answers[update.request_id]
                deltas.append(self._delta(live, index, update))
                if deltas[-1].error:
                    failed.append((live, deltas[-1].error))
        for live, error in failed:
            for name in live.unfinished_names:
                update = RequestUpdate(name, (), RequestStatus.FINISHED_ERROR, error)
                deltas.append(self._delta(*self._answers[name], update))
        return self._stats.take(deltas)

    def _delta(self, live: LiveRequest, index: int, update: RequestUpdate) -> OutputDelta:
        """One update's text. Its answer may end with it."""
        try:
            delta = live.delta(index, update)
        except Exception:  # a fault of ours: this request's alone all the same
            log.exception("request %r: its tokens made no text", live.request_id)
            delta = live.failure(index, "INTERNAL: the answer's tokens made no text")
        if delta.finish_reason is not None:
            self._end(update.request_id, update, delta.finish_reason)
            if not live.unfinished:
                live.close()
                del self._live[live.request_id]
        return delta

    def _end(self, name: str, update: RequestUpdate, reason: str) -> None:
        """An answer is over, perhaps before the scheduler thinks so. Its name may be used again."""
        del self._answers[name]
        self._matchers.remove(name)
        if not update.status.is_finished or update.error:
            self._scheduler.finish(name, RequestStatus.FINISHED_STOPPED, update.error)
        if self._trace is not None:
            self._trace.end(name, reason)
