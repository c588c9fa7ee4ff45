"""Threads that make requests' input ready, beside the engine's loop.

Decoding, resizing and hashing hold no lock of Python's. Each kind of prompt has threads of its own:
text waits for no image, an image for no film, and nobody for another's server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..scheduler.admission import QueueFull
from ..scheduler.structured import StructuredOutput
from .cores import num_cores
from .grammar import Grammar, GrammarQueueFull, Grammars
from .grammar_trials import CompileTask
from .input.processor import InputProcessor, InputTimes, ProcessedInput, Prompt
from .media.child_pool import DecoderPool
from .media.task import MediaTask

KINDS = ("image", "video")
MAX_SLOW_GRAMMARS = 16  # that wait to be compiled: each may take a second


class InputJob:
    """A prompt on its way. `future` is done when the request can begin: later frames of a video
    are decoded after that."""

    def __init__(self, prompt: Prompt, form: StructuredOutput | None = None) -> None:
        """`form`: what its answers are to have."""
        self.future: Future[ProcessedInput] = Future()
        self.form = form
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
        self.on_cancel()

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
                self.future.set_exception(error)
        else:
            go_on()

    def run(self, processor: InputProcessor, decoders: DecoderPool | None) -> None:
        """In the pool. `decoders`: processes that open files; None: this one does."""
        if not self.future.set_running_or_notify_cancel():
            return
        with ExitStack() as stack:
            try:
                task = self._task = MediaTask(processor.limits)
                if decoders is not None:
                    lease = stack.enter_context(decoders.lease(task))
                    stack.enter_context(task.watched(lease.interrupt))
                    task.open_reader = lease
                if self._is_dropped:
                    task.cancel()
                ready = self._begin(processor, task)
            except BaseException as error:
                self.future.set_exception(error)
                return
            self.future.set_result(ready)
            if ready.stream is not None:
                ready.stream.run()

    def _begin(self, processor: InputProcessor, task: MediaTask) -> ProcessedInput:
        begun = time.monotonic()
        prompt = self._prompt.pop() if self._prompt else ""  # it was dropped in this moment
        ready = processor.begin(prompt, task=task)
        times = InputTimes(begun - self._given, time.monotonic() - begun)
        return replace(ready, times=times, arrived_at=self._given, grammar=self._grammar)


@dataclass(frozen=True)
class Lanes:
    """Threads for each kind of prompt, so that none waits for what takes longer by nature."""

    text: int  # no images, no videos
    images: int
    videos: int
    urls: int  # anything to be fetched: they mostly wait
    grammars: int  # compiled before the rest
    slow_grammars: int  # those that take over a tenth of a second: they delay only each other

    @classmethod
    def of(cls, cores: int) -> Lanes:
        return cls(
            text=2,
            images=max(2, cores),
            videos=max(2, cores // 2),
            urls=8,
            grammars=2,
            slow_grammars=1,
        )

    @property
    def num_decoders(self) -> int:
        return self.images + self.videos + self.urls


class InputPool:
    def __init__(
        self,
        processor: InputProcessor,
        isolate: bool = False,
        max_bytes: int | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`isolate`: files are decoded in processes of their own. `max_bytes`: of the sources of
        all requests until they are over; None: no bound."""
        self._processor, self._max_bytes, self._grammars = processor, max_bytes, grammars
        lanes = Lanes.of(num_cores())
        self._threads = {
            name: ThreadPoolExecutor(size, thread_name_prefix=name)
            for name, size in vars(lanes).items()
        }
        self._decoders = DecoderPool(processor.limits, lanes.num_decoders) if isolate else None
        if self._decoders is not None:
            self._decoders.warm()
        self._num_bytes = 0
        self._jobs: dict[InputJob, int] = {}  # whose requests are not over; bytes of their sources
        self._slow_jobs: set[InputJob] = set()  # that wait in the lane of slow grammars
        self._lock = threading.Lock()

    def submit(self, prompt: Prompt, form: StructuredOutput | None = None) -> InputJob:
        """`form`: of the answers. Raises `QueueFull` where too many bytes are waiting already."""
        job, size, lane = InputJob(prompt, form), source_bytes(prompt), lane_of(prompt)
        with self._lock:
            total, most = self._num_bytes + size, self._max_bytes
            if most is not None and 0 < size < total and total > most:  # one alone may be larger
                raise QueueFull(
                    f"requests have {self._num_bytes} bytes of images and videos, and {size} more "
                    f"are over max_queue_bytes={self._max_bytes}; try again later"
                )
            self._num_bytes = total
            self._jobs[job] = size
        job.on_cancel = lambda: self._release(job)
        if form is None or self._grammars is None:
            self._begin(job, lane)
        else:
            go_on = partial(self._begin, job, lane)
            take_longer = partial(self._compile_slowly, self._grammars, job, go_on)
            self._in_lane(
                "grammars", job, job.compile, self._grammars.compile_quickly, go_on, take_longer
            )
        return job

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
        decoders = None if lane == "text" else self._decoders
        self._in_lane(lane, job, job.run, self._processor, decoders)

    def _in_lane(self, lane: str, job: InputJob, task: Callable[..., None], *more: Any) -> None:
        work = self._threads[lane].submit(task, *more)
        work.add_done_callback(lambda work: job.cancel() if work.cancelled() else None)

    def _release(self, job: InputJob) -> None:
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
            threads.shutdown(wait=False, cancel_futures=True)
        if self._decoders is not None:
            self._decoders.close()


def lane_of(prompt: Any) -> str:
    """Which of `Lanes` a prompt in any form takes. What is no prompt is refused fastest as text."""
    found = list(_sources(prompt))
    if any(_has_url(source) for _, source in found):
        return "urls"
    if any(kind == "video" for kind, _ in found):
        return "videos"
    return "images" if found else "text"


def _has_url(source: Any) -> bool:
    if isinstance(source, str):
        return source[:8].lower().startswith(("http://", "https://"))
    return any(map(_has_url, _list(source)))


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
    size = getattr(getattr(source, "values", source), "nbytes", 0)
    return size if isinstance(size, int) else 0
