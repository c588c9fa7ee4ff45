"""Threads that preprocess requests' input, alongside the engine's loop.

Encoding text, decoding, resizing and hashing release the GIL. Short texts, long texts, images,
videos and URL fetches have separate threads, so none queues behind a slower kind.
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

from ...scheduler.admission import QueueFull
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
from .processor import InputProcessor, InputTimes, ProcessedInput, Prompt
from .prompt_size import PromptSize

log = logging.getLogger("octavo.media")

MAX_SLOW_GRAMMARS = 16  # that wait to be compiled: each may take a second


def _do_nothing() -> None:
    """The callback of a job that has been cancelled. The one before refers to the job: kept, it
    would keep the request's pixels until the next garbage collection."""


class InputJob:
    """A prompt on its way. `future` is done when the request can begin: later frames of a video
    are decoded after that."""

    def __init__(self, prompt: Prompt, params: SamplingParams | None = None) -> None:
        """`params`: their grammar and bad words are prepared too."""
        self.future: Future[ProcessedInput] = Future()
        self.form = None if params is None else params.structured
        self._bad_words = () if params is None else params.bad_words
        self._grammar: Grammar | None = None
        self._compile_task = CompileTask()
        self._prompt = [prompt]
        self._given = time.monotonic()
        self._is_dropped = False
        self._task: MediaTask | None = None  # once it has begun
        self.on_cancel: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Its request is over: nothing is kept, what is under way ends soon. To be called in any
        case, since the bytes of its prompt count until then."""
        self._is_dropped = True
        self._prompt.clear()  # the pool may come to it much later
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
        """Compile the grammar, in the pool and before `run`. `go_on` follows, or `take_longer`
        where `compiler` returns None."""
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
        """Preprocess the prompt, in a thread of the pool. `decoders`: processes that open files;
        None: this process does.

        The decoder is given back before the outcome is known, so that a client who acts on it
        interferes with no other request. A video is the exception: its later frames are still
        being decoded.
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
            if self.future.done():  # a stream keeps its own errors
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
        begun = time.monotonic()
        prompt = self._prompt.pop() if self._prompt else ""  # it was dropped in this moment
        ready = processor.begin(prompt, task=task)
        if self._bad_words:
            ready = replace(ready, bad_words=processor.bad_word_ids(self._bad_words))
        times = InputTimes(begun - self._given, time.monotonic() - begun)
        return replace(ready, times=times, arrived_at=self._given, grammar=self._grammar)


