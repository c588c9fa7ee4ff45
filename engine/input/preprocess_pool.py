"""Thread pools that preprocess requests alongside the engine's loop.

Tokenizing, decoding, resizing and hashing release the GIL. Short texts, long texts, images, videos
and URL fetches use separate threads, so none queues behind a slower kind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...scheduler.errors import QueueFull
from ...scheduler.params import SamplingParams
from ...scheduler.structured import StructuredOutput
from ..errors import GrammarQueueFull, InputError, without_frames
from ..media.sandbox.plan import MEDIA_LANES, plan_decoders
from ..media.sandbox.pool import DecoderPool
from ..media.task import MediaTask
from ..structured_output.compiler import Grammar, Grammars
from ..structured_output.trials import CompileTask
from ..utils.cores import num_cores
from ..utils.daemon_pool import DaemonPool
from ..utils.machine_memory import available_memory
from .conversation import Conversation
from .parsed_prompt import ParsedPrompt, PromptSize
from .processor import InputProcessor, InputTimes, ProcessedInput

log = logging.getLogger("octavo.media")

CANCELLED = ParsedPrompt("")  # replaces the prompt of a job that is cancelled as it starts
MAX_SLOW_GRAMMARS = 16  # queued for compilation; each may take a second


def _do_nothing() -> None:
    """Replace the callback of a cancelled job.

    The previous callback refers to the job, so it would keep the request's pixels in memory until
    the next garbage collection.
    """


class InputJob:
    """Preprocessing of one prompt.

    `future` is done when the request can start; later frames of a video are decoded after that.
    """

    def __init__(
        self, prompt: ParsedPrompt | ProcessedInput, params: SamplingParams | None = None
    ) -> None:
        """Create a job. The grammar and bad words of `params` are prepared too."""
        self.future: Future[ProcessedInput] = Future()
        self.form = None if params is None else params.structured
        self._bad_words = () if params is None else params.bad_words
        self._grammar: Grammar | None = None
        self._compile_task = CompileTask()
        self._prompt: list[ParsedPrompt | ProcessedInput] = [prompt]
        self._given = time.monotonic()
        self._is_dropped = False
        self._task: MediaTask | None = None  # once the job has started
        self.on_cancel: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Stop the job and release its prompt. Call it when the request has ended for any reason.

        Until then, the bytes of the prompt count towards the limit of the pool.
        """
        self._is_dropped = True
        self._prompt.clear()  # The pool may reach this job much later.
        self.future.cancel()
        self._compile_task.cancel()
        if self._task is not None:
            self._task.cancel()
        self.on_cancel, call = _do_nothing, self.on_cancel
        call()

    def compile(
        self,
        compiler: Callable[[StructuredOutput, CompileTask], Grammar | None],
        go_on: Callable[[], None],
        take_longer: Callable[[], None],
    ) -> None:
        """Compile the grammar, in a thread of the pool and before `run`.

        Calls `go_on` afterwards, or `take_longer` if `compiler` returns None.
        """
        try:
            if self.form is not None and not self._is_dropped:
                self._grammar = compiler(self.form, self._compile_task)
                if self._grammar is None:
                    take_longer()
                    return
        except BaseException as error:
            if self.future.set_running_or_notify_cancel():
                self.future.set_exception(without_frames(error))
        else:
            go_on()

    def run(self, processor: InputProcessor, decoders: DecoderPool | None, lane: str = "") -> None:
        """Preprocess the prompt, in a thread of the pool.

        `decoders`: processes that decode files; None: decode in this process. The decoder is
        released before the result is set, so that it is free when the client reacts, except for
        videos whose later frames are still being decoded.
        """
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            with self._started_task(processor, decoders, lane) as task:
                ready = self._begin(processor, task)
                if ready.stream is not None:
                    self.future.set_result(ready)
                    ready.stream.run()
                    return
        except BaseException as error:
            if self.future.done():  # The stream reports its own errors.
                raise
            self.future.set_exception(without_frames(error))
        else:
            self.future.set_result(ready)

    @contextmanager
    def _started_task(
        self, processor: InputProcessor, decoders: DecoderPool | None, lane: str
    ) -> Iterator[MediaTask]:
        task = self._task = MediaTask(processor.limits)
        if self._is_dropped:
            task.cancel()
        if decoders is None:
            yield task
            return
        with decoders.lease(task, lane) as lease:
            task.open_reader = lease
            yield task

    def _begin(self, processor: InputProcessor, task: MediaTask) -> ProcessedInput:
        start = time.monotonic()
        prompt = self._prompt.pop() if self._prompt else CANCELLED
        ready = processor.begin(prompt, task=task)
        if self._bad_words:
            ready = replace(ready, bad_words=processor.bad_word_ids(self._bad_words))
        times = InputTimes(start - self._given, time.monotonic() - start)
        return replace(ready, times=times, arrived_at=self._given, grammar=self._grammar)


