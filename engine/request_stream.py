"""A request between its reader and the step thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from ..scheduler.request import RequestStatus
from .backlog import Backlog
from .engine import EngineDead
from .input.processor import ProcessedInput
from .input_pool import InputJob
from .loop import Event
from .output import OutputDelta, Usage

PATIENCE = 1.0  # seconds beyond its time for the step thread to end a request: it may be in a step


@dataclass(eq=False)
class RequestStream:
    """A request as its reader has it."""

    num_answers: int
    events: Backlog[Event | EngineDead] = field(default_factory=Backlog)
    work: InputJob | None = None  # its input
    ready: asyncio.Future[ProcessedInput] | None = None  # that input, as it is waited for
    is_aborted: bool = False  # before that was done
    is_admitted: bool = False  # the step thread knows it

    def __post_init__(self) -> None:
        self.unfinished = set(range(self.num_answers))  # answers whose end its reader has not got
        self._timer: asyncio.TimerHandle | None = None

    def end_after(self, seconds: float | None, usage: Callable[[], Usage]) -> None:
        """Ends it when its time is over and the step thread does not come to it, as it waits for
        workers. `usage`: what its reader has got by then."""
        if seconds is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(seconds + PATIENCE, self._run_out, usage)

    def _run_out(self, usage: Callable[[], Usage]) -> None:
        if self.events.has_some:  # perhaps its end, which its reader has yet to take
            self.end_after(0.0, usage)
        elif self.unfinished:
            text = f"the time ran out after {usage().output_tokens} tokens of output"
            self.end(RequestStatus.FINISHED_ERROR, f"DEADLINE_EXCEEDED: {text}", usage())

    def close(self) -> None:
        """Its reader is gone, or has all."""
        if self._timer is not None:
            self._timer.cancel()
        if self.work is not None:
            self.work.cancel()
        if self.ready is not None:
            self.ready.cancel()  # or asyncio tells of errors that nobody waits for

    def end(self, status: RequestStatus, error: str = "", usage: Usage | None = None) -> None:
        """The last deltas of a request that ends without the step thread."""
        last = max(self.unfinished)
        for index in sorted(self.unfinished):
            told = (usage or Usage(0, 0)) if index == last else None
            delta = OutputDelta("", index, finish_reason=status.value, usage=told, error=error)
            self.events.put(delta)
