"""A request between its reader and the step thread."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..scheduler.request import RequestStatus
from .backlog import Backlog
from .engine import EngineDead
from .input.processor import ProcessedInput
from .input_pool import InputJob
from .loop import Event
from .output import OutputDelta, Usage


async def finished(work: Future[Any]) -> None:
    """Wait until `work` is done; cancel it when the waiting task is cancelled."""
    future = asyncio.wrap_future(work)
    try:
        await asyncio.wait([future])
    finally:
        future.cancel()


@dataclass(eq=False)
class RequestStream:
    """A request as its reader has it."""

    num_answers: int
    events: Backlog[Event | EngineDead] = field(default_factory=Backlog)
    work: InputJob | None = None  # its input
    ready: asyncio.Future[ProcessedInput] | None = None  # that input, as it is waited for
    is_aborted: bool = False  # before that was done
    is_admitted: bool = False  # the step thread knows it

    def end(self, status: RequestStatus, error: str = "") -> None:
        """The last deltas of a request that ended before the step thread had it."""
        for index in range(self.num_answers):
            usage = Usage(0, 0) if index == self.num_answers - 1 else None
            delta = OutputDelta("", index, finish_reason=status.value, usage=usage, error=error)
            self.events.put(delta)
