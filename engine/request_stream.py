"""A request between its reader and the step thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

from ..scheduler.logprobs import LogprobTable, TokenLogprobs
from ..scheduler.request import RequestStatus
from .core.step_loop import Event
from .errors import EngineDead
from .input.preprocess_pool import InputJob
from .input.processor import ProcessedInput
from .outputs import OutputDelta, Usage

MAX_WAITING = 64  # events; more are put together, whoever reads them

LOGPROBS = ("logprobs", "prompt_logprobs")

T = TypeVar("T")  # what comes beside deltas


class OutputQueue(Generic[T]):
    """Of one event loop. What it holds is bounded by the request's own output: never more than a
    few dozen events, however slow the reader is."""

    def __init__(self) -> None:
        self._waiting: list[T | OutputDelta] = []
        self._limit = MAX_WAITING
        self._come = asyncio.Event()

    def put(self, event: T | OutputDelta) -> None:
        self._waiting.append(event)
        self._come.set()
        if len(self._waiting) > self._limit:
            self._waiting = merge(self._waiting)
            self._limit = 2 * len(self._waiting) + MAX_WAITING  # n answers stay n deltas

    async def take(self) -> list[T | OutputDelta]:
        """Waits for events and takes all that are here: at most one delta an answer, beside the
        first of all."""
        await self._come.wait()
        self._come.clear()
        waiting, self._waiting = self._waiting, []
        return merge(waiting)


def merge(events: Sequence[T | OutputDelta]) -> list[T | OutputDelta]:
    """Each answer's deltas in one, in the order of their ends. A request's first delta, which says
    what was made of its media, stays by itself, and so does all that is no delta."""
    if len(events) < 2:
        return [*events]
    merged: list[T | OutputDelta] = []
    answers: dict[int, list[OutputDelta]] = {}
    ends: list[T | OutputDelta] = []
    for event in events:
        if isinstance(event, OutputDelta) and event.media_times is None:
            deltas = answers[event.index] = answers.pop(event.index, [])  # it goes last
            deltas.append(event)
        elif answers:
            ends.append(event)
        else:
            merged.append(event)
    return [*merged, *map(join, answers.values()), *ends]


def join(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """One answer's deltas in one: text and whatever is a tuple one after the other; of the rest
    the last that is set."""
    first, *others = deltas
    if not others:
        return first
    joined: dict[str, Any] = {}
    for each in fields(first):
        values = [getattr(delta, each.name) for delta in deltas]
        if each.name == "text":
            joined["text"] = "".join(values)
        elif each.name in LOGPROBS:
            joined[each.name] = _join_logprobs([value for value in values if value])
        elif isinstance(values[0], tuple):
            joined[each.name] = tuple(each for value in values for each in value)
        else:
            joined[each.name] = next((v for v in reversed(values) if v), values[0])
    return replace(first, **joined)


def _join_logprobs(values: Sequence[Sequence[TokenLogprobs | None]]) -> Any:
    """Concatenate log probabilities in arrays: a slow reader may have many of them."""
    if len(values) < 2:
        return values[0] if values else ()
    table = LogprobTable()
    for value in values:
        table.extend(value)
    return table


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
    events: OutputQueue[Event | EngineDead] = field(default_factory=OutputQueue)
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
