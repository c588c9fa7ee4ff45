"""A few decoder processes, each lent to one request at a time."""

from __future__ import annotations

import logging
import threading
from typing import BinaryIO, Self

from PIL import Image

from ..input_error import InputError
from .child_process import DecoderProcess, DecoderStoppedError
from .child_reader import STOPPED, ChildReader
from .limits import MediaLimits
from .opening import open_here
from .reader import MediaReader
from .task import MediaTask

log = logging.getLogger("octavo.media")

MOST_READERS = 2000  # files that a process decodes before a new one takes its place
MOST_RESIDENT = 512 << 20  # bytes that a process may keep between requests


class DecoderPool:
    """At most `size` processes, started when they are first needed. Thread-safe."""

    def __init__(self, limits: MediaLimits, size: int) -> None:
        self._limits = limits
        self._changed = threading.Condition()
        self._free: list[DecoderProcess | None] = [None] * size  # the last one is lent first
        self._lent: set[DecoderProcess] = set()
        self._is_closed = self._is_logged = False

    def warm(self) -> None:
        """Starts one process, so that the first request does not wait for it. Takes a few ms."""
        process = self._start_early()
        with self._changed:
            if process is not None and self._free and self._free[-1] is None:
                self._free[-1] = process
                process = None
        if process is not None:
            process.kill()

    def lease(self, task: MediaTask | None = None) -> Lease:
        """To be entered: then it holds a process, once one is free, until it is left. `task`: whose
        time it has."""
        return Lease(self, task)

    def take(self) -> DecoderProcess | None:
        """A process, or None where one is to be started. Waits until one is free."""
        with self._changed:
            while not self._free and not self._is_closed:
                self._changed.wait()
            self._check_open()
            process = self._free.pop()
            if process is not None:
                self._lent.add(process)
            return process

    def start(self) -> DecoderProcess:
        """In the place of one that was taken and is dead, or of None."""
        process = DecoderProcess(self._limits)
        with self._changed:
            self._lent.add(process)
            is_closed = self._is_closed
        if is_closed:
            self.drop(process)
            self._check_open()
        return process

    def drop(self, process: DecoderProcess) -> None:
        """Ends one that was taken."""
        with self._changed:
            self._lent.discard(process)
        process.kill()

    def log_start(self, process: DecoderProcess) -> None:
        """Says once what holds the processes."""
        with self._changed:
            is_first, self._is_logged = not self._is_logged, True
        if is_first:
            log.info("media decoder: %s", process.sandbox)

    def give_back(self, process: DecoderProcess | None) -> None:
        """One that is dead, old or has grown is replaced, which nobody waits for."""
        if process is not None and not _is_good(process):
            self.drop(process)
            process = self._start_early()
        with self._changed:
            if process is not None:
                self._lent.discard(process)
            if not self._is_closed:
                self._free.append(process)
                self._changed.notify()
                return
        if process is not None:
            process.kill()

    def _start_early(self) -> DecoderProcess | None:
        try:
            return None if self._is_closed else DecoderProcess(self._limits)
        except OSError:  # who needs it will try again, and be told
            return None

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the pool of media decoders is closed")

    def close(self) -> None:
        """Ends all processes, also those that are lent: their requests' readers fail."""
        with self._changed:
            self._is_closed = True
            free, self._free = self._free, []
            for lent in self._lent:
                lent.interrupt()
            self._changed.notify_all()
        for process in free:
            if process is not None:
                process.kill()


def _is_good(process: DecoderProcess) -> bool:
    """Fit for another request: alive, done with this one, neither old nor large."""
    return (
        process.is_alive
        and not process.open_readers
        and process.num_readers < MOST_READERS
        and process.resident_bytes < MOST_RESIDENT
    )


class Lease:
    """A process for one request: a context manager, and a `loader.OpenReader` while it is entered.

    One thread at a time uses it and its readers, which are closed before it is left.
    """

    def __init__(self, pool: DecoderPool, task: MediaTask | None) -> None:
        self._pool, self._task = pool, task
        self._process: DecoderProcess | None = None
        self._is_held = False

    def __enter__(self) -> Self:
        self._process, self._is_held = self._pool.take(), True
        return self

    def interrupt(self) -> None:
        """Ends what its process is at, while another thread waits for that."""
        process = self._process
        if process is not None:
            process.interrupt()

    def __exit__(self, *exc: object) -> None:
        process, self._process = self._process, None
        if self._is_held:
            self._is_held = False
            self._pool.give_back(process)

    def __call__(
        self, kind: str, file: BinaryIO | Image.Image, limits: MediaLimits, field: str
    ) -> MediaReader:
        """A reader of the file, by the process; images of callers in this process are here
        already. Raises `InputError`."""
        if isinstance(file, Image.Image):
            return open_here(kind, file, limits, field)
        seconds = float(limits.media_timeout_s)
        if self._task is not None:
            seconds = self._task.seconds_left(field)
        return ChildReader(self._ready_process(field), kind, file, limits, field, seconds)

    def _ready_process(self, field: str) -> DecoderProcess:
        if not self._is_held:
            raise RuntimeError("the lease is not held")
        if self._process is not None and not self._process.is_alive:
            self._pool.drop(self._process)
            self._process = None
        try:
            if self._process is None:
                self._process = self._pool.start()
            self._process.await_ready()
        except (DecoderStoppedError, OSError) as error:
            log.error("media decoder: %s", error)
            raise InputError(field, STOPPED) from None
        self._pool.log_start(self._process)
        return self._process
