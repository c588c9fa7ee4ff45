"""Deadline, byte budget and cancellation for preprocessing one request's media."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

from ..config.media_limits import MediaLimits
from ..errors import InputError
from .decode.opening import OpenReader, open_here

Stop = Callable[[], None]


class MediaTask:
    """State shared by the items of one request: deadline, byte budget, open files.

    Used by one thread, except `cancel`, which any thread may call.
    """

    def __init__(self, limits: MediaLimits, open_reader: OpenReader = open_here) -> None:
        """Start the clock of `media_timeout_s`."""
        self.limits, self.open_reader = limits, open_reader
        self.files = ExitStack()  # closed by `close`
        self._start_time = time.monotonic()
        self._num_bytes = 0
        self._is_cancelled = False
        self._stops: list[Stop] = []
        self._lock = Lock()

    def seconds_left(self, field: str) -> float:
        """Return the remaining time; call it before each piece of work.

        Raises `InputError` if the time is up or the task was cancelled.
        """
        if self._is_cancelled:
            raise InputError(field, "the request was cancelled")
        spent = time.monotonic() - self._start_time
        if spent >= self.limits.media_timeout_s:
            found = f"the request's images and videos are not ready after {spent:.0f} seconds"
            self.limits.refuse("media_timeout_s", field, found)
        return self.limits.media_timeout_s - spent

    def check(self) -> None:
        """Raise `InputError` if the task was cancelled."""
        if self._is_cancelled:
            raise InputError("prompt", "the request was cancelled")

    def charge(self, num_bytes: int, field: str) -> None:
        """Count the bytes of a file. Raises `InputError` if the total exceeds `max_media_bytes`."""
        self._num_bytes += num_bytes
        if self._num_bytes > self.limits.max_media_bytes:
            found = f"{self._num_bytes} bytes of files in one request"
            self.limits.refuse("max_media_bytes", field, found)

    @contextmanager
    def watched(self, stop: Stop) -> Iterator[None]:
        """Have `cancel` call `stop` inside this context, to interrupt the working thread."""
        with self._lock:
            self._stops.append(stop)
            is_cancelled = self._is_cancelled
        try:
            if is_cancelled:
                stop()
            yield
        finally:
            with self._lock:  # `cancel` must not call `stop` after this
                self._stops.remove(stop)

    def cancel(self) -> None:
        """Make the work in progress end soon."""
        with self._lock:
            self._is_cancelled = True
            for stop in self._stops:
                stop()

    def close(self) -> None:
        """Close all open files. Called by the working thread."""
        self.files.close()
