"""A request between its reader and the step thread."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ..scheduler.request import RequestStatus
from .backlog import Backlog
from .engine import EngineDead
from .input.processor import ProcessedInput
from .input_pool import InputJob
from .loop import Event
from .output import OutputDelta, Usage
from .request_maker import Countdown

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
        self.unfinished = set(range(self.num_answers))

    async def take(self, clock: Countdown, usage: Usage) -> list[Event | EngineDead | OutputDelta]:
        """The next events. One whose time is over is ended here where the step thread does not come
        to it, as it waits for workers. `usage`: so far."""
        left = clock.left.timeout_s
        if left is None:
            return await self.events.take()
        try:
            async with asyncio.timeout(left + PATIENCE):
                return await self.events.take()
        except TimeoutError:
            text = f"the time ran out after {usage.output_tokens} tokens of output"
            self.end(RequestStatus.FINISHED_ERROR, f"DEADLINE_EXCEEDED: {text}", usage)
            return await self.events.take()

    def end(self, status: RequestStatus, error: str = "", usage: Usage | None = None) -> None:
        """The last deltas of a request that ends without the step thread."""
        last = max(self.unfinished)
        for index in sorted(self.unfinished):
            told = (usage or Usage(0, 0)) if index == last else None
            delta = OutputDelta("", index, finish_reason=status.value, usage=told, error=error)
            self.events.put(delta)