class TokenizeJob:
    """Tokenization of a text or a conversation, for the tokenize endpoints."""

    def __init__(self, prompt: str | Conversation, plain: bool) -> None:
        self.future: Future[list[int]] = Future()
        self._prompt, self._plain = prompt, plain
        self._is_dropped = False
        self.on_cancel: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Stop at the next piece of text. Call it in any case, as `InputJob.cancel`."""
        self._is_dropped = True
        self.future.cancel()
        self.on_cancel, call = _do_nothing, self.on_cancel
        call()

    def run(self, processor: InputProcessor) -> None:
        """Tokenize the prompt, in a thread of the pool."""
        if not self.future.set_running_or_notify_cancel():
            return
        prompt, reader = self._prompt, processor.reader
        try:
            if isinstance(prompt, str):
                ids = reader.tokenize(prompt, self._plain, self._check)
            else:
                ids = reader.encode(prompt, self._check)
        except BaseException as error:
            self.future.set_exception(without_frames(error))
        else:
            self.future.set_result(ids)

    def _check(self) -> None:
        if self._is_dropped:
            raise InputError("prompt", "the request was cancelled")


@dataclass(frozen=True)
class PreprocessPools:
    """Number of threads for each kind of prompt, so that none queues behind a slower kind."""

    text: int  # prompts without media, up to LONG_TEXT characters
    long_texts: int  # prompts without media, over LONG_TEXT characters
    images: int
    videos: int
    urls: int  # prompts with media to fetch; these threads mostly wait
    grammars: int  # compilation, before preprocessing
    slow_grammars: int  # compilations of over 0.1 s, which delay only each other

    @classmethod
    def of(cls, cores: int) -> PreprocessPools:
        return cls(
            text=2,
            long_texts=2,
            images=max(2, cores),
            videos=max(2, cores // 2),
            urls=8,
            grammars=2,
            slow_grammars=1,
        )

    def decoders(self) -> dict[str, int]:
        """Return the number of decoder processes that each pool can keep busy.

        URL threads mostly wait, so they need no more decoders than images.
        """
        decoding = (self.images, self.videos, min(self.images, self.urls))
        return dict(zip(MEDIA_LANES, decoding, strict=True))


class InputPool:
    """Preprocesses requests in threads. Thread-safe."""

    def __init__(
        self,
        processor: InputProcessor,
        isolate: bool = False,
        max_bytes: int | None = None,
        grammars: Grammars | None = None,
        claimed_bytes: int = 0,
    ) -> None:
        """Start the threads, and the decoder processes if `isolate`.

        `max_bytes`: limit on media and long texts of all unfinished requests; None: unlimited.
        `claimed_bytes`: available memory that the engine will still use.
        """
        self._processor, self._max_bytes, self._grammars = processor, max_bytes, grammars
        lanes = PreprocessPools.of(num_cores())
        self._threads = {name: DaemonPool(size, name) for name, size in vars(lanes).items()}
        self._decoders: DecoderPool | None = None
        if isolate:
            available = max(0, available_memory().bytes - claimed_bytes)
            plan = plan_decoders(lanes.decoders(), processor.limits, available)
            log.info("media decoders: %s (%s available)", plan, f"{available / 1e9:.1f} GB")
            self._decoders = DecoderPool(processor.limits, plan)
            self._decoders.warm()
        self._num_bytes = 0
        self._jobs: dict[InputJob | TokenizeJob, int] = {}  # input bytes of unfinished requests
        self._slow_jobs: set[InputJob] = set()  # queued for slow compilation
        self._lock = threading.Lock()

    def submit(
        self, prompt: ParsedPrompt | ProcessedInput, params: SamplingParams | None = None
    ) -> InputJob:
        """Start to preprocess a request. Raises `QueueFull` above `max_bytes`."""
        job = InputJob(prompt, params)
        size = PromptSize.of(prompt if isinstance(prompt, ParsedPrompt) else CANCELLED)
        self._reserve(job, size.source_bytes + size.text_bytes)
        job.on_cancel = lambda: self._release(job)
        if job.form is None or self._grammars is None:
            self._begin(job, size.lane)
        else:
            go_on = partial(self._begin, job, size.lane)
            take_longer = partial(self._compile_slowly, self._grammars, job, go_on)
            compiler = self._grammars.compile_quickly
            self._in_lane("grammars", job, job.compile, compiler, go_on, take_longer)
        return job

    def tokenize(self, prompt: str | Conversation, plain: bool) -> TokenizeJob:
        """Start to tokenize a text or a conversation. Raises `QueueFull` above `max_bytes`."""
        job, size = TokenizeJob(prompt, plain), PromptSize.of(ParsedPrompt(prompt)).text_bytes
        self._reserve(job, size)
        job.on_cancel = lambda: self._release(job)
        self._in_lane("long_texts" if size else "text", job, job.run, self._processor)
        return job

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool) -> Future[str]:
        """Start to decode token ids, at most `max_model_len`."""
        decode = self._processor.reader.detokenize
        return self._threads["text"].submit(decode, token_ids, skip_special_tokens)

    def _reserve(self, job: InputJob | TokenizeJob, size: int) -> None:
        """Count the bytes of a job. Raises `QueueFull`."""
        with self._lock:
            total, most = self._num_bytes + size, self._max_bytes
            # A single request may exceed the limit.
            if most is not None and 0 < size < total and total > most:
                raise QueueFull(
                    f"requests have {self._num_bytes} bytes of images, videos and long texts, and "
                    f"{size} more exceed max_queue_bytes={self._max_bytes}; try again later"
                )
            self._num_bytes = total
            self._jobs[job] = size

    def _compile_slowly(self, grammars: Grammars, job: InputJob, go_on: Callable[[], None]) -> None:
        """Queue a slow compilation. Raises `GrammarQueueFull` if the queue is full."""
        with self._lock:
            if job not in self._jobs:  # Cancelled: no caller waits for it.
                return
            if len(self._slow_jobs) >= MAX_SLOW_GRAMMARS:
                raise GrammarQueueFull(
                    f"structured: {MAX_SLOW_GRAMMARS} complex grammars are queued for compilation; "
                    "try again later"
                )
            self._slow_jobs.add(job)

        def compile_job() -> None:
            try:
                job.compile(grammars.compile_slowly, go_on, go_on)
            finally:
                with self._lock:
                    self._slow_jobs.discard(job)

        self._in_lane("slow_grammars", job, compile_job)

    def _begin(self, job: InputJob, lane: str) -> None:
        decoders = None if lane in ("text", "long_texts") else self._decoders
        self._in_lane(lane, job, job.run, self._processor, decoders, lane)

    def _in_lane(
        self, lane: str, job: InputJob | TokenizeJob, task: Callable[..., None], *more: Any
    ) -> None:
        work = self._threads[lane].submit(task, *more)
        work.add_done_callback(lambda work: job.cancel() if work.cancelled() else None)

    def _release(self, job: InputJob | TokenizeJob) -> None:
        """Stop counting the bytes of a job whose request has ended."""
        with self._lock:
            self._slow_jobs.discard(job)
            self._num_bytes -= self._jobs.pop(job, 0)

    def close(self) -> None:
        """Cancel all jobs without waiting for those that are running."""
        with self._lock:
            jobs = tuple(self._jobs)
        for job in jobs:
            job.cancel()
        for threads in self._threads.values():
            threads.close()
        if self._decoders is not None:
            self._decoders.close()
