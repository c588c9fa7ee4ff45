"""Build HTTP responses from deltas: one JSON object, or server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ....scheduler.logprobs import LogprobTable
from ...async_llm import AsyncLLM
from ...errors import InputError, RequestError
from ...media.item import MediaInfo
from ...outputs import Output, OutputDelta, Usage
from ..chunked_json import Turns, dump, json_pieces
from .errors import ApiError, api_error, error_of
from .openai_request import ParsedRequest, as_written
from .openai_response import AnswerForm, ChoiceState, PromptLogprobs
from .openai_structured import renamed

log = logging.getLogger("octavo.server")

DONE = b"data: [DONE]\n\n"
MAX_INLINE_LOGPROBS = 16  # tokens with logprobs to encode without chunking

Answers = AsyncGenerator[tuple[int, OutputDelta], None]


@dataclass(eq=False)
class RunningUsage:
    """A request's token counts so far, over all prompts and choices."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    final: list[Usage] = field(default_factory=list)  # of finished prompts

    def add(self, delta: OutputDelta) -> None:
        self.output_tokens += len(delta.token_ids)
        if delta.usage is not None:
            self.final.append(delta.usage)

    def write(self) -> dict[str, Any]:
        """Return the counts so far, without cached tokens, which are known only at the end."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
        }


def failed(failure: RequestError, request: ParsedRequest) -> ApiError:
    """Return the response for a delta's error."""
    mapped = renamed(InputError(failure.field, failure.message), request.form_of)
    mapped = as_written(mapped, request.body)
    return api_error(replace(failure, message=str(mapped), field=mapped.field))


async def gather(answers: Answers, request: ParsedRequest, form: AnswerForm) -> dict[str, Any]:
    """Wait for all deltas and return the response, with log probabilities as lazy lists."""
    n = request.params.n
    outputs = [Output(i, logprobs=LogprobTable()) for i in range(n * len(request.prompts))]
    texts: list[list[str]] = [[] for _ in outputs]
    usages: list[Usage] = []
    media: list[MediaInfo] = []
    prompts: list[PromptLogprobs] = [()] * len(request.prompts)
    async with contextlib.aclosing(answers):
        async for prompt, delta in answers:
            if delta.failure:
                raise failed(delta.failure, request)
            output = outputs[prompt * n + delta.index]
            texts[prompt * n + delta.index].append(delta.text)
            output.logprobs.extend(delta.logprobs)
            output.tool_calls.extend(delta.tool_calls)
            output.finish_reason = delta.finish_reason or output.finish_reason
            media.extend(delta.media)
            prompts[prompt] = delta.prompt_logprobs or prompts[prompt]
            usages.extend([delta.usage] if delta.usage else [])
    for output, text in zip(outputs, texts, strict=True):
        output.text = "".join(text)
    prompt_logprobs = prompts if request.params.prompt_logprobs is not None else ()
    return form.whole(outputs, usages, media, prompt_logprobs)


async def chunks(
    first: tuple[int, OutputDelta],
    rest: Answers,
    request: ParsedRequest,
    form: AnswerForm,
    usage: RunningUsage,
    turns: Turns,
) -> AsyncGenerator[bytes, None]:
    """Yield a stream's events, large ones in several parts. An error event ends the stream."""
    states: defaultdict[int, ChoiceState] = defaultdict(form.new_choice)
    try:
        event: tuple[int, OutputDelta] | None = first
        while event is not None:
            prompt, delta = event
            if delta.failure:
                raise failed(delta.failure, request)
            usage.add(delta)
            state = states[prompt * request.params.n + delta.index]
            has_content = bool(delta.text or delta.logprobs or delta.tool_calls or delta.media)
            if has_content or delta.finish_reason or state.is_first:
                chunk = form.chunk(prompt * request.params.n + delta.index, delta, state)
                if request.continuous_usage:
                    chunk["usage"] = usage.write()
                elif request.include_usage:
                    chunk["usage"] = None
                if delta.prompt_logprobs or len(delta.logprobs) > MAX_INLINE_LOGPROBS:
                    async for piece in turns.paced(_event_pieces(chunk)):
                        yield piece
                else:
                    yield _event(chunk)
            event = await anext(rest, None)
        if request.include_usage:
            yield _event(form.usage_chunk(usage.final))
        yield DONE
    except Exception as error:
        response = error_of(error)
        if response.status == 500:
            log.error("request %r failed", form.request_id, exc_info=error)
        yield b"data: " + response.body.encode() + b"\n\n"


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + dump(chunk) + b"\n\n"


def _event_pieces(chunk: dict[str, Any]) -> Iterator[bytes]:
    yield b"data: "
    yield from json_pieces(chunk)
    yield b"\n\n"


OnReady = Callable[[int], None]


async def answers_of(
    engine: AsyncLLM, request: ParsedRequest, name: str, traceparent: str, on_ready: OnReady
) -> Answers:
    """Yield (prompt index, delta) of all prompts as they arrive. Closing it aborts all.

    `on_ready`: called for each prompt, as in `AsyncLLM.generate`.
    """
    merged = _merged(engine, request, name, traceparent, on_ready)
    async with contextlib.aclosing(merged):
        try:
            async for event in merged:
                yield event
        except InputError as error:
            raise renamed(error, request.form_of) from None


async def _merged(
    engine: AsyncLLM, request: ParsedRequest, name: str, traceparent: str, on_ready: OnReady
) -> Answers:
    def start(prompt: int, request_id: str) -> AsyncGenerator[OutputDelta, None]:
        return engine.generate(
            request.prompts[prompt],
            request.params,
            request_id=request_id,
            traceparent=traceparent,
            on_ready=on_ready,
            **request.options,
        )

    if len(request.prompts) == 1:
        stream = start(0, name)
        async with contextlib.aclosing(stream):
            async for delta in stream:
                yield 0, delta
        return
    # Deltas for a slow client accumulate in the streams, as with a single prompt.
    queue: asyncio.Queue[tuple[int, OutputDelta | Exception | None]] = asyncio.Queue(1)

    async def feed(index: int) -> None:
        end: Exception | None = None
        try:
            stream = start(index, f"{name}-{index}")
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    await queue.put((index, delta))
        except Exception as error:
            end = error
        await queue.put((index, end))

    tasks = [asyncio.create_task(feed(index)) for index in range(len(request.prompts))]
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
