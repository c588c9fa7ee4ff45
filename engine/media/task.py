"""Making one request's media ready, as a task that ends: in time, or because nobody waits."""

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
    """What the items of one request share: their time, their bytes, what they have open.

    One thread works on it; `cancel` may be called by any.
    """

    def __init__(self, limits: MediaLimits, open_reader: OpenReader = open_here) -> None:
        """Its time begins now."""
        self.limits, self.open_reader = limits, open_reader
        self.files = ExitStack()  # closed with it
        self._begun = time.monotonic()
        self._num_bytes = 0
        self._is_cancelled = False
        self._stops: list[Stop] = []
        self._lock = Lock()

    def seconds_left(self, field: str) -> float:
        """To be asked before each piece of work. Raises `InputError` when there are none, or
        nobody waits any more."""
        if self._is_cancelled:
            raise InputError(field, "the request is over")
        spent = time.monotonic() - self._begun
        if spent >= self.limits.media_timeout_s:
            found = f"the request's images and videos are not ready after {spent:.0f} seconds"
            self.limits.refuse("media_timeout_s", field, found)
        return self.limits.media_timeout_s - spent

    def check(self) -> None:
        """Raise `InputError` once the request has ended: its result is not used."""
        if self._is_cancelled:
            raise InputError("prompt", "the request is over")

    def charge(self, num_bytes: int, field: str) -> None:
        """A file takes memory from now on. Raises `InputError` when all of them take too much."""
        self._num_bytes += num_bytes
        if self._num_bytes > self.limits.max_media_bytes:
            found = f"{self._num_bytes} bytes of files in one request"
            self.limits.refuse("max_media_bytes", field, found)

    @contextmanager
    def watched(self, stop: Stop) -> Iterator[None]:
        """While in it, `cancel` calls `stop`, which is to end what the working thread waits for."""
        with self._lock:
            self._stops.append(stop)
            is_cancelled = self._is_cancelled
        try:
            if is_cancelled:
                stop()
            yield
        finally:
            with self._lock:  # so that `stop` is never called later
                self._stops.remove(stop)

    def cancel(self) -> None:
        """Nobody waits: what is under way is to end soon."""
        with self._lock:
            self._is_cancelled = True
            for stop in self._stops:
                stop()

    def close(self) -> None:
        """Closes what is open. By the working thread."""
        self.files.close()
