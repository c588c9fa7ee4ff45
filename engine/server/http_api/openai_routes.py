"""Routes of the OpenAI-compatible HTTP server."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...async_llm import AsyncLLM
from ...errors import InputError
from ...input.conversation import read_conversation
from ...observability.prometheus import CONTENT_TYPE, metrics_text
from ...utils.readers import AT_ONCE
from ...utils.readers import read as in_thread
from ..chunked_json import Turns, dump
from ..drain import CallTracker
from ..errors import RequestRejected
from ..metadata import CallMetadata, log_trace, read_metadata, request_name
from ..rejections import counted
from ..token_texts import TokenTexts
from .chunked_response import event_stream, json_response
from .errors import fault_code
from .openai_request import (
    ParsedRequest,
    check_model,
    named_as_written,
    read_chat,
    read_completions,
    read_json,
    read_request,
)
from .openai_response import AnswerForm
from .openai_stream import RunningUsage, answers_of, chunks, failed, gather

log = logging.getLogger("octavo.server")


@dataclass(frozen=True)
class Routes:
    """The endpoints of one engine."""

    engine: AsyncLLM
    names: tuple[str, ...]  # served model names; responses have the first
    work: CallTracker
    created: int  # seconds since 1970
    texts: TokenTexts
    turns: Turns = field(default_factory=Turns)

    @classmethod
    def of(cls, engine: AsyncLLM, work: CallTracker) -> Routes:
        texts = TokenTexts(engine.engine.processor.tokenizer.backend)
        return cls(engine, engine.engine.served_model_names, work, int(time.time()), texts)

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
        self,
        request: Request,
        read: Callable[[Mapping[str, Any], Sequence[str]], ParsedRequest],
        is_chat: bool,
    ) -> Response:
        body = await request.body()
        header, stats = request.headers.get("x-request-id", ""), self.engine.engine.stats
        with counted(header, stats, fault_code):
            metadata = read_metadata(request.headers.items())
            reading = functools.partial(read_request, body, self.names, read)
            parsed = await in_thread(reading, len(body) > AT_ONCE)
        name = request_name(metadata.request_id, self.engine.is_running, len(parsed.prompts))
        if metadata.priority is not None:
            parsed.options.setdefault("priority", metadata.priority)
        log_trace(name, metadata)
        return await self._respond(parsed, name, metadata, is_chat)

    async def _respond(
        self, parsed: ParsedRequest, name: str, metadata: CallMetadata, is_chat: bool
    ) -> Response:
        shows_special = not parsed.params.skip_special_tokens
        form = AnswerForm(name, self.names[0], is_chat, self.texts, not shows_special)
        headers, usage = {"x-request-id": metadata.request_id or name}, RunningUsage()
        async with contextlib.AsyncExitStack() as stack:
            budget, max_model_len = self.engine.logprob_budget, self.engine.config.max_model_len
            charge = stack.enter_context(budget.call(parsed.params, max_model_len or 0))

            def on_ready(num_prompt_tokens: int) -> None:
                charge.add(num_prompt_tokens)
                usage.prompt_tokens += num_prompt_tokens

            answers = answers_of(self.engine, parsed, name, metadata.traceparent, on_ready)
            stack.push_async_callback(answers.aclose)
            with named_as_written(parsed.body):
                if not parsed.stream:
                    whole = await gather(answers, parsed, form)
                    return json_response(whole, stack.pop_all(), headers, self.turns)
                # Wait for the first delta before sending headers, so that rejections get a status.
                first = await anext(answers)
            if failure := first[1].failure:
                raise failed(failure, parsed)
            events = chunks(first, answers, parsed, form, usage, self.turns)
            return event_stream(events, stack.pop_all(), headers)

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model(name) for name in self.names]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        check_model({"model": name}, self.names)
        return _json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "octavo",
            "max_model_len": self.engine.config.max_model_len,
        }

    async def _body(self, request: Request) -> dict[str, Any]:
        data = await request.body()
        return await in_thread(functools.partial(read_json, data), len(data) > AT_ONCE)

    async def tokenize(self, request: Request) -> Response:
        """Tokenize {"prompt": ...} or {"messages": ...}.

        Each image or video gives one placeholder token; it is neither fetched nor decoded.
        """
        body = await self._body(request)
        check_model(body, self.names)
        _only(body, "model", "prompt", "messages")
        prompt, messages = body.get("prompt"), body.get("messages")
        if (prompt is None) == (messages is None) or not isinstance(prompt, str | None):
            raise InputError("prompt", "set either prompt (a string) or messages")
        if prompt is not None:
            tokens = await self.engine.tokenize(prompt)
        else:
            reading = functools.partial(read_conversation, messages, from_json=True)
            tokens = await self.engine.tokenize(await in_thread(reading, True))
        limit = self.engine.config.max_model_len
        return _json({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request)
        check_model(body, self.names)
        _only(body, "model", "tokens")
        tokens = body.get("tokens")
        if not isinstance(tokens, list):
            raise InputError("tokens", "must be a list of token ids")
        with named_as_written(body):
            return _json({"prompt": await self.engine.detokenize(tokens)})

    async def metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus' text format."""
        text = metrics_text(self.engine.engine.stats)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def health(self, request: Request) -> Response:
        """Return 200 while the process is alive."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Return 200 while requests are accepted, else 503."""
        if self.work.is_draining:
            raise RequestRejected("UNAVAILABLE", "the server is draining")
        if self.engine.failed:
            raise RequestRejected("UNAVAILABLE", "the engine has stopped")
        if self.engine.engine.restarts.is_long:
            raise RequestRejected(
                "UNAVAILABLE", "the workers are restarting; requests wait for them"
            )
        return _json({"status": "ready"})


def _json(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dump(value), 200, headers, "application/json")


def _only(body: Mapping[str, Any], *known: str) -> None:
    for name in body:
        if name not in known:
            raise InputError(name, f"unknown field; allowed are {', '.join(known)}")
