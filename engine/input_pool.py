"""Threads that make requests' input ready, beside the engine's loop.

Decoding, resizing and hashing hold no lock of Python's. Prompts with videos have threads of their
own, so that a long video keeps no image waiting.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from ..scheduler.admission import QueueFull
from .input.processor import InputProcessor, InputTimes, ProcessedInput, Prompt
from .media.child_pool import DecoderPool
from .media.opening import OpenReader, open_here

KINDS = ("image", "video")


class InputJob:
    """A prompt on its way. `future` is done when the request can begin: later frames of a video
    are decoded after that."""

    def __init__(self, prompt: Prompt) -> None:
        self.future: Future[ProcessedInput] = Future()
        self._prompt = [prompt]
        self._given = time.monotonic()
        self._is_dropped = False

    def cancel(self) -> None:
        """Nobody wants it, or what is left of it: nothing is kept, decoding stops soon. To be
        called in any case once its request is over."""
        self._is_dropped = True
        self._prompt.clear()  # the pool may come to it much later
        self.future.cancel()
        if self.future.done() and not self.future.cancelled() and not self.future.exception():
            self.future.result().drop()

    def run(self, processor: InputProcessor, decoders: DecoderPool | None) -> None:
        """In the pool. `decoders`: processes that open files; None: this one does."""
        if not self.future.set_running_or_notify_cancel():
            return
        with decoders.lease() if decoders else nullcontext(open_here) as open_reader:
            try:
                ready = self._begin(processor, open_reader)
            except BaseException as error:
                self.future.set_exception(error)
                return
            self.future.set_result(ready)
            if ready.stream is not None:
                if self._is_dropped:
                    ready.drop()
                ready.stream.run()

    def _begin(self, processor: InputProcessor, open_reader: OpenReader) -> ProcessedInput:
        begun = time.monotonic()
        ready = processor.begin(self._prompt.pop(), open_reader=open_reader)
        times = InputTimes(begun - self._given, time.monotonic() - begun)
        return replace(ready, times=times, arrived_at=self._given)


class InputPool:
    def __init__(
        self, processor: InputProcessor, isolate: bool = False, max_bytes: int | None = None
    ) -> None:
        """`isolate`: files are decoded in processes of their own. `max_bytes`: of sources that
        wait or are being made ready; None: no bound."""
        self._processor, self._max_bytes = processor, max_bytes
        cores = os.cpu_count() or 1
        sizes = max(2, cores), max(2, cores // 2)
        self._threads = ThreadPoolExecutor(sizes[0], thread_name_prefix="media")
        self._video_threads = ThreadPoolExecutor(sizes[1], thread_name_prefix="video")
        self._decoders = DecoderPool(processor.limits, sum(sizes)) if isolate else None
        if self._decoders is not None:
            self._decoders.warm()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def submit(self, prompt: Prompt) -> InputJob:
        """Raises `QueueFull` where too many bytes are waiting already."""
        size = source_bytes(prompt)
        with self._lock:
            total = self._num_bytes + size
            most = self._max_bytes
            if most is not None and 0 < size < total and total > most:  # one alone may be larger
                raise QueueFull(
                    f"{self._num_bytes} bytes of images and videos are being made ready, and "
                    f"{size} more are over max_queue_bytes={self._max_bytes}; try again later"
                )
            self._num_bytes = total
        job = InputJob(prompt)
        job.future.add_done_callback(lambda future: self._release(size))
        threads = self._video_threads if has_video(prompt) else self._threads
        work = threads.submit(job.run, self._processor, self._decoders)
        work.add_done_callback(lambda work: job.cancel() if work.cancelled() else None)
        return job

    def _release(self, size: int) -> None:
        with self._lock:
            self._num_bytes -= size

    def close(self) -> None:
        """What has not begun is cancelled; nothing is waited for."""
        for threads in (self._threads, self._video_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._decoders is not None:
            self._decoders.close()


def has_video(prompt: Any) -> bool:
    """Whether a prompt in any form brings a video. What is no prompt brings none."""
    return any(kind == "video" for kind, _ in _sources(prompt))


def source_bytes(prompt: Any) -> int:
    """Bytes that a prompt's media hold as they came: of files, data URIs and arrays."""
    return sum(_num_bytes(source) for _, source in _sources(prompt))


def _sources(prompt: Any) -> Iterator[tuple[str, Any]]:
    """("image" or "video", source) of each item of a prompt in any form, which may be wrong."""
    if isinstance(prompt, Mapping):
        for kind in KINDS:
            for source in _list(prompt.get(f"{kind}s")):
                yield kind, source.get(kind) if isinstance(source, Mapping) else source
        prompt = prompt.get("messages")
    for message in _list(prompt):
        for part in _list(message.get("content")) if isinstance(message, Mapping) else ():
            if isinstance(part, Mapping) and part.get("type") in KINDS:
                yield part["type"], part.get(part["type"])


def _list(value: Any) -> Sequence[Any]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return value if is_list else ()


def _num_bytes(source: Any) -> int:
    if isinstance(source, str | bytes | bytearray | memoryview):
        return len(source)
    if isinstance(source, Sequence):
        return sum(map(_num_bytes, source))
    size = getattr(source, "nbytes", 0)
    return size if isinstance(size, int) else 0
