"""`AsyncLLM`: the engine for asyncio programs, and for our own servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..scheduler.request import RequestStatus, SamplingParams
from .config import EngineConfig, ModelConfig
from .engine import DuplicateRequest, Engine, EngineDead, Prompt
from .loop import Admitted, Event, StepLoop
from .output import OutputDelta
from .progress import loading_bar

Stream = asyncio.Queue["Event | EngineDead"]


class AsyncLLM:
    """Serves a Qwen2-VL model to coroutines of one event loop.

    Arguments are `octavo.LLM`'s. A context manager, and an asynchronous one.
    """

    def __init__(self, model: Any = None, **settings: Any) -> None:
        """Starts the workers and loads the weights; takes seconds. Raises `ConfigError`."""
        with loading_bar() as on_progress:
            self.engine = Engine(model, on_progress=on_progress, **settings)
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="media")
        self._streams: dict[str, Stream] = {}
        self._admitted: set[str] = set()  # of the streams, those that the step thread knows
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._death: asyncio.Event | None = None
        self._steps = StepLoop(self.engine, self._hand_over, self._died)
        self._closed = False

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    @property
    def model_config(self) -> ModelConfig:
        return self.engine.model_config

    @property
    def num_blocks(self) -> int:
        return self.engine.num_blocks

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
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> AsyncGenerator[OutputDelta, None]:
        """Answers one conversation as a stream of deltas. Closing the stream aborts the request.

        Raises `InputError`, `AdmissionError` or `DuplicateRequest` before the first delta, and
        `EngineDead` whenever the workers are gone.
        """
        prompt = {"messages": messages, "images": images, "videos": videos}
        return self.generate(prompt, params, request_id=request_id)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> AsyncGenerator[OutputDelta, None]:
        """Continues a raw prompt, in the forms that `LLM.generate` takes. Errors as in `chat`."""
        self._bind()
        name = request_id or uuid.uuid4().hex
        if name in self._streams:
            raise DuplicateRequest(f"request_id={name!r}: in use; choose another")
        stream: Stream = asyncio.Queue()
        self._streams[name] = stream
        finished = False
        try:
            running = asyncio.get_running_loop()
            ready = await running.run_in_executor(self._pool, self.engine.preprocess, prompt)
            self._check_alive()
            if stream.empty():  # else it was aborted while its input was made ready
                self._admitted.add(name)
                self._steps.add(name, ready, params)
            while not finished:
                event = await stream.get()
                if isinstance(event, EngineDead):
                    raise event
                if isinstance(event, Admitted):
                    if event.error is not None:
                        finished = True
                        raise event.error
                    continue
                finished = event.finish_reason is not None
                yield event
        finally:
            del self._streams[name]
            if name in self._admitted and not finished:
                self._steps.abort(name)
            self._admitted.discard(name)

    async def abort(self, request_id: str) -> bool:
        """Ends a request; its stream closes with finish_reason "abort". False when unknown."""
        if request_id not in self._streams or self.failed:
            return False
        if request_id in self._admitted:
            self._steps.abort(request_id)
        else:
            ended = OutputDelta(request_id, finish_reason=RequestStatus.FINISHED_ABORTED.value)
            self._streams[request_id].put_nowait(ended)
        return True

    async def wait_failed(self) -> str:
        """Returns the cause once the worker group has died."""
        self._bind()
        if self._death is None:
            self._death = asyncio.Event()
        if not self.failed:
            await self._death.wait()
        return self.failed

    def close(self) -> None:
        """Ends the workers; streams that run get `EngineDead`. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._steps.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.engine.close()
        if self._asyncio and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(self._end_streams, self.failed)

    def _bind(self) -> None:
        """The first coroutine's event loop is the one that streams are delivered on."""
        running = asyncio.get_running_loop()
        if self._asyncio is not running:
            if self._streams:
                raise RuntimeError("an AsyncLLM serves one event loop at a time")
            self._asyncio, self._death = running, None

    def _check_alive(self) -> None:
        if self.failed:
            raise EngineDead(f"the engine stopped: {self.failed}")

    def _hand_over(self, events: list[Event]) -> None:
        """On the step thread: one hand-over a step."""
        if self._asyncio is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                self._asyncio.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:  # else its reader is gone
                stream.put_nowait(event)

    def _died(self, cause: str) -> None:
        if self._asyncio is not None:
            with contextlib.suppress(RuntimeError):
                self._asyncio.call_soon_threadsafe(self._end_streams, cause)

    def _end_streams(self, cause: str) -> None:
        if self._death is not None:
            self._death.set()
        for stream in self._streams.values():
            stream.put_nowait(EngineDead(f"the engine stopped: {cause}"))

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)
