"""The engine's deltas as HTTP responses: gathered into one object, or as server-sent events."""

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
from ...errors import InputError
from ...media.item import MediaInfo
from ...outputs import Output, OutputDelta, Usage
from ..chunked_json import Turns, dump, json_pieces
from ..errors import parse_error_info
from .errors import ApiError, api_error, error_of
from .openai_messages import as_written
from .openai_request import ParsedRequest
from .openai_response import AnswerForm, ChoiceState, PromptLogprobs
from .openai_structured import renamed

log = logging.getLogger("octavo.server")

DONE = b"data: [DONE]\n\n"
MAX_INLINE_LOGPROBS = 16  # log probabilities' tokens that are written in one go

# JSON escapes all other line separators by itself: they are control characters below U+0020.
_LINE_SEPARATORS = (("\u0085", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))

Answers = AsyncGenerator[tuple[int, OutputDelta], None]


@dataclass(eq=False)
class RunningUsage:
    """A request's token counts so far, over all of its prompts and choices."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    final: list[Usage] = field(default_factory=list)  # of the prompts that are done

    def add(self, delta: OutputDelta) -> None:
        self.output_tokens += len(delta.token_ids)
        if delta.usage is not None:
            self.final.append(delta.usage)

    def write(self) -> dict[str, Any]:
        """Return the counts so far; cached tokens are known at the end alone."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
        }


def failed(error: str, asked: ParsedRequest) -> ApiError:
    """Return the response for a delta's error."""
    fault = parse_error_info(error)
    told = renamed(InputError(fault.field, fault.text), asked.form_of)
    told = as_written(told, asked.body)
    return api_error(replace(fault, text=str(told), field=told.field))


async def gather(answers: Answers, asked: ParsedRequest, form: AnswerForm) -> dict[str, Any]:
    """Wait for all deltas and return the response, whose log probabilities are lazy lists."""
    n = asked.params.n
    outputs = [Output(i, logprobs=LogprobTable()) for i in range(n * len(asked.prompts))]
    texts: list[list[str]] = [[] for _ in outputs]
    usages: list[Usage] = []
    media: list[MediaInfo] = []
    prompts: list[PromptLogprobs] = [()] * len(asked.prompts)
    async with contextlib.aclosing(answers):
        async for prompt, delta in answers:
            if delta.error:
                raise failed(delta.error, asked)
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
    told = prompts if asked.params.prompt_logprobs is not None else ()
    return form.whole(outputs, usages, media, told)


async def chunks(
    first: tuple[int, OutputDelta],
    rest: Answers,
    asked: ParsedRequest,
    form: AnswerForm,
    usage: RunningUsage,
    turns: Turns,
) -> AsyncGenerator[bytes, None]:
    """Yield a stream's events, large ones in pieces; an error ends it."""
    states: defaultdict[int, ChoiceState] = defaultdict(form.new_choice)
    try:
        event: tuple[int, OutputDelta] | None = first
        while event is not None:
            prompt, delta = event
            if delta.error:
                raise failed(delta.error, asked)
            usage.add(delta)
            state = states[prompt * asked.params.n + delta.index]
            is_told = bool(delta.text or delta.logprobs or delta.tool_calls or delta.media)
            if is_told or delta.finish_reason or state.is_first:
                chunk = form.chunk(prompt * asked.params.n + delta.index, delta, state)
                if asked.continuous_usage:
                    chunk["usage"] = usage.write()
                elif asked.include_usage:
                    chunk["usage"] = None
                if delta.prompt_logprobs or len(delta.logprobs) > MAX_INLINE_LOGPROBS:
                    async for piece in turns.paced(_event_pieces(chunk)):
                        yield piece
                else:
                    yield _event(chunk)
            event = await anext(rest, None)
        if asked.include_usage:
            yield _event(form.usage_chunk(usage.final))
        yield DONE
    except Exception as error:
        told = error_of(error)
        if told.status == 500:
            log.error("request %r failed", form.request_id, exc_info=error)
        yield b"data: " + told.body.encode() + b"\n\n"


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + dump(chunk) + b"\n\n"


def _event_pieces(chunk: dict[str, Any]) -> Iterator[bytes]:
    yield b"data: "
    yield from json_pieces(chunk)
    yield b"\n\n"


OnReady = Callable[[int], None]


async def answers_of(
    engine: AsyncLLM, asked: ParsedRequest, name: str, traceparent: str, on_ready: OnReady
) -> Answers:
    """Yield (index of the prompt, delta) of all prompts, as they come; closing it aborts them all.

    `on_ready`: of each prompt, as of `AsyncLLM.generate`.
    """
    merged = _merged(engine, asked, name, traceparent, on_ready)
    async with contextlib.aclosing(merged):
        try:
            async for event in merged:
                yield event
        except InputError as error:
            raise renamed(error, asked.form_of) from None


async def _merged(
    engine: AsyncLLM, asked: ParsedRequest, name: str, traceparent: str, on_ready: OnReady
) -> Answers:
    def begin(prompt: int, request_id: str) -> AsyncGenerator[OutputDelta, None]:
        return engine.generate(
            asked.prompts[prompt],
            asked.params,
            request_id=request_id,
            traceparent=traceparent,
            on_ready=on_ready,
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
