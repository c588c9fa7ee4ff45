"""`AsyncLLM`: the engine for asyncio programs, and for our own servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, Unpack

from ..scheduler.admission import QueueFull
from ..scheduler.params import OptionFields, RequestOptions, SamplingParams, truncated_repr
from ..scheduler.request import Request, RequestStatus
from .config.engine_config import EngineConfig
from .core.engine import Engine
from .core.logprob_budget import LogprobBudget
from .core.request_builder import Deadline, PreprocessTimeout, check_params
from .core.step_loop import Admitted, Event, StepLoop
from .core.tool_call_stream import ToolCallStream
from .errors import WAS_CLOSED, DuplicateRequest, EngineDead
from .input.preprocess_pool import InputJob, InputPool
from .input.processor import ProcessedInput, Prompt
from .observability.request_log import RequestRecord
from .observability.snapshot import Snapshot
from .observability.tracing import RequestSpans
from .outputs import OutputDelta
from .request_stream import RequestStream, finished
from .tool_calling.tool_choice import has_tool_grammar, with_tool_choice
from .utils.lifetime import close_at_exit, reject_pickling
from .utils.progress import loading_bar

POLL_INTERVAL = 0.5  # seconds between two looks whether who should answer is still there


class AsyncLLM:
    """Serves a Qwen2-VL model to coroutines of one event loop.

    Arguments are `octavo.LLM`'s. A context manager, and an asynchronous one.
    """

    def __init__(self, model: Any = None, **settings: Any) -> None:
        """Starts the workers and loads the weights; takes seconds. Raises `ConfigError`."""
        with loading_bar() as on_progress:
            self.engine = Engine(model, on_progress=on_progress, **settings)
        self._pool = InputPool(
            self.engine.processor,
            self.engine.config.isolate_media,
            self.engine.config.max_queue_bytes,
            self.engine.grammars,
            self.engine.host_kv_bytes,
        )
        # A name may be used again while deltas of its previous request are in flight; a key is not.
        self._keys: dict[str, str] = {}  # request_id: key
        self._streams: dict[str, RequestStream] = {}  # by key
        self._numbers = itertools.count()
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._death: asyncio.Event | None = None
        self._steps = StepLoop(self.engine, self._hand_over, self._died)
        self._closed = False
        self.logprob_budget = LogprobBudget()  # of the servers on this engine
        self.spans: RequestSpans | None = None  # where requests that come from now on write theirs
        # Told of each request that is admitted: its request_id, and what it becomes.
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
        """Why the engine stopped; empty while it runs."""
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
        """Answers one conversation as a stream of deltas. Closing the stream aborts the request.

        Tools: as in `LLM.chat`. `options`: those of `octavo.RequestOptions`;
        `traceparent`: the caller's span, in W3C's form, for the spans of the request. Raises
        `InputError`, `AdmissionError` (`QueueFull` where trying again may help) or
        `DuplicateRequest` before the first delta, and `EngineDead` whenever the workers are gone.
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
        """Continues a raw prompt, in the forms that `LLM.generate` takes. Options and errors as in
        `chat`. `on_ready` is called with the number of prompt tokens before admission; what it
        raises rejects the request. A reader that is slower than the model gets what has gathered
        as one delta for each answer."""
        self.engine.check_owner()
        name = request_id or uuid.uuid4().hex
        with RequestRecord(name, self.engine.stats, self.spans, traceparent or "") as record:
            self._bind()
            check_params(params)
            clock = Deadline(RequestOptions.of(**options))
            calls = ToolCallStream(prompt)
            key, stream = self._open(name, 1 if params is None else params.n)
            finished, preparing = False, self.engine.stats.preparing
            try:
                self._check_alive()
                preparing.add(key)
                if has_tool_grammar(prompt):  # which may be made of a megabyte of schemas
                    params = await asyncio.to_thread(with_tool_choice, prompt, params)
                    self._check_alive()
                stream.work = self._pool.submit(prompt, params)
                del prompt  # it may be large, and is the pool's now
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
        """Forget a request, and end what is still running of it."""
        del self._streams[key], self._keys[name]
        if stream.work is not None:
            stream.work.cancel()
        if stream.ready is not None:
            stream.ready.cancel()  # else asyncio logs errors that are never retrieved
        stream.work = stream.ready = None
        if stream.is_admitted and not is_finished:
            self._steps.abort(key)

    def _open(self, name: str, num_answers: int) -> tuple[str, RequestStream]:
        """A stream for a new request, and its key; refused where all places or the name are
        taken."""
        self._check_room()
        if name in self._keys:
            raise DuplicateRequest(f"request_id={truncated_repr(name)}: in use; choose another")
        key = self._keys[name] = f"{name}#{next(self._numbers)}"
        stream = self._streams[key] = RequestStream(num_answers)
        return key, stream

    async def _preprocess(
        self, work: InputJob, clock: Deadline, stream: RequestStream
    ) -> ProcessedInput | None:
        """None when the request was aborted or its time ran out meanwhile, as `stream` then
        says."""
        future = stream.ready = asyncio.wrap_future(work.future)
        await asyncio.wait([future], timeout=clock.left.timeout_s)
        self._check_alive()  # `close` empties the pool
        if stream.is_aborted:
            stream.end(RequestStatus.FINISHED_ABORTED)
            return None
        if not future.done():
            stream.end(RequestStatus.FINISHED_ERROR, str(PreprocessTimeout()))
            return None
        try:
            return future.result()
        finally:
            del work, future, stream  # an error refers to this frame, and they to the error

    def is_running(self, request_id: str) -> bool:
        """Return whether a request that has not ended has this name."""
        return request_id in self._keys

    async def abort(self, request_id: str) -> bool:
        """Ends a request; its stream closes with finish_reason "abort". False when unknown."""
        self.engine.check_owner()
        key = self._keys.get(request_id)
        if key is None or self.failed:
            return False
        stream = self._streams[key]
        if stream.is_admitted:
            self._steps.abort(key)
        elif stream.ready is not None:
            stream.is_aborted = True
            stream.ready.cancel()
        return True

    async def snapshot(self) -> Snapshot:
        """The engine between two steps: who runs and waits, and who has which block. A request is
        called NAME#NUMBER there, its answers after the first NAME#NUMBER[INDEX]. Raises
        `EngineDead`."""
        self._check_alive()
        asked = asyncio.wrap_future(self._steps.look())
        try:
            while not asked.done():
                self._check_alive()
                await asyncio.wait([asked], timeout=POLL_INTERVAL)
        finally:
            asked.cancel()
        return asked.result()

    async def tokenize(self, prompt: str | Sequence[Any], plain: bool = False) -> list[int]:
        """Return the token ids of a text or of a conversation, at most `max_model_len`.

        Images and videos of a conversation are one placeholder each. `plain`: in the text an added
        token's spelling means nothing. Raises `InputError` or `QueueFull`.
        """
        self._check_alive()
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
        """Wait for the pool. Raises `EngineDead` where `close` has emptied it."""
        await finished(work)
        self._check_alive()
        return work.result()

    async def wait_failed(self) -> str:
        """Returns the cause once the worker group has died."""
        if self.engine.is_disowned:
            return self.failed
        self._bind()
        if self._death is None:
            self._death = asyncio.Event()
        if not self.failed:
            await self._death.wait()
        return self.failed

    def close(self) -> None:
        """End the workers; streams that run get `EngineDead`. Safe to call twice, and without
        effect in a forked process."""
        if self._closed or self.engine.is_disowned:
            return
        self._closed = True
        self._steps.close()
        self._pool.close()
        self.engine.close()
        self._died(self.failed)

    def _bind(self) -> None:
        """The first coroutine's event loop is the one that streams are delivered on."""
        running = asyncio.get_running_loop()
        if self._asyncio is not running:
            if self._streams:
                raise RuntimeError("an AsyncLLM serves one event loop at a time")
            self._asyncio, self._death = running, None

    def _check_alive(self) -> None:
        if self.failed or self._closed:
            raise EngineDead(f"the engine stopped: {self.failed or WAS_CLOSED}")

    def _check_room(self) -> None:
        """Refuses a request before its media take any memory, where all places are taken."""
        config = self.engine.config
        if len(self._streams) >= config.max_num_seqs + config.max_queue_len:
            raise QueueFull(
                f"{len(self._streams)} requests run or wait, max_num_seqs={config.max_num_seqs} "
                f"and max_queue_len={config.max_queue_len}; try again later"
            )

    def _hand_over(self, events: list[Event]) -> None:
        """On the step thread: one hand-over a step."""
        self._call_soon(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:  # else its reader is gone
                stream.events.put(event)

    def _died(self, cause: str) -> None:
        self._call_soon(self._end_streams, cause)

    def _call_soon(self, call: Callable[[Any], None], given: Any) -> None:
        """In the event loop, from any thread."""
        if self._asyncio is not None:
            with contextlib.suppress(RuntimeError):  # it is closed: nobody listens
                self._asyncio.call_soon_threadsafe(call, given)

    def _end_streams(self, cause: str) -> None:
        if self._death is not None:
            self._death.set()
        for stream in self._streams.values():
            stream.events.put(EngineDead(f"the engine stopped: {cause}"))

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
