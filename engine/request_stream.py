"""Output queue between the step thread and the reader of a request's stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

from ..scheduler.logprobs import LogprobTable, TokenLogprobs
from ..scheduler.request import RequestStatus
from .core.step_loop import Event
from .errors import EngineDead, RequestError
from .input.preprocess_pool import InputJob
from .input.processor import ProcessedInput
from .outputs import OutputDelta, Usage

MAX_WAITING = 64  # events; above this, queued deltas are merged

LOGPROBS = ("logprobs", "prompt_logprobs")

T = TypeVar("T")  # events other than deltas


class OutputQueue(Generic[T]):
    """Output events of one request, for one event loop.

    Merging deltas bounds the number of queued events, however slow the reader is.
    """

    def __init__(self) -> None:
        self._waiting: list[T | OutputDelta] = []
        self._limit = MAX_WAITING
        self._come = asyncio.Event()

    def put(self, event: T | OutputDelta) -> None:
        self._waiting.append(event)
        self._come.set()
        if len(self._waiting) > self._limit:
            self._waiting = merge(self._waiting)
            # n answers cannot merge into fewer than n deltas.
            self._limit = 2 * len(self._waiting) + MAX_WAITING

    async def take(self) -> list[T | OutputDelta]:
        """Wait for events and return all of them, merged.

        The result has at most one delta per answer, in addition to the request's first delta.
        """
        await self._come.wait()
        self._come.clear()
        waiting, self._waiting = self._waiting, []
        return merge(waiting)


def merge(events: Sequence[T | OutputDelta]) -> list[T | OutputDelta]:
    """Merge the deltas of each answer into one, ordered by each answer's latest delta.

    The request's first delta, which carries the media information, and other events stay separate.
    """
    if len(events) < 2:
        return [*events]
    merged: list[T | OutputDelta] = []
    answers: dict[int, list[OutputDelta]] = {}
    ends: list[T | OutputDelta] = []
    for event in events:
        if isinstance(event, OutputDelta) and event.media_times is None:
            deltas = answers[event.index] = answers.pop(event.index, [])  # moves to the end
            deltas.append(event)
        elif answers:
            ends.append(event)
        else:
            merged.append(event)
    return [*merged, *map(join, answers.values()), *ends]


def join(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Merge the deltas of one answer.

    Text and tuples are concatenated; for other fields the last non-empty value is kept.
    """
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
    """Concatenate log probabilities as arrays, since a slow reader may have many."""
    if len(values) < 2:
        return values[0] if values else ()
    table = LogprobTable()
    for value in values:
        table.extend(value)
    return table


async def finished(work: Future[Any]) -> None:
    """Wait until `work` is done. Cancel it if the waiting task is cancelled."""
    future = asyncio.wrap_future(work)
    try:
        await asyncio.wait([future])
    finally:
        future.cancel()


@dataclass(eq=False)
class RequestStream:
    """State of one request on the reader's side."""

    num_answers: int
    events: OutputQueue[Event | EngineDead] = field(default_factory=OutputQueue)
    work: InputJob | None = None  # preprocessing of its input
    ready: asyncio.Future[ProcessedInput] | None = None  # result of `work` in the event loop
    is_aborted: bool = False  # aborted during preprocessing
    is_admitted: bool = False  # passed to the step thread

    def end(self, status: RequestStatus, error: RequestError | None = None) -> None:
        """Queue the final deltas of a request that ended before it reached the step thread."""
        for index in range(self.num_answers):
            usage = Usage(0, 0) if index == self.num_answers - 1 else None
            delta = OutputDelta("", index, finish_reason=status.value, usage=usage, failure=error)
            self.events.put(delta)