class TokenizeJob:
    """Tokenizes a text or a conversation: what the endpoints for that return."""

    def __init__(self, prompt: str | Sequence[Any], plain: bool) -> None:
        self.future: Future[list[int]] = Future()
        self._prompt, self._plain = prompt, plain
        self._is_dropped = False
        self.on_cancel: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Stop at the next piece of text. To be called in any case, as `InputJob.cancel`."""
        self._is_dropped = True
        self.future.cancel()
        self.on_cancel, call = _do_nothing, self.on_cancel
        call()

    def run(self, processor: InputProcessor) -> None:
        """In the pool."""
        if not self.future.set_running_or_notify_cancel():
            return
        prompt, reader = self._prompt, processor.reader
        try:
            if isinstance(prompt, str):
                ids = reader.tokenize(prompt, self._plain, self._check)
            else:
                ids = list(reader.read(prompt, check=self._check).token_ids)
        except BaseException as error:
            self.future.set_exception(without_frames(error))
        else:
            self.future.set_result(ids)

    def _check(self) -> None:
        if self._is_dropped:
            raise InputError("prompt", "the request is over")


@dataclass(frozen=True)
class PreprocessPools:
    """Threads for each kind of prompt, so that none waits for what takes longer by nature."""

    text: int  # no images, no videos, at most LONG_TEXT characters
    long_texts: int  # the same of more characters
    images: int
    videos: int
    urls: int  # anything to be fetched: they mostly wait
    grammars: int  # compiled before the rest
    slow_grammars: int  # those that take over a tenth of a second: they delay only each other

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
        """How many decoder processes each lane has work for. Threads of URLs mostly wait."""
        decoding = (self.images, self.videos, min(self.images, self.urls))
        return dict(zip(MEDIA_LANES, decoding, strict=True))


class InputPool:
    def __init__(
        self,
        processor: InputProcessor,
        isolate: bool = False,
        max_bytes: int | None = None,
        grammars: Grammars | None = None,
        claimed_bytes: int = 0,
    ) -> None:
        """`isolate`: decode files in separate processes. `max_bytes`: of the media and long texts
        of all unfinished requests; None: unlimited. `claimed_bytes`: of available memory that the
        engine will still use."""
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
        self._jobs: dict[InputJob | TokenizeJob, int] = {}  # unfinished requests' bytes of input
        self._slow_jobs: set[InputJob] = set()  # that wait in the lane of slow grammars
        self._lock = threading.Lock()

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> InputJob:
        """Start to preprocess a request. Raises `QueueFull` where too many bytes are waiting
        already."""
        job, size = InputJob(prompt, params), PromptSize.of(prompt)
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

    def tokenize(self, prompt: str | Sequence[Any], plain: bool) -> TokenizeJob:
        """Start to tokenize a text or a conversation. Raises `QueueFull` as `submit` does."""
        job, size = TokenizeJob(prompt, plain), PromptSize.of(prompt).text_bytes
        self._reserve(job, size)
        job.on_cancel = lambda: self._release(job)
        self._in_lane("long_texts" if size else "text", job, job.run, self._processor)
        return job

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool) -> Future[str]:
        """Start to decode token ids: at most as many as the model's length."""
        decode = self._processor.reader.detokenize
        return self._threads["text"].submit(decode, token_ids, skip_special_tokens)

    def _reserve(self, job: InputJob | TokenizeJob, size: int) -> None:
        """Raises `QueueFull`."""
        with self._lock:
            total, most = self._num_bytes + size, self._max_bytes
            if most is not None and 0 < size < total and total > most:  # one alone may be larger
                raise QueueFull(
                    f"requests have {self._num_bytes} bytes of images, videos and long texts, and "
                    f"{size} more are over max_queue_bytes={self._max_bytes}; try again later"
                )
            self._num_bytes = total
            self._jobs[job] = size

    def _compile_slowly(self, grammars: Grammars, job: InputJob, go_on: Callable[[], None]) -> None:
        """Raises `GrammarQueueFull` where enough of them wait."""
        with self._lock:
            if len(self._slow_jobs) >= MAX_SLOW_GRAMMARS:
                raise GrammarQueueFull(
                    f"structured: {MAX_SLOW_GRAMMARS} complex grammars wait to be compiled; try "
                    "again later"
                )
            self._slow_jobs.add(job)

        def compiler(form: StructuredOutput, task: CompileTask) -> Grammar:
            try:
                return grammars.compile_slowly(form, task)
            finally:
                with self._lock:
                    self._slow_jobs.discard(job)

        self._in_lane("slow_grammars", job, job.compile, compiler, go_on, go_on)

    def _begin(self, job: InputJob, lane: str) -> None:
        decoders = None if lane in ("text", "long_texts") else self._decoders
        self._in_lane(lane, job, job.run, self._processor, decoders, lane)

    def _in_lane(
        self, lane: str, job: InputJob | TokenizeJob, task: Callable[..., None], *more: Any
    ) -> None:
        work = self._threads[lane].submit(task, *more)
        work.add_done_callback(lambda work: job.cancel() if work.cancelled() else None)

    def _release(self, job: InputJob | TokenizeJob) -> None:
        """Its request is over, and with it the message that brought its bytes."""
        with self._lock:
            self._slow_jobs.discard(job)
            self._num_bytes -= self._jobs.pop(job, 0)

    def close(self) -> None:
        """What has not begun is cancelled, and what has begun ends soon; nothing is waited for."""
        with self._lock:
            jobs = tuple(self._jobs)
        for job in jobs:
            job.cancel()
        for threads in self._threads.values():
            threads.close()
        if self._decoders is not None:
            self._decoders.close()
