"""The engine's deltas as the HTTP door gives them: gathered, or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..async_llm import AsyncLLM
from ..input_error import InputError
from ..media.item import MediaInfo
from ..output import Output, OutputDelta, Usage
from .errors import fault_in
from .http_error import ApiError, api_error, error_of
from .openai_messages import as_written
from .openai_request import Asked
from .openai_response import AnswerForm, PromptLogprobs
from .openai_structured import renamed

log = logging.getLogger("octavo.server")

DONE = b"data: [DONE]\n\n"
FEW = 16  # tokens whose log probabilities are written on the event loop

# JSON escapes all other line separators by itself: they are control characters below U+0020.
_LINE_SEPARATORS = (("\u0085", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))

Answers = AsyncGenerator[tuple[int, OutputDelta], None]


class EventStream(Response):
    """Server-sent events. Closes them and the answers behind them however it ends."""

    media_type = "text/event-stream"

    def __init__(
        self, answers: Answers, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache"})
        del self.headers["content-length"]
        self._answers, self._events = answers, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with contextlib.aclosing(self._answers), contextlib.aclosing(self._events):
            await send(start)
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def dump(value: Any) -> bytes:
    """Return `value` as JSON in UTF-8 on one line, also for clients that split lines at Unicode's
    line separators (Python's `splitlines`, for one)."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character, escaped in _LINE_SEPARATORS:
        text = text.replace(character, escaped)  # it can only be inside a string
    return text.encode()


def failed(error: str, asked: Asked) -> ApiError:
    """Of a delta's error."""
    fault = fault_in(error)
    told = renamed(InputError(fault.field, fault.text), asked.form_of)
    told = as_written(told, asked.body)
    return api_error(replace(fault, text=str(told), field=told.field))


async def gather(answers: Answers, asked: Asked, form: AnswerForm) -> Callable[[], dict[str, Any]]:
    """Waits for all deltas; what makes one object of them."""
    n = asked.params.n
    outputs = [Output(i) for i in range(n * len(asked.prompts))]
    usages: list[Usage] = []
    media: list[MediaInfo] = []
    prompts: list[PromptLogprobs] = [()] * len(asked.prompts)
    async with contextlib.aclosing(answers):
        async for prompt, delta in answers:
            if delta.error:
                raise failed(delta.error, asked)
            output = outputs[prompt * n + delta.index]
            output.text += delta.text
            output.logprobs.extend(delta.logprobs)
            output.tool_calls.extend(delta.tool_calls)
            output.finish_reason = delta.finish_reason or output.finish_reason
            media.extend(delta.media)
            prompts[prompt] = delta.prompt_logprobs or prompts[prompt]
            usages.extend([delta.usage] if delta.usage else [])
    told = prompts if asked.params.prompt_logprobs is not None else ()
    return functools.partial(form.whole, outputs, usages, media, told)


async def chunks(
    first: tuple[int, OutputDelta], rest: Answers, asked: Asked, form: AnswerForm
) -> AsyncGenerator[bytes, None]:
    """A stream's events; an error ends it."""
    begun: dict[int, int] = {}  # calls that a choice had
    usages: list[Usage] = []
    try:
        event: tuple[int, OutputDelta] | None = first
        while event is not None:
            prompt, delta = event
            if delta.error:
                raise failed(delta.error, asked)
            choice = prompt * asked.params.n + delta.index
            usages.extend([delta.usage] if delta.usage else [])
            is_told = bool(delta.text or delta.logprobs or delta.tool_calls or delta.media)
            if is_told or delta.finish_reason or choice not in begun:
                is_first, had = choice not in begun, begun.get(choice, 0)
                begun[choice] = had + len(delta.tool_calls)
                make = functools.partial(
                    form.chunk, choice, delta, is_first, asked.include_usage, had
                )
                # Perhaps megabytes, which all others would wait for: a slow reader's gather.
                if delta.prompt_logprobs or len(delta.logprobs) > FEW:
                    yield await asyncio.to_thread(_event, make)
                else:
                    yield _event(make)
            event = await anext(rest, None)
        if asked.include_usage:
            yield _event(lambda: form.usage_chunk(usages))
        yield DONE
    except Exception as error:
        told = error_of(error)
        if told.status == 500:
            log.error("request %r failed", form.request_id, exc_info=error)
        yield b"data: " + told.body.encode() + b"\n\n"


def _event(make: Callable[[], dict[str, Any]]) -> bytes:
    return b"data: " + dump(make()) + b"\n\n"


async def answers_of(engine: AsyncLLM, asked: Asked, name: str, traceparent: str) -> Answers:
    """(which prompt, delta) of all prompts, as they come. Closing it aborts them all."""
    async with contextlib.aclosing(_merged(engine, asked, name, traceparent)) as merged:
        try:
            async for event in merged:
                yield event
        except InputError as error:
            raise renamed(error, asked.form_of) from None


async def _merged(engine: AsyncLLM, asked: Asked, name: str, traceparent: str) -> Answers:
    def begin(prompt: int, request_id: str) -> AsyncGenerator[OutputDelta, None]:
        return engine.generate(
            asked.prompts[prompt],
            asked.params,
            request_id=request_id,
            traceparent=traceparent,
            **asked.options,
        )

    if len(asked.prompts) == 1:
        stream = begin(0, name)
        async with contextlib.aclosing(stream):
            async for delta in stream:
                yield 0, delta
        return
    # A slow reader's deltas gather in the streams, as those of one prompt do.
    queue: asyncio.Queue[tuple[int, OutputDelta | Exception | None]] = asyncio.Queue(1)

    async def feed(index: int) -> None:
        end: Exception | None = None
        try:
            stream = begin(index, f"{name}-{index}")
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    await queue.put((index, delta))
        except Exception as error:
            end = error
        await queue.put((index, end))

    tasks = [asyncio.create_task(feed(index)) for index in range(len(asked.prompts))]
    try:
        num_left = len(tasks)
        while num_left:
            index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                num_left -= 1
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
