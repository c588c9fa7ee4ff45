"""The paths of the HTTP door."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..async_llm import AsyncLLM
from ..input_error import InputError
from ..media.item import MediaInfo
from ..output import Output, OutputDelta, Usage
from .errors import Refused, fault_in
from .http_error import api_error, error_of
from .metadata import log_trace, read_metadata
from .metrics import CONTENT_TYPE, metrics_text
from .openai_messages import read_messages
from .openai_request import Asked, check_model, read_chat, read_completions, read_json
from .openai_response import AnswerForm, PromptLogprobs
from .openai_structured import renamed
from .work import Work

log = logging.getLogger("octavo.server")

DONE = b"data: [DONE]\n\n"

Answers = AsyncGenerator[tuple[int, OutputDelta], None]


@dataclass(frozen=True)
class Routes:
    """The endpoints of one engine."""

    engine: AsyncLLM
    model: str  # its name here
    work: Work
    created: int  # seconds since 1970

    @classmethod
    def of(cls, engine: AsyncLLM, work: Work) -> Routes:
        return cls(engine, engine.engine.model_name, work, int(time.time()))

    @property
    def all(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/metrics", self.metrics),
            Route("/health", self.health),
            Route("/ready", self.ready),
        ]

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat, is_chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, read_completions, is_chat=False)

    async def _answer(
        self, request: Request, read: Callable[[Mapping[str, Any], str], Asked], is_chat: bool
    ) -> Response:
        beside = read_metadata(request.headers.items())
        name = beside.request_id or uuid.uuid4().hex
        asked = read(read_json(await request.body()), self.model)
        if beside.priority is not None:
            asked.options.setdefault("priority", beside.priority)
        tokenizer = self.engine.engine.processor.tokenizer.backend
        decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
        form = AnswerForm(name, self.model, is_chat, decode)
        log_trace(name, beside)
        answers = _answers(self.engine, asked, name, beside.traceparent)
        headers = {"x-request-id": name}
        if not asked.stream:
            make = await _gather(answers, asked, form)
            if asked.params.prompt_logprobs is None:
                return _json(make(), headers)
            # A long prompt's are megabytes, which all other requests would wait for.
            return await asyncio.to_thread(lambda: _json(make(), headers))
        try:  # what is refused, is so with a status: nothing is sent before the first delta
            first = await anext(answers)
            if first[1].error:
                raise api_error(fault_in(first[1].error))
        except BaseException:
            await answers.aclose()
            raise
        return EventStream(answers, _chunks(first, answers, asked, form), headers)

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model]})

    async def one_model(self, request: Request) -> Response:
        check_model({"model": request.path_params["name"]}, self.model)
        return _json(self._model)

    @property
    def _model(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "octavo",
            "max_model_len": self.engine.config.max_model_len,
        }

    async def tokenize(self, request: Request) -> Response:
        """Of {"prompt": ...} or {"messages": ...}: one placeholder token for each item, which is
        neither fetched nor looked at."""
        body = read_json(await request.body())
        check_model(body, self.model)
        _only(body, "model", "prompt", "messages")
        prompt, messages = body.get("prompt"), body.get("messages")
        if (prompt is None) == (messages is None) or not isinstance(prompt, str | None):
            raise InputError("prompt", "give a text there, or a conversation as messages")
        tokens = await self.engine.tokenize(
            prompt if prompt is not None else read_messages(messages)
        )
        limit = self.engine.config.max_model_len
        return _json({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def detokenize(self, request: Request) -> Response:
        body = read_json(await request.body())
        check_model(body, self.model)
        _only(body, "model", "tokens")
        tokens = body.get("tokens")
        if not isinstance(tokens, list):
            raise InputError("tokens", "must be a list of token ids")
        return _json({"prompt": await self.engine.detokenize(tokens)})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus, in its text form."""
        text = metrics_text(self.engine.engine.stats)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def health(self, request: Request) -> Response:
        """The process lives."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Requests are taken."""
        if self.work.is_draining:
            raise Refused("UNAVAILABLE", "the server is being drained")
        if self.engine.failed:
            raise Refused("UNAVAILABLE", "the engine has stopped")
        return _json({"status": "ready"})


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


def _json(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_dump(value), 200, headers, "application/json")


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _only(body: Mapping[str, Any], *known: str) -> None:
    for name in body:
        if name not in known:
            raise InputError(name, f"unknown; this takes {', '.join(known)}")


async def _gather(answers: Answers, asked: Asked, form: AnswerForm) -> Callable[[], dict[str, Any]]:
    """Waits for all deltas; what makes one object of them."""
    n = asked.params.n
    outputs = [Output(i) for i in range(n * len(asked.prompts))]
    usages: list[Usage] = []
    media: list[MediaInfo] = []
    prompts: list[PromptLogprobs] = [()] * len(asked.prompts)
    async with contextlib.aclosing(answers):
        async for prompt, delta in answers:
            if delta.error:
                raise api_error(fault_in(delta.error))
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


async def _chunks(
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
                raise api_error(fault_in(delta.error))
            choice = prompt * asked.params.n + delta.index
            usages.extend([delta.usage] if delta.usage else [])
            is_told = bool(delta.text or delta.logprobs or delta.tool_calls)
            if is_told or delta.finish_reason or delta.media or choice not in begun:
                is_first, had = choice not in begun, begun.get(choice, 0)
                begun[choice] = had + len(delta.tool_calls)
                yield _event(form.chunk(choice, delta, is_first, asked.include_usage, had))
            event = await anext(rest, None)
        if asked.include_usage:
            yield _event(form.usage_chunk(usages))
        yield DONE
    except Exception as error:
        told = error_of(error)
        if told.status == 500:
            log.error("request %r failed", form.request_id, exc_info=error)
        yield b"data: " + told.body.encode() + b"\n\n"


def _event(value: Any) -> bytes:
    return b"data: " + _dump(value) + b"\n\n"


async def _answers(engine: AsyncLLM, asked: Asked, name: str, traceparent: str) -> Answers:
    """(which prompt, delta) of all prompts, as they come. Closing it aborts them all."""
    async with contextlib.aclosing(_merged(engine, asked, name, traceparent)) as merged:
        try:
            async for event in merged:
                yield event
        except InputError as error:
            raise renamed(error, asked.form_field) from None


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
    queue: asyncio.Queue[tuple[int, OutputDelta | Exception | None]] = asyncio.Queue()

    async def feed(index: int) -> None:
        end: Exception | None = None
        try:
            stream = begin(index, f"{name}-{index}")
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    queue.put_nowait((index, delta))
        except Exception as error:
            end = error
        queue.put_nowait((index, end))

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
