"""Pool of decoder processes, each used by one request at a time."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import BinaryIO, Self

from PIL import Image

from ...config.media_limits import MediaLimits
from ...errors import DecoderUnavailable, InputError
from ..decode.animation import is_animation
from ..decode.opening import open_here
from ..decode.reader import MediaReader
from ..decode.webp import webp_header
from ..task import MediaTask
from .plan import DecoderPlan, is_small
from .process import DecoderProcess, DecoderStoppedError, StartCancelledError
from .reader import ChildReader
from .slots import FairSlots

log = logging.getLogger("octavo.media")

MAX_READERS = 2000  # files that a process decodes before it is replaced
MAX_RESIDENT = 512 << 20  # resident bytes above which a process is replaced after a request


class DecoderPool:
    """Processes of a `DecoderPlan`, started on demand. Thread-safe."""

    def __init__(self, limits: MediaLimits, plan: DecoderPlan | int) -> None:
        """Create a pool without processes.

        `plan`: a number stands for that many processes, each with all of `decoder_memory_bytes`.
        """
        if isinstance(plan, int):
            most = limits.decoder_memory_bytes
            plan = DecoderPlan(plan, plan, most, most, {}, are_shared=True)
        self.plan, self.num_started = plan, 0
        self.limits = replace(limits, decoder_memory_bytes=plan.large_bytes)
        self._lock = threading.Lock()
        self._free: list[DecoderProcess] = []  # a stack
        self._lent: set[DecoderProcess] = set()
        self._is_closed = self._is_logged = False
        self._all_slots = FairSlots(plan.num_decoders)
        lanes = {} if plan.are_shared else plan.lanes
        self._slots = {lane: FairSlots(count) for lane, count in lanes.items()}
        self._large_slots = [FairSlots(count) for count in _halves(plan.num_large)]

    def warm(self) -> None:
        """Start one process, so that the first request does not wait for it. Takes a few ms."""
        process = self._start_early()
        if process is not None:
            self._keep(process)

    def lease(self, task: MediaTask | None = None, lane: str = "") -> Lease:
        """Return the context in which a request opens its files.

        It acquires a process when the first file is opened and returns it on exit. `task` is the
        request's.
        """
        return Lease(self, task, self._slots.get(lane, self._all_slots))

    def large_slots(self, kind: str) -> FairSlots:
        """Return the slots of processes that may use all of `decoder_memory_bytes`.

        Images and videos have separate slots, because videos take long.
        """
        return self._large_slots[0 if kind == "video" else -1]

    def take(self, adopt: Callable[[DecoderProcess], None]) -> DecoderProcess:
        """Return a responsive process; the caller must have acquired a slot.

        `adopt` is called with each candidate before it may have to be waited for. Raises
        `DecoderStoppedError` or `OSError` if a new process does not start, and
        `StartCancelledError` if `adopt` or another thread cancelled the wait.
        """
        while True:
            process, is_new = self._next()
            adopt(process)
            try:
                process.await_ready()
                if is_new or process.answers():
                    return process
            except DecoderStoppedError:
                if is_new:
                    self.drop(process)
                    raise
            log.warning("media decoder: an idle process died; replacing it")
            self.drop(process)

    def _next(self) -> tuple[DecoderProcess, bool]:
        """Return a free process, or a new one and True."""
        with self._lock:
            self._check_open()
            if self._free:
                process = self._free.pop()
                self._lent.add(process)
                return process, False
        process = self._new()
        with self._lock:
            self._lent.add(process)
            is_closed = self._is_closed
        if is_closed:
            self.drop(process)
            self._check_open()
        return process, True

    def _new(self) -> DecoderProcess:
        with self._lock:
            self.num_started += 1
        return DecoderProcess(self.limits)

    def drop(self, process: DecoderProcess) -> None:
        """Kill a process that was taken."""
        with self._lock:
            self._lent.discard(process)
        process.kill()

    def log_start(self, process: DecoderProcess) -> None:
        """Log once which sandbox features the processes use."""
        with self._lock:
            is_first, self._is_logged = not self._is_logged, True
        if is_first:
            log.info("media decoder: %s", process.sandbox)

    def give_back(self, process: DecoderProcess) -> None:
        """Return a process to the pool.

        A dead, busy, old or large process is replaced, without waiting for the new one to start.
        """
        process.end_request()
        if not _is_good(process):
            self.drop(process)
            fresh = self._start_early()
            if fresh is None:
                return
            process = fresh
        self._keep(process)

    def _keep(self, process: DecoderProcess) -> None:
        with self._lock:
            self._lent.discard(process)
            is_closed = self._is_closed
            if not is_closed:
                self._free.append(process)
        if is_closed:
            process.kill()

    def _start_early(self) -> DecoderProcess | None:
        try:
            return None if self._is_closed else self._new()
        except OSError:  # the next request tries again, and reports it
            return None

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the pool of media decoders is closed")

    def close(self) -> None:
        """Kill all processes; readers of the requests that use them fail."""
        with self._lock:
            self._is_closed = True
            free, self._free = self._free, []
            for leased in self._lent:
                leased.terminate()
        for slots in (*self._slots.values(), self._all_slots, *self._large_slots):
            slots.close()
        for process in free:
            process.kill()


def _halves(count: int) -> tuple[int, ...]:
    return (count // 2, count - count // 2) if count > 1 else (count,)


def _is_good(process: DecoderProcess) -> bool:
    """Return whether a process can serve another request: alive, idle, neither old nor large."""
    return (
        process.is_alive
        and process.is_idle
        and not process.open_readers
        and process.num_readers < MAX_READERS
        and process.resident_bytes < MAX_RESIDENT
    )


class Lease:
    """A process leased to one request: a context manager, and an `OpenReader` inside it.

    One thread at a time uses it and its readers, which must be closed before it exits. Any thread
    may call `cancel`.
    """

    def __init__(self, pool: DecoderPool, task: MediaTask | None, slots: FairSlots) -> None:
        self._pool, self._task, self._slots = pool, task, slots
        self._process: DecoderProcess | None = None
        self._has_slot = self._is_cancelled = False
        self._large_slots: FairSlots | None = None  # set while one of these slots is acquired
        self._lock = threading.Lock()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._task is not None:
            self._stack.enter_context(self._task.watched(self.cancel))
        return self

    def cancel(self) -> None:
        """Interrupt the process's work while another thread waits for the result."""
        with self._lock:
            self._is_cancelled = True
            if self._process is not None:
                self._process.cancel()

    def __exit__(self, *exc: object) -> None:
        with self._lock:  # from here on, `cancel` reaches no process
            process, self._process = self._process, None
        if process is not None:
            self._shrink(process)
            self._pool.give_back(process)
        if self._has_slot:
            self._has_slot = False
            self._slots.release()
        self._stack.close()

    def __call__(
        self, kind: str, file: BinaryIO | Image.Image, limits: MediaLimits, field: str
    ) -> MediaReader:
        """Open a file in the decoder process, or a PIL image in this process.

        Raises `InputError` if the file cannot be opened or the task has ended.
        """
        if isinstance(file, Image.Image):
            return open_here(kind, file, limits, field)
        process = self._ready_process(field)
        num_bytes = file.seek(0, io.SEEK_END)
        canvas = webp_header(file)
        if kind == "video" and is_animation(file):  # opening one decodes all frames
            self._grow(process, kind, field)
        elif canvas is not None and not is_small(kind, canvas, num_bytes):
            self._grow(process, kind, field)  # opening one allocates its canvases
        reader = ChildReader(process, kind, file, limits, field, self._seconds_left(field))
        try:
            if not is_small(kind, reader.header, num_bytes):
                self._grow(process, kind, field)
        except BaseException:
            reader.__exit__(None, None, None)
            raise
        return reader

    def _seconds_left(self, field: str) -> float:
        if self._task is None:
            return float(self._pool.limits.media_timeout_s)
        return self._task.seconds_left(field)

    def _ready_process(self, field: str) -> DecoderProcess:
        """Return the leased process; acquire one if needed.

        Raises `InputError` if the task has ended, `DecoderUnavailable` if no process starts.
        """
        process = self._process
        if process is not None and process.is_alive:
            return process
        if process is not None:
            self._shrink(process)
            self._pool.drop(process)
        if not self._has_slot:
            self._slots.acquire(self._task, field)
            self._has_slot = True
        try:
            process = self._pool.take(self._adopt)
        except StartCancelledError:
            raise InputError(field, "the request was cancelled") from None
        except (DecoderStoppedError, OSError) as error:
            log.error("media decoder: %s", error)
            self._process = None
            raise DecoderUnavailable(field) from None
        process.allow_memory(self._pool.plan.small_bytes)
        self._pool.log_start(process)
        return process

    def _adopt(self, process: DecoderProcess) -> None:
        """Use a process from now on, so that `cancel` reaches it while it starts."""
        with self._lock:
            self._process = process
            if self._is_cancelled:
                process.cancel()

    def _grow(self, process: DecoderProcess, kind: str, field: str) -> None:
        """Wait for a slot of `large_slots`, then allow all of `decoder_memory_bytes`."""
        if self._large_slots is None:
            slots = self._pool.large_slots(kind)
            slots.acquire(self._task, field)
            self._large_slots = slots
            process.allow_memory(self._pool.plan.large_bytes)

    def _shrink(self, process: DecoderProcess) -> None:
        if self._large_slots is not None:
            process.allow_memory(self._pool.plan.small_bytes)
            self._large_slots.release()
            self._large_slots = None
