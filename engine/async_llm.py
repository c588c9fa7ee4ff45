"""`AsyncLLM`: the engine for asyncio programs and for the API servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Unpack

from ..scheduler.params import OptionFields, RequestOptions, SamplingParams, truncated_repr
from ..scheduler.request import Request, RequestStatus
from .config.engine_config import EngineConfig
from .core.engine import Engine
from .core.logprob_budget import LogprobBudget
from .core.request_builder import Deadline, check_params
from .core.step_loop import Admitted, Event, StepLoop
from .core.tool_call_stream import ToolCallStream
from .errors import WAS_CLOSED, DuplicateRequest, EngineDead, PreprocessTimeout, QueueFull
from .input.conversation import Conversation, read_conversation
from .input.parsed_prompt import has_many_parts
from .input.preprocess_pool import InputJob, InputPool
from .input.processor import Parsed, ProcessedInput, Prompt, parse
from .observability.request_log import RequestRecord
from .observability.snapshot import Snapshot
from .observability.tracing import RequestSpans
from .outputs import OutputDelta
from .request_stream import RequestStream, finished
from .utils.lifetime import close_at_exit, reject_pickling
from .utils.progress import loading_bar
from .utils.readers import read

POLL_INTERVAL = 0.5  # seconds between checks that the step thread is alive


class AsyncLLM:
    """Asyncio interface to a Qwen2-VL model, for coroutines of one event loop.

    Takes the arguments of `octavo.LLM`. Usable with `with` and `async with`.
    """

    def __init__(self, model: Any = None, **settings: Any) -> None:
        """Start the workers and load the weights; takes seconds. Raises `ConfigError`."""
        with loading_bar() as on_progress:
            self.engine = Engine(model, on_progress=on_progress, **settings)
        self._pool = InputPool(
            self.engine.processor,
            self.engine.config.isolate_media,
            self.engine.config.max_queue_bytes,
            self.engine.grammars,
            self.engine.host_kv_bytes,
        )
        self._keys: dict[str, str] = {}  # by request_id; keys are never reused, unlike ids
        self._streams: dict[str, RequestStream] = {}  # by key
        self._numbers = itertools.count()
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._death: asyncio.Event | None = None
        self._steps = StepLoop(self.engine, self._hand_over, self._end_streams_soon)
        self._closed = False
        self.logprob_budget = LogprobBudget()  # shared by all API servers on this engine
        self.spans: RequestSpans | None = None  # trace export for new requests
        # Called for each admitted request with its request_id and the scheduler's request.
        self.on_admitted: Callable[[str, Request], None] | None = None
        close_at_exit(self)

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    @property
    def worker_pids(self) -> tuple[int, ...]:
        return self.engine.worker_pids

    @property
    def failed(self) -> str:
        """The cause why the engine stopped; empty while it runs."""
        return self.engine.failed

    def chat(
        self,
        messages: Sequence[Any],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        traceparent: str | None = None,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        **options: Unpack[OptionFields],
    ) -> AsyncGenerator[OutputDelta, None]:
        """Answer one conversation as a stream of deltas. Closing the stream aborts the request.

        Tools work as in `LLM.chat`. `options` are the fields of `octavo.RequestOptions`;
        `traceparent` is the W3C trace context of the caller's span. Raises `InputError`,
        `AdmissionError` (`QueueFull` if a retry may succeed) or `DuplicateRequest` before the
        first delta, and `EngineDead` at any time if the workers fail permanently.
        """
        prompt: dict[str, Any] = {"messages": messages, "images": images, "videos": videos}
        prompt |= {"tools": tools, "tool_choice": tool_choice}
        prompt |= {"parallel_tool_calls": parallel_tool_calls}
        return self.generate(
            prompt, params, request_id=request_id, traceparent=traceparent, **options
        )

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        traceparent: str | None = None,
        on_ready: Callable[[int], None] | None = None,
        **options: Unpack[OptionFields],
    ) -> AsyncGenerator[OutputDelta, None]:
        """Complete a raw prompt in any format of `LLM.generate`; options and errors as in `chat`.

        `on_ready` is called with the number of prompt tokens before admission and may raise to
        reject the request. Deltas are merged per answer when the reader is slower than the model.
        """
        self.engine.check_owner()
        name = request_id or uuid.uuid4().hex
        with RequestRecord(name, self.engine.stats, self.spans, traceparent or "") as record:
            self._bind()
            check_params(params)
            clock = Deadline(RequestOptions.of(**options))
            key, stream = self._open(name, 1 if params is None else params.n)
            finished, preparing = False, self.engine.stats.preparing
            try:
                preparing.add(key)
                if not isinstance(prompt, Parsed):
                    prompt = await read(partial(parse, prompt), has_many_parts(prompt))
                if prompt.tools.forced_name is not None:  # slow if the schemas are large
                    params = await asyncio.to_thread(prompt.tools.with_grammar, params)
                self._check_alive()
                calls = ToolCallStream(prompt.tools)
                stream.work = self._pool.submit(prompt, params)
                del prompt  # It may be large; the pool keeps the only reference.
                with calls.naming():
                    ready = await self._preprocess(stream.work, clock, stream)
                if ready is not None:
                    record.num_prompt_tokens = len(ready.prompt_token_ids)
                    if on_ready is not None:
                        on_ready(record.num_prompt_tokens)
                    stream.is_admitted = record.is_admitted = True
                    self._steps.add(key, ready, params, clock)
                while not finished:
                    for event in await stream.events.take():
                        if isinstance(event, EngineDead):
                            raise event
                        if isinstance(event, Admitted):
                            preparing.discard(key)
                            if event.error is not None:
                                finished = True
                                raise event.error
                            if self.on_admitted is not None and event.request is not None:
                                self.on_admitted(name, event.request)
                            continue
                        finished = event.usage is not None
                        record.add(event)
                        yield calls.read(event.named(name))
            finally:
                preparing.discard(key)
                self._release(name, key, stream, finished)

    def _release(self, name: str, key: str, stream: RequestStream, is_finished: bool) -> None:
        """Remove a request, and cancel or abort what is still running of it."""
        del self._streams[key], self._keys[name]
        for pending in (stream.work, stream.ready):
            if pending is not None:
                pending.cancel()  # else asyncio logs exceptions of `ready` as never retrieved
        stream.work = stream.ready = None
        if stream.is_admitted and not is_finished:
            self._steps.abort(key)

    def _open(self, name: str, num_answers: int) -> tuple[str, RequestStream]:
        """Register a new request and return its key and stream.

        Raises `QueueFull` at capacity, before the request's media take memory.
        """
        config = self.engine.config
        if len(self._streams) >= config.max_num_seqs + config.max_queue_len:
            raise QueueFull(
                f"{len(self._streams)} requests are running or waiting, the maximum for "
                f"max_num_seqs={config.max_num_seqs} and max_queue_len={config.max_queue_len}; "
                "try again later"
            )
        if name in self._keys:
            raise DuplicateRequest(f"request_id={truncated_repr(name)}: in use; choose another")
        key = self._keys[name] = f"{name}#{next(self._numbers)}"
        stream = self._streams[key] = RequestStream(num_answers)
        return key, stream

    async def _preprocess(
        self, work: InputJob, clock: Deadline, stream: RequestStream
    ) -> ProcessedInput | None:
        """Return the input; None if the request was aborted or timed out, as `stream` reports."""
        future = stream.ready = asyncio.wrap_future(work.future)
        if stream.is_aborted:
            future.cancel()
        await asyncio.wait([future], timeout=clock.left.timeout_s)
        self._check_alive()  # `close` cancels pending work
        if stream.is_aborted:
            stream.end(RequestStatus.FINISHED_ABORTED)
            return None
        if not future.done():
            stream.end(RequestStatus.FINISHED_ERROR, PreprocessTimeout().reason)
            return None
        try:
            return future.result()
        finally:
            del work, future, stream  # an error refers to this frame, and they to the error

    def is_running(self, request_id: str) -> bool:
        """Return whether an unfinished request has this id."""
        return request_id in self._keys

    async def abort(self, request_id: str) -> bool:
        """End a request with finish_reason "abort". Return False if the id is unknown."""
        self.engine.check_owner()
        key = self._keys.get(request_id)
        if key is None or self.failed:
            return False
        stream = self._streams[key]
        if stream.is_admitted:
            self._steps.abort(key)
        else:
            stream.is_aborted = True
            if stream.ready is not None:
                stream.ready.cancel()
        return True

    async def snapshot(self) -> Snapshot:
        """Return running and waiting requests and block ownership. Raises `EngineDead`.

        Requests appear as ID#NUMBER, their answers after the first as ID#NUMBER[INDEX].
        """
        self._check_alive()
        asked = asyncio.wrap_future(self._steps.look())
        try:
            while not asked.done():
                self._check_alive()
                await asyncio.wait([asked], timeout=POLL_INTERVAL)
        finally:
            asked.cancel()
        return asked.result()

    async def tokenize(
        self, prompt: str | Sequence[Any] | Conversation, plain: bool = False
    ) -> list[int]:
        """Return the token ids of a text or a conversation, at most `max_model_len`.

        Each image or video of a conversation is one placeholder token. `plain`: treat the spelling
        of special tokens in a text as ordinary text. Raises `InputError` or `QueueFull`.
        """
        self._check_alive()
        if not isinstance(prompt, str | Conversation):
            prompt = await asyncio.to_thread(read_conversation, prompt)
        job = self._pool.tokenize(prompt, plain)
        try:
            return await self._result(job.future)
        finally:
            job.cancel()

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids. Raises `InputError`."""
        self._check_alive()
        return await self._result(self._pool.detokenize(token_ids, skip_special_tokens))

    async def _result(self, work: Future[Any]) -> Any:
        """Wait for a pool job. Raises `EngineDead` if the engine was closed."""
        await finished(work)
        self._check_alive()
        return work.result()

    async def wait_failed(self) -> str:
        """Wait until the engine stops, and return the cause."""
        if self.engine.is_disowned:
            return self.failed
        self._bind()
        self._death = self._death or asyncio.Event()
        if not self.failed:
            await self._death.wait()
        return self.failed

    def close(self) -> None:
        """Stop the workers; open streams raise `EngineDead`. No-op if closed or after a fork."""
        if self._closed or self.engine.is_disowned:
            return
        self._closed = True
        self._steps.close()
        self._pool.close()
        self.engine.close()
        self._end_streams_soon(self.failed)

    def _bind(self) -> None:
        """Bind to the running event loop. Raises RuntimeError if another one has open streams."""
        running = asyncio.get_running_loop()
        if self._asyncio is not running:
            if self._streams:
                raise RuntimeError("an AsyncLLM serves one event loop at a time")
            self._asyncio, self._death = running, None

    def _check_alive(self) -> None:
        if self.failed or self._closed:
            raise EngineDead(self.failed or WAS_CLOSED)

    def _hand_over(self, events: list[Event]) -> None:
        """Pass one step's events to the event loop. Runs on the step thread."""
        self._call_soon(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:  # None: the reader closed the stream
                stream.events.put(event)

    def _call_soon(self, call: Callable[[Any], None], given: Any) -> None:
        """Schedule `call` in the event loop. Thread-safe."""
        if self._asyncio is not None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._asyncio.call_soon_threadsafe(call, given)

    def _end_streams_soon(self, cause: str) -> None:
        self._call_soon(self._end_streams, cause)

    def _end_streams(self, cause: str) -> None:
        if self._death is not None:
            self._death.set()
        for stream in self._streams.values():
            stream.events.put(EngineDead(cause))

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        return reject_pickling("octavo.AsyncLLM")

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)
