"""Threads that preprocess requests' input, alongside the engine's loop.

Encoding text, decoding, resizing and hashing release the GIL. Short texts, long texts, images,
videos and URL fetches have separate threads, so none queues behind a slower kind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from sys import getsizeof
from typing import Any

from ..scheduler.admission import QueueFull
from ..scheduler.params import SamplingParams
from .cores import num_cores
from .daemon_pool import DaemonPool
from .grammar import Grammar, Grammars
from .input.openai_parts import KIND_OF
from .input.processor import InputProcessor, InputTimes, ProcessedInput, Prompt
from .input_error import InputError
from .machine_memory import available_memory
from .media.child_pool import DecoderPool
from .media.decoder_plan import MEDIA_LANES, plan_decoders
from .media.task import MediaTask

log = logging.getLogger("octavo.media")

KINDS = ("image", "video")
MAPPINGS, SEQUENCES = (dict, Mapping), (list, tuple, Sequence)  # the first are found fastest
TOKEN_ID_BYTES = 40  # of a list of numbers
LONG_TEXT = 1 << 16  # characters: some tenths of a second of one core


class InputJob:
    """A prompt on its way. `future` is done when the request can begin: later frames of a video
    are decoded after that."""

    def __init__(self, prompt: Prompt, params: SamplingParams | None = None) -> None:
        """`params`: their grammar and bad words are prepared too."""
        self.future: Future[ProcessedInput] = Future()
        self.form = None if params is None else params.structured
        self._bad_words = () if params is None else params.bad_words
        self._grammar: Grammar | None = None
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
        if self._task is not None:
            self._task.cancel()
        self.on_cancel()

    def compile(self, grammars: Grammars, go_on: Callable[[], None]) -> None:
        """In the pool, before `run`, which `go_on` leads to."""
        try:
            if self.form is not None and not self._is_dropped:
                self._grammar = grammars.compile(self.form)
        except BaseException as error:
            if self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)
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
            self.future.set_exception(error)
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
        self.on_cancel()

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
            self.future.set_exception(error)
        else:
            self.future.set_result(ids)

    def _check(self) -> None:
        if self._is_dropped:
            raise InputError("prompt", "the request is over")


@dataclass(frozen=True)
class Lanes:
    """Threads for each kind of prompt, so that none waits for what takes longer by nature."""

    text: int  # no images, no videos, at most LONG_TEXT characters
    long_texts: int  # the same of more characters
    images: int
    videos: int
    urls: int  # anything to be fetched: they mostly wait
    grammars: int  # forms that answers are to have: compiled before the rest

    @classmethod
    def of(cls, cores: int) -> Lanes:
        images, videos = max(2, cores), max(2, cores // 2)
        return cls(text=2, long_texts=2, images=images, videos=videos, urls=8, grammars=2)

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
        lanes = Lanes.of(num_cores())
        self._threads = {name: DaemonPool(size, name) for name, size in vars(lanes).items()}
        self._decoders: DecoderPool | None = None
        if isolate:
            available = max(0, available_memory().bytes - claimed_bytes)
            plan = plan_decoders(lanes.decoders(), processor.limits, available)
            log.info("media decoders: %s (%s available)", plan, f"{available / 1e9:.1f} GB")
            self._decoders = DecoderPool(processor.limits, plan)
            self._decoders.warm()
        self._num_bytes = 0
        self._jobs: dict[
            InputJob | TokenizeJob, int
        ] = {}  # whose requests are not over; bytes of their input
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
            self._in_lane("grammars", job, job.compile, self._grammars, go_on)
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


@dataclass(frozen=True)
class PromptSize:
    """What decides where and when a prompt of any kind, which may be wrong, is preprocessed."""

    lane: str  # of `Lanes`; what is not a prompt is rejected fastest as text
    source_bytes: int  # of its media as they came: files, data URIs, arrays
    text_bytes: int  # in memory, of its texts or token ids; 0 up to LONG_TEXT characters

    @classmethod
    def of(cls, prompt: Any) -> PromptSize:
        values = list(_values(prompt))
        sources = [(kind, value) for kind, value in values if kind in KINDS]
        texts: list[Any] = [value for kind, value in values if kind not in KINDS]
        is_long = sum(map(len, texts)) > LONG_TEXT
        return cls(
            lane=_lane_of(sources, is_long),
            source_bytes=sum(_num_bytes(source) for _, source in sources),
            text_bytes=sum(map(_text_bytes, texts)) if is_long else 0,
        )


def _lane_of(sources: Sequence[tuple[str, Any]], is_long: bool) -> str:
    if any(_has_url(source) for _, source in sources):
        return "urls"
    if any(kind == "video" for kind, _ in sources):
        return "videos"
    if sources:
        return "images"
    return "long_texts" if is_long else "text"


def _has_url(source: Any) -> bool:
    if isinstance(source, str):
        return source[:8].lower().startswith(("http://", "https://"))
    return any(map(_has_url, _list(source)))


def _text_bytes(text: Sequence[Any]) -> int:
    return getsizeof(text) if isinstance(text, str) else len(text) * TOKEN_ID_BYTES


def _values(prompt: Any) -> Iterator[tuple[str, Any]]:
    """Yield ("image", "video" or "text", source or text) of each part of a prompt."""
    if isinstance(prompt, MAPPINGS):
        for kind in KINDS:
            for source in _list(prompt.get(f"{kind}s")):
                yield kind, source.get(kind) if isinstance(source, MAPPINGS) else source
        for name in ("prompt", "prompt_token_ids"):
            if isinstance(prompt.get(name), Sized):
                yield "text", prompt[name]
        prompt = prompt.get("messages")
    elif isinstance(prompt, str):
        yield "text", prompt
    for message in _list(prompt):
        content = message.get("content") if isinstance(message, MAPPINGS) else ()
        for part in (content,) if isinstance(content, str) else _list(content):
            if isinstance(part, str):
                yield "text", part
            elif isinstance(part, MAPPINGS):
                yield from _values_of_part(part)


def _values_of_part(part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of the model card's and of OpenAI's parts, with a type or without."""
    if isinstance(part.get("text"), str):
        yield "text", part["text"]
    for name, kind in KIND_OF.items():
        if name in part or part.get("type") == name:
            source = part.get(name)
            yield kind, source.get("url") if isinstance(source, MAPPINGS) else source


def _list(value: Any) -> Sequence[Any]:
    is_list = isinstance(value, SEQUENCES) and not isinstance(value, str | bytes)
    return value if is_list else ()


def _num_bytes(source: Any) -> int:
    if isinstance(source, str | bytes | bytearray | memoryview):
        return len(source)
    if isinstance(source, Sequence):
        return sum(map(_num_bytes, source))
    size = getattr(getattr(source, "values", source), "nbytes", 0)
    return size if isinstance(size, int) else 0
