"""Threads that make requests' input ready, beside the engine's loop.

Decoding, resizing and hashing hold no lock of Python's. Prompts with videos have threads of their
own, so that a long video keeps no image waiting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from .input.processor import InputProcessor, InputTimes, ProcessedInput, Prompt


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

    def run(self, processor: InputProcessor) -> None:
        """In the pool."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            ready = self._begin(processor)
        except BaseException as error:
            self.future.set_exception(error)
            return
        self.future.set_result(ready)
        if ready.stream is not None:
            if self._is_dropped:
                ready.drop()
            ready.stream.run()

    def _begin(self, processor: InputProcessor) -> ProcessedInput:
        begun = time.monotonic()
        ready = processor.begin(self._prompt.pop())
        times = InputTimes(begun - self._given, time.monotonic() - begun)
        return replace(ready, times=times)


class InputPool:
    def __init__(self, processor: InputProcessor) -> None:
        self._processor = processor
        cores = os.cpu_count() or 1
        self._threads = ThreadPoolExecutor(max(2, cores), thread_name_prefix="media")
        self._video_threads = ThreadPoolExecutor(max(2, cores // 2), thread_name_prefix="video")

    def submit(self, prompt: Prompt) -> InputJob:
        job = InputJob(prompt)
        threads = self._video_threads if has_video(prompt) else self._threads
        work = threads.submit(job.run, self._processor)
        work.add_done_callback(lambda work: job.cancel() if work.cancelled() else None)
        return job

    def close(self) -> None:
        """What has not begun is cancelled; nothing is waited for."""
        for threads in (self._threads, self._video_threads):
            threads.shutdown(wait=False, cancel_futures=True)


def has_video(prompt: Any) -> bool:
    """Whether a prompt in any form brings a video. What is no prompt brings none."""
    if isinstance(prompt, Mapping):
        return bool(prompt.get("videos")) or has_video(prompt.get("messages"))
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
        return False
    parts = [message.get("content") for message in prompt if isinstance(message, Mapping)]
    return any(
        isinstance(part, Mapping) and part.get("type") == "video"
        for content in parts
        if isinstance(content, Sequence)
        for part in content
    )
